"""The pages and the notebooks: what they show runs, and what they name exists.

A block of ``sh``, ``console`` or ``python`` is run as it stands, page by page, in a folder with a
few photographs and captions; a ``console`` block must print what it shows. A block that cannot be
run has a comment above it, ``<!-- not run: REASON -->``, or in a notebook a first line
``# not run: REASON``. ``pip`` installs nothing here.
"""

from __future__ import annotations

import json
import os
import pty
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import pytest
from PIL import Image
from skimage import data_dir  # type: ignore[attr-defined]

from captioner import cli
from captioner.config import Config
from captioner.settings import load_config

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md")),
    ROOT / "captioner" / "weights" / "MODEL_CARD.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PROGRAMS = sorted([*(ROOT / "scripts").rglob("*.py"), *(ROOT / "examples").glob("*.py")])
TRAINS = ("README.md", "training.md", "tune_on_your_captions.ipynb")
# Options of programs that are not ours.
FOREIGN = {"--directory", "--index-url", "--logdir", "--no-build-isolation", "--no-deps",
           "--nproc-per-node", "--prefix"}  # fmt: skip

_BLOCK = re.compile(
    r"^(?: *<!-- not run: (?P<reason>[^>]+) -->\n)?(?P<indent> *)```(?P<language>\w*)\n"
    r"(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
# What bash has to read; all else is run in this process, which has torch already.
_BASH = re.compile(r"[|&;<>$`(){}*]")


class Block(NamedTuple):
    """One block of code: where it stands, and why it is not run, if it is not."""

    place: str
    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        place = f"{page.relative_to(ROOT)}:{line}"
        yield Block(place, match["language"], dedent(match["code"]), match["reason"])


def shell_lines(block: Block) -> list[str]:
    """Return the commands of a block, one a line."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language in ("sh", "console")]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder that has what the pages speak of, and programs that need no installation."""
    for name in ("scripts", "configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    captions = {"camera": "a man with a camera", "astronaut": "a woman in an orange suit",
                "chelsea": "a cat looks at the camera", "horse": "a black horse"}  # fmt: skip
    rows = "".join(f"{name}.jpg,{caption}\n" for name, caption in captions.items())
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).write_text(f"image,caption\n{rows}")
        os.utime(tmp_path / name, (0, 0))  # the photographs are newer
    (tmp_path / "photos").mkdir()
    for name in captions:
        with Image.open(Path(data_dir) / f"{name}.png") as picture:
            picture.convert("RGB").resize((256, 256)).save(tmp_path / "photos" / f"{name}.jpg")
    (tmp_path / "dog.jpg").write_bytes((tmp_path / "photos" / "chelsea.jpg").read_bytes())
    references = [{"image_id": 1, "caption": "a dog runs on grass"}]
    (tmp_path / "captions_val.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": references})
    )
    (tmp_path / "results.json").write_text(json.dumps(references))
    programs = {"captioner": f'{sys.executable} -m captioner "$@"', "pip": "true",
                "python": f'{sys.executable} "$@"'}  # fmt: skip
    (tmp_path / "bin").mkdir()
    for name, command in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nexec {command}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_line(line: str) -> int:
    """Run a command as a shell would, in this process where nothing speaks against it."""
    words = shlex.split(line, comments=True)
    if _BASH.search(line) or words[0] not in ("captioner", "pip", "python"):
        return subprocess.run(["bash", "-ec", line], check=False).returncode
    if words[0] == "pip":
        return 0
    try:
        if words[0] == "captioner":
            return cli.main(words[1:])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            patch.syspath_prepend(str((ROOT / words[1]).parent))
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def printed(lines: list[str]) -> list[str]:
    """Return what commands print on a terminal."""
    ours, theirs = pty.openpty()
    command = ["bash", "-ec", "\n".join(lines)]
    said = b""
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL) as process:
        os.close(theirs)
        while True:
            try:
                said += os.read(ours, 4096)
            except OSError:  # so a terminal says that nobody writes to it any more
                break
    os.close(ours)
    assert process.returncode == 0
    return said.decode().splitlines()


def run(block: Block) -> None:
    if block.language == "python":
        exec(compile(block.code, block.place, "exec"), {"__name__": "__main__"})
    elif block.language == "console":
        shown = [line for line in block.code.splitlines() if not line.startswith("$ ")]
        assert printed(shell_lines(block)) == shown, block.place
    elif block.language == "sh":
        lines = shell_lines(block)
        if any(re.match(r"\w+=", line) for line in lines):  # a variable, for the lines after it
            lines = ["\n".join(lines)]
        for line in lines:
            assert run_line(line) == 0, f"{block.place}: {line}"
    elif block.language == "json":
        json.loads(block.code)
    elif block.language == "toml":
        tomllib.loads(block.code)


