"""Memory that is kept does not come from the system a second time."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from captioner.cli import main

_USED_AGAIN = """
import resource, sys, torch
from captioner.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
faults = []
for _ in range(30):
    torch.ones(16 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-10])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
def test_what_is_kept_is_not_mapped_anew() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", _USED_AGAIN, how]
        env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        return int(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=env).stdout)

    assert faults("kept") < faults("given back") / 10


def test_the_command_line_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("captioner.memory.keep_freed_memory", lambda: calls.append(1))
    assert main(["info"]) == 0
    assert calls == [1]
