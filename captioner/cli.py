"""The command line. Imports nothing heavy until a command needs it, so that help is quick."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from captioner import __version__
from captioner.config import ConfigError, SearchOptions, meaning

if TYPE_CHECKING:
    from captioner.folder import Found, Writer
    from captioner.inference import Captioner

__all__ = ["main"]

_Parser = argparse.ArgumentParser
_EPILOG = """exit status: 0 every photograph done; 1 some could not be read or found;
2 wrong usage, before any work; 130 stopped by Ctrl-C"""


class _UsageError(Exception):
    """What makes the command end with status 2 before any work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (_UsageError, ConfigError) as error:
        print(f"captioner: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"captioner: cannot write any further: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("captioner: stopped; the records written so far are whole", file=sys.stderr)
        return 130


def _parser() -> _Parser:
    parser = argparse.ArgumentParser(
        prog="captioner",
        description="Say what is on photographs, in words and in tags.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"captioner {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str) -> _Parser:
        command = commands.add_parser(
            name,
            help=help,
            description=f"{help.capitalize()}.",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        return command

    caption = add("caption", _caption, "caption photographs")
    _add_run_arguments(caption)
    caption.add_argument(
        "--tags", action=argparse.BooleanOptionalAction, default=True, help="tags in the same pass"
    )
    _add_search_arguments(caption)
    _add_run_arguments(add("tag", _tag, "tag photographs"))
    _add_model_arguments(add("info", _info, "show the model in use"))
    return parser


def _add_model_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "--model",
        action="append",
        metavar="FILE",
        help="a checkpoint (default: the embedded model); several are an ensemble",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="auto is bfloat16 where the processor gains from it",
    )


def _add_run_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="files, folders (searched recursively), or - for a list of paths on stdin",
    )
    _add_model_arguments(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where records go: FILE.jsonl, or FILE.json for COCO results (default: stdout)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output that exists already"
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="photographs a step"
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        default=max(2, os.cpu_count() or 1),
        metavar="N",
        help="threads that read photographs",
    )


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 4096):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 4096, not {text!r}")
    return int(text)


def _add_search_arguments(parser: _Parser) -> None:
    hints = get_type_hints(SearchOptions)
    group = parser.add_argument_group("search")
    for option in fields(SearchOptions):
        flag = f"--{option.name.replace('_', '-')}"
        group.add_argument(flag, **_search_argument(option, get_args(hints[option.name])))


def _search_argument(option: Field[Any], choices: tuple[Any, ...]) -> dict[str, Any]:
    default, help = option.default, meaning(option)
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction, "default": default, "help": help}
    if isinstance(default, tuple):
        help = f"{help}; may be given more than once"
        return {"action": "append", "default": [], "metavar": "WORD", "help": help}
    if isinstance(default, str):
        return {"choices": choices, "default": default, "help": f"{help} (default: {default})"}
    return {
        "type": type(default),
        "default": default,
        "metavar": "N" if isinstance(default, int) else "X",
        "help": f"{help} (default: {default})",
    }


def _caption(args: argparse.Namespace) -> int:
    options = SearchOptions(**{f.name: getattr(args, f.name) for f in fields(SearchOptions)})
    return _run(args, options=options, captions=True, tags=args.tags)


def _tag(args: argparse.Namespace) -> int:
    if args.output and args.output.lower().endswith(".json"):
        raise _UsageError(f"{args.output}: COCO results hold captions, not tags; use .jsonl")
    return _run(args, captions=False, tags=True)


def _run(args: argparse.Namespace, **what: Any) -> int:
    from tqdm import tqdm

    from captioner.folder import describe_folder

    photographs = _find(args.paths)
    _check_output(args, photographs)
    if not photographs:
        print(f"captioner: no photographs in {', '.join(args.paths)}", file=sys.stderr)
        return 0
    captioner = _load(args)
    if options := what.get("options"):
        captioner.check(options)
    # On a terminal the records themselves show how far the run is.
    hidden = True if args.output is None and sys.stdout.isatty() else None
    errors = 0
    with _writer(args) as writer, tqdm(total=len(photographs), disable=hidden) as bar:
        records = describe_folder(
            captioner,
            photographs,
            batch_size=args.batch_size,
            workers=args.workers,
            progress=bar.update,
            **what,
        )
        for record in records:
            writer.write(record)
            errors += "error" in record
    if errors:
        print(f"captioner: {errors} of {len(photographs)} could not be read", file=sys.stderr)
    return 1 if errors else 0