def parameters(paths: list[Path]) -> list[Any]:
    return [
        pytest.param(
            path,
            id=str(path.relative_to(ROOT)),
            marks=[pytest.mark.slow] if path.name in TRAINS else [],
        )
        for path in paths
    ]


@pytest.mark.parametrize("page", parameters(PAGES))
def test_blocks_run(page: Path, scratch: Path) -> None:
    for block in blocks(page):
        if block.reason is None:
            run(block)


@pytest.mark.parametrize("notebook", parameters(NOTEBOOKS))
def test_notebooks_run(notebook: Path, scratch: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for number, cell in enumerate(cells):
        code = "".join(cell["source"])
        if cell["cell_type"] == "code" and not code.startswith("# not run: "):
            assert not cell["outputs"], "a notebook is kept without its outputs"
            exec(compile(code, f"{notebook.name}, cell {number}", "exec"), names)


def test_reasons_are_given_and_languages_known() -> None:
    known = {"", "console", "json", "python", "sh", "toml"}
    assert {block.language for block in BLOCKS} <= known
    assert [block.place for block in BLOCKS if block.reason is not None and not block.reason] == []


def options_of(program: Path) -> set[str]:
    text = program.read_text(encoding="utf-8")
    if "from captioner.flags import add_" in text:
        text += (ROOT / "captioner" / "flags.py").read_text(encoding="utf-8")
    return set(re.findall(r'"(--[a-z][a-z-]*)"', text))


def options_of_captioner(command: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-m", "captioner", command, "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(re.findall(r"--[a-z][a-z-]*", done.stdout))


def test_programs_have_the_options_that_commands_give_them() -> None:
    for block in SHELL:
        for line in shell_lines(block):
            for script in re.findall(r"(?:scripts|examples)/\w+\.py", line):
                assert (ROOT / script).exists(), f"{block.place}: {script}"
                given = set(re.findall(r"(?<= )--[a-z][a-z-]*", line.partition(script)[2]))
                sources = [ROOT / script, *(ROOT / "scripts" / "measures").glob("*.py")]
                known = set().union(*map(options_of, sources))
                assert given <= known, f"{block.place}: {script} has no {given - known}"


def test_configs_take_what_commands_set() -> None:
    command = re.compile(r"scripts/(?:train|check_data)\.py (configs/\w+\.toml)(.*)")
    for block in SHELL:
        for line in shell_lines(block):
            for config, arguments in command.findall(line):
                words = shlex.split(arguments, comments=True)
                given = [value for word, value in pairwise(words) if word == "--set"]
                load_config(Config, ROOT / config, [value for value in given if "$" not in value])


def test_pages_name_only_options_that_exist_and_all_of_captioner() -> None:
    commands = ("caption", "tag", "find", "serve")
    ours = set().union(*map(options_of_captioner, commands))
    known = ours | FOREIGN | {"--version", "--quick"}.union(*map(options_of, PROGRAMS))
    text = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    named = {
        name: set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page)) for name, page in text.items()
    }
    wrong = {name: options - known for name, options in named.items() if options - known}
    assert not wrong, f"pages name options that nothing has: {wrong}"
    missing = ours - named["command-line.md"] - named["search.md"] - named["serve.md"] - {"--help"}
    missing = {option for option in missing if not option.startswith("--no-")}
    assert not missing, f"docs/command-line.md, search.md and serve.md lack {sorted(missing)}"


def keys(section: Any, before: str = "") -> Iterator[str]:
    for field in fields(section):
        value, name = getattr(section, field.name), f"{before}{field.name}"
        yield name
        if is_dataclass(value):
            yield from keys(value, f"{name}.")


def test_pages_name_only_keys_that_exist() -> None:
    known = {*keys(Config())}
    sections = "|".join(field.name for field in fields(Config))
    for page in PAGES:
        named = re.findall(
            rf"(?<![\w.])((?:{sections})\.[a-z_.]*[a-z_])", page.read_text(encoding="utf-8")
        )
        wrong = {n for n in named if not re.search(r"\.(md|toml|py|tsv|sources\..*)$", n)} - known
        assert not wrong, f"{page.name}: there are no {wrong}"


def slug(heading: str) -> str:
    """Return a heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text()):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
                assert anchor in map(slug, headings), f"{page.name}: {target}#{anchor}"


def test_files_that_pages_name_exist() -> None:
    named = re.compile(r"`((?:captioner|configs|docs|examples|scripts|tests)/[\w./]+)`")
    for page in PAGES:
        for name in named.findall(page.read_text(encoding="utf-8")):
            assert "NAME" in name or (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_readme_is_short_and_its_picture_small() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8_000
    assert (ROOT / "docs" / "captions.jpg").stat().st_size < 200_000
