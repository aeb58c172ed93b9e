"""The house: levels, public names, documentation, size."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "captioner"
LEVELS = {
    7: {"cli", "__main__", "__init__"},
    6: {"folder", "report"},
    5: {
        "inference",
        "training",
        "teacher_forcing",
        "self_critical",
        "transfer",
        "snapshot",
        "summary",
    },
    4: {"generation", "evaluation", "checkpoint", "features", "optimization", "runlog"},
    3: {"model"},
    2: {"decoder", "dataset"},
    1: {"encoder", "attention", "recurrence", "search", "losses", "distributed", "device"},
    0: {
        "images",
        "vocabulary",
        "tokenizer",
        "readers",
        "metrics",
        "tags",
        "treebank",
        "config",
        "decoding",
        "digests",
        "journal",
        "memory",
        "outputs",
        "pages",
        "schedules",
        "sources",
        "stopper",
        "audit",
        "csv_cells",
        "files",
        "options",
        "settings",
        "version",
    },
}
LEVEL = {room: level for level, rooms in LEVELS.items() for room in rooms}
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py"))
TREES = {room: ast.parse((PACKAGE / f"{room}.py").read_text()) for room in ROOMS}


def imports(tree: ast.AST) -> set[str]:
    """Return the rooms that a tree imports, wherever it does so."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("captioner"):
            below = (node.module or "").partition(".")[2]
            found |= {below} if below else {n.name for n in node.names if n.name in LEVEL}
    return found


def test_every_room_has_a_level() -> None:
    assert set(ROOMS) == set(LEVEL)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_from_their_own_level_or_below(room: str) -> None:
    assert all(LEVEL[other] <= LEVEL[room] for other in imports(TREES[room]))


def test_no_import_goes_in_a_circle() -> None:
    graph = {room: imports(tree) - {room} for room, tree in TREES.items() if room != "__init__"}
    while graph:
        free = {room for room, others in graph.items() if not others & graph.keys()}
        assert free, f"circle among {sorted(graph)}"
        graph = {room: others for room, others in graph.items() if room not in free}


@pytest.mark.parametrize("room", sorted(LEVELS[0]))
def test_the_ground_floor_knows_no_torch(room: str) -> None:
    names = {
        alias.name.partition(".")[0]
        for node in ast.walk(TREES[room])
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").partition(".")[0]
        for node in ast.walk(TREES[room])
        if isinstance(node, ast.ImportFrom)
    }
    assert not names & {"torch", "torchvision", "safetensors"}


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "__main__"])
def test_public_names_are_declared_and_documented(room: str) -> None:
    module = importlib.import_module(f"captioner.{room}" if room != "__init__" else "captioner")
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), name))
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert value.__doc__, name


def functions() -> list[tuple[str, int]]:
    """Return the name and the lines of the body of each function of the package."""
    found = []
    for room, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[bool(ast.get_docstring(node)) :]
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                found.append((f"{room}.{node.name}", lines))
    return found


def test_functions_are_small() -> None:
    lines = sorted(count for _, count in functions())
    assert lines[len(lines) * 9 // 10] <= 25
    assert [name for name, count in functions() if count > 50] == []


def test_scripts_have_one_way_in() -> None:
    for path in (PACKAGE.parent / "scripts").glob("*.py"):
        assert "def main(argv: Sequence[str] | None = None) -> int:" in path.read_text()


def test_importing_the_package_changes_nothing_global() -> None:
    code = (
        "import sys, logging, random; state = random.getstate(); import captioner; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "import torch; before = (torch.get_num_threads(), torch.initial_seed(), "
        "torch.backends.mkldnn.enabled, torch.get_default_dtype()); captioner.Captioner; "
        "assert before == (torch.get_num_threads(), torch.initial_seed(), "
        "torch.backends.mkldnn.enabled, torch.get_default_dtype()); "
        "assert not logging.getLogger().handlers and random.getstate() == state"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