def _find(given: Sequence[str]) -> list[Found]:
    from captioner.folder import find_photographs

    paths: list[str] = []
    for path in given:
        if path == "-":
            if sys.stdin is None:
                raise _UsageError("- needs a list of paths on standard input")
            lines = os.fsdecode(sys.stdin.buffer.read()).split("\n")
            paths += [line for line in lines if line]
        else:
            paths.append(path)
    missing = [path for path in paths if not os.path.exists(path)]
    if paths and len(missing) == len(paths):
        raise _UsageError(f"no such file or folder: {', '.join(map(repr, missing[:5]))}")
    return list(find_photographs(paths))


def _check_output(args: argparse.Namespace, photographs: Sequence[Found]) -> None:
    if args.output is None:
        return
    ending = os.path.splitext(args.output)[1].lower()
    if ending not in {".jsonl", ".json"}:
        raise _UsageError(f"--output {args.output}: the name must end in .jsonl or .json")
    if os.path.lexists(args.output) and not args.overwrite:
        raise _UsageError(f"--output {args.output} exists; --overwrite replaces it")
    folder = os.path.dirname(args.output) or "."
    if not os.path.isdir(folder):
        raise _UsageError(f"--output {args.output}: there is no folder {folder}")
    if ending == ".json":
        _check_image_ids(photographs)


def _check_image_ids(photographs: Sequence[Found]) -> None:
    from captioner.folder import coco_image_id

    seen: dict[int, str] = {}
    for path, _ in photographs:
        image_id = coco_image_id(path)
        if image_id is None:
            raise _UsageError(f"{path}: its name ends in no number to be a COCO image id")
        if image_id in seen:
            raise _UsageError(f"{path} and {seen[image_id]} have the same COCO image id")
        seen[image_id] = path


@contextmanager
def _writer(args: argparse.Namespace) -> Iterator[Writer]:
    from captioner.folder import CocoWriter, JsonLinesWriter, TerminalWriter

    if args.output is not None:
        try:
            file = open(args.output, "wb")  # noqa: SIM115
        except OSError as error:
            raise _UsageError(f"--output {args.output}: {error.strerror}") from error
        with file:
            coco = args.output.lower().endswith(".json")
            yield CocoWriter(file) if coco else JsonLinesWriter(file)
    elif sys.stdout.isatty():
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        yield TerminalWriter(sys.stdout)
    else:
        yield JsonLinesWriter(sys.stdout.buffer)


def _load(args: argparse.Namespace) -> Captioner:
    from captioner.checkpoint import CheckpointError
    from captioner.inference import Captioner

    try:
        return Captioner.load(args.model, device=args.device, precision=args.precision)
    except CheckpointError as error:
        raise _UsageError(str(error)) from error


def _info(args: argparse.Namespace) -> int:
    from captioner.checkpoint import default_path
    from captioner.folder import printable
    from captioner.vocabulary import SPECIAL

    captioner = _load(args)
    checkpoint, config = captioner.checkpoint, captioner.checkpoint.config
    size = sum(os.path.getsize(path) for path in args.model or [default_path()])
    parameters = sum(p.numel() for c in captioner.checkpoints for p in c.model.parameters())
    rows = {
        "model": ", ".join(args.model or ["the one in the package"]),
        "size": f"{size:,} bytes, {parameters:,} parameters",
        "encoder": config.encoder.name,
        "pixels": f"{config.preprocessing.size} x {config.preprocessing.size}, "
        f"{config.preprocessing.fit}",
        "words": f"{len(checkpoint.vocabulary) - len(SPECIAL):,}",
        "tags": f"{len(checkpoint.tags.vocabulary) - len(SPECIAL):,}",
        "device": str(captioner.device),
        "precision": str(captioner.precision).removeprefix("torch."),
        **checkpoint.provenance,
    }
    for key, value in rows.items():
        print(printable(f"{key:<13} {_shown(value)}"))
    return 0


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)
