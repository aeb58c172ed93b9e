"""The README: its commands exist, and its first example says what it shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from skimage import data_dir  # type: ignore[attr-defined]

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def test_first_example_says_what_it_shows() -> None:
    shown = dict(re.findall(r"^(\w+\.png)  (.+?)  \[", README, re.MULTILINE))
    assert len(shown) >= 3
    paths = [str(Path(data_dir) / name) for name in shown]
    command = [sys.executable, "-m", "captioner", "caption", "--precision", "float32", *paths]
    done = subprocess.run(command, capture_output=True, check=True)
    records = map(json.loads, done.stdout.splitlines())
    assert {Path(r["image"]).name: r["caption"] for r in records} == shown


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_python_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dog.jpg").write_bytes((Path(data_dir) / "horse.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_commands_name_files_and_options_that_exist() -> None:
    shell = "\n".join(text for kind, text in BLOCKS if kind in {"sh", "console"})
    for name in set(re.findall(r"(?:scripts|configs)/[\w.]+", shell)):
        assert (ROOT / name).exists(), name
    for script in set(re.findall(r"scripts/\w+\.py", shell)):
        lines = shell.replace("\\\n", " ").splitlines()
        options = "".join(line.partition(script)[2] for line in lines)  # before it: torchrun's own
        source = (ROOT / script).read_text()
        for option in set(re.findall(r"(--[a-z-]+)", options)):
            assert f'"{option}"' in source, f"{script} has no {option}"
