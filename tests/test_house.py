"""The house: the order of the packages, light imports, public names, documentation, size."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# From the top down. Imports go to a line further down, never to another name on the same line;
# within a package they go anywhere but in a circle.
ORDER = (
    ("__main__",),
    ("__init__", "cli"),
    ("cluster", "serve"),
    ("flags",),
    ("folder", "training"),
    ("evaluation", "export", "inference", "onnx_runtime"),
    ("generation",),
    ("model",),
    ("data",),
    ("pages",),
    ("metrics", "photos"),
    ("config", "console"),
    ("files", "held", "memory", "settings", "version"),
)
LINE = {name: line for line, names in enumerate(ORDER) for name in names}

# `captioner --help` imports these: nothing that takes long may come along.
QUICK = ("captioner", "captioner.cli", "captioner.flags", "captioner.generation.options",
         "captioner.config")  # fmt: skip
# Processes that read photographs start with these, and so does a run before its first tensor.
WITHOUT_TORCH = ("photos", "metrics", "folder", "pages", "files", "held", "memory", "data",
                 "generation.description", "onnx_runtime", "serve.reading", "training.digests",
                 "training.stopper")  # fmt: skip
WITH_TORCH = ("captioner.data.dataset",)


def module_name(path: Path) -> str:
    """Return the dotted name of a module's file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 2 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "captioner").rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the package's modules that a tree imports, wherever it does so, and the names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("captioner."):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, "") if inner in MODULES else (str(node.module), alias.name)


def room(module: str) -> str:
    """Return what a module's line in ORDER calls it: its package, or itself where it has none."""
    return module.split(".")[1] if "." in module else "__init__"


def test_every_module_has_a_place_in_the_order() -> None:
    rooms = {room(module) for module in MODULES}
    lost, gone = sorted(rooms - LINE.keys()), sorted(LINE.keys() - rooms)
    assert not lost, f"give {lost} a line in ORDER, below all that import from there"
    assert not gone, f"take {gone} out of ORDER: there is no such module or package"


def test_imports_go_down_the_order() -> None:
    wrong = [
        f"{module} imports {other}: {room(other)} is not below {room(module)}"
        for module, tree in TREES.items()
        for other in sorted({other for other, _ in imports(tree)})
        if room(other) != room(module) and LINE[room(other)] <= LINE[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_goes_in_a_circle() -> None:
    graph = {module: {other for other, _ in imports(tree)} for module, tree in TREES.items()}
    while free := {module for module, others in graph.items() if not others & graph.keys()}:
        graph = {module: others for module, others in graph.items() if module not in free}
    assert not graph, f"a circle among, or above, {sorted(graph)}"


def test_private_names_stay_in_their_module() -> None:
    wrong = [
        f"{module} imports {name} of {other}"
        for module, tree in TREES.items()
        for other, name in imports(tree)
        if name.startswith("_") and name != "__version__"
    ]
    assert not wrong, "\n".join(wrong)


def test_light_modules_import_nothing_heavy() -> None:
    light = [
        module
        for module in MODULES
        if f"{module}.".startswith(tuple(f"captioner.{name}." for name in WITHOUT_TORCH))
        and module not in WITH_TORCH
    ]
    code = (
        "import importlib, sys\n"
        f"for names, heavy in (({QUICK}, ['torch', 'numpy', 'PIL', 'jinja2']),"
        f" ({light}, ['torch', 'torchvision', 'safetensors'])):\n"
        "    for name in names:\n"
        "        importlib.import_module(name)\n"
        "        came = [other for other in heavy if other in sys.modules]\n"
        "        if came: sys.exit(f'{name} imports {came}, itself or by what it imports')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_declared_and_documented() -> None:
    wrong = []
    for module, tree in TREES.items():
        if module == "captioner.__main__" or len(tree.body) == 1:  # only a docstring
            continue
        found = importlib.import_module(module.removesuffix(".__init__"))
        names = getattr(found, "__all__", [])
        if not names or names != sorted(names, key=lambda name: (not name.isupper(), name)):
            wrong.append(f"{module}: __all__ is missing, or not sorted with constants first")
        for value in (getattr(found, name) for name in names):
            if (inspect.isclass(value) or inspect.isroutine(value)) and not value.__doc__:
                wrong.append(f"{module}.{value.__name__} has no docstring")
    assert not wrong, "\n".join(wrong)


def functions() -> Iterator[tuple[int, str]]:
    """Yield the lines of the body of each function of the package, and its name."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[bool(ast.get_docstring(node)) :]
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                yield lines, f"{module}.{node.name}"


def test_functions_are_small() -> None:
    longest = sorted(functions(), reverse=True)
    assert longest[0][0] <= 50, f"over 50 lines of body: {longest[:5]}"
    tenth = [(lines, name) for lines, name in longest[: len(longest) // 10 + 1] if lines > 25]
    assert len(tenth) <= len(longest) // 10, f"too many over 25 lines of body: {tenth}"


def test_scripts_have_one_way_in() -> None:
    entry = "def main(argv: Sequence[str] | None = None) -> int:"
    without = [p.name for p in (ROOT / "scripts").glob("*.py") if entry not in p.read_text()]
    assert not without, f"{without} have no `{entry}`"


def test_importing_the_package_changes_nothing_global() -> None:
    code = (
        "import sys, logging, random; state = random.getstate(); import captioner; "
        "import torch; before = (torch.get_num_threads(), torch.initial_seed(), "
        "torch.backends.mkldnn.enabled, torch.get_default_dtype()); captioner.Captioner; "
        "assert before == (torch.get_num_threads(), torch.initial_seed(), "
        "torch.backends.mkldnn.enabled, torch.get_default_dtype()); "
        "assert not logging.getLogger().handlers and random.getstate() == state"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
