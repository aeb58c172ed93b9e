"""The flags of the command line. Nothing heavy is imported, so that help is quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, get_args, get_type_hints

from captioner.config import PRECISIONS
from captioner.console import Parser
from captioner.generation.options import SearchOptions, TagOptions, meaning
from captioner.settings import ConfigError
from captioner.version import __version__

__all__ = [
    "Command",
    "add_cluster_arguments",
    "add_description_arguments",
    "flag_of",
    "parse",
    "search_options",
    "tag_options",
]

# The options that take words of captions; the others take tags.
_WORDS = frozenset({"forbidden", "no_ending", "required"})
# Options whose flag has another name than their field: --exclude leaves out photographs.
_FLAGS = {"only": "--only-tags", "exclude": "--exclude-tags"}

_EPILOG = """exit status: 0 every photograph done; 1 some could not be read or found, or a sidecar
or the report not written; 2 wrong usage, before any work; 130 stopped by Ctrl-C"""

_SERVE_EPILOG = """exit status: 0 ended by Ctrl-C or SIGTERM, with what was accepted answered; 1 the
model or a process failed; 2 wrong usage, before any work, also an address that is taken"""
_FIND_EPILOG = """exit status: 0 found some; 1 found none; 2 wrong usage, or no such database"""

Command = Callable[[argparse.Namespace], int]
"""Does what was asked for, and returns the exit status."""


def parse(argv: Sequence[str] | None, **run: Command) -> argparse.Namespace:
    """Parse the command line, or exit with status 2.

    Args:
        argv: The arguments; ``None`` takes those of this process. Without a command they are
            photographs to caption.
        run: What each command does, by name. ``run`` of the result is that of the command that was
            chosen.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parser(run)
    first = arguments[0] if arguments else ""
    if first and first not in {*run, "-h", "--help", "--version"}:
        if not first.startswith("-") and not os.path.lexists(first):
            parser.error(f"{first!r} is no command ({', '.join(run)}), and no such file or folder")
        arguments = ["caption", *arguments]
    if first and arguments[0] in commands and "--" not in arguments:
        # Paths may stand before and after an option; what follows "--" it would take for options.
        return commands[arguments[0]].parse_intermixed_args(arguments[1:])
    return parser.parse_args(arguments)


def _parser(run: Mapping[str, Command]) -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="captioner",
        description="Say what is on photographs, in words and in tags.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"captioner {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    commands: dict[str, Parser] = {}

    def add(name: str, help: str, epilog: str = _EPILOG) -> Parser:
        command = subparsers.add_parser(
            name,
            help=help,
            description=f"{help.capitalize()}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=run[name])
        commands[name] = command
        return command

    captions = add("caption", "caption photographs (the command where none is named)")
    _add_run_arguments(captions)
    add_description_arguments(captions)
    tags = add("tag", "tag photographs")
    _add_run_arguments(tags)
    _add_option_arguments(tags, "tags", TagOptions)
    _add_find_arguments(add("find", "find photographs by what was described", _FIND_EPILOG))
    _add_model_arguments(add("info", "show the model in use, and the versions of what runs it"))
    _add_serve_arguments(
        add("serve", "show a page to drop photographs on, and answer programs", _SERVE_EPILOG)
    )
    return parser, commands


def add_description_arguments(parser: Parser) -> None:
    """Add the flags that say which captions and tags are written."""
    parser.add_argument(
        "--tags", action=argparse.BooleanOptionalAction, default=True, help="tags in the same pass"
    )
    parser.add_argument(
        "--min-confidence",
        type=_share,
        default=0.0,
        metavar="P",
        help="leave out a caption that is less probably right than this (0 to 1); its record has "
        "null in its place, and its tags (default: 0)",
    )
    _add_option_arguments(parser, "search", SearchOptions)
    _add_option_arguments(parser, "tags", TagOptions)


class _Once(argparse.Action):
    """An option whose second value would take the place of the first in silence."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        if before not in {None, values}:
            raise argparse.ArgumentError(self, f"{before!r} and {values!r}: a run has only one")
        setattr(namespace, self.dest, values)


def _add_model_arguments(parser: Parser) -> None:
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
        choices=PRECISIONS,
        help="auto is bfloat16 or else int8 where the processor has instructions for it",
    )


def _add_run_arguments(parser: Parser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="files, folders (searched recursively), or - for a list of paths on stdin",
    )
    parser.add_argument(
        "-0",
        "--null",
        action="store_true",
        help="a list of paths on stdin that ends each with NUL (find -print0)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="pass over files and folders of such a name, such as '*.png', or with a slash of such "
        "a path; may be given more than once",
    )
    _add_model_arguments(parser)
    _add_output_arguments(parser)
    _add_reading_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes")


def _add_reading_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--workers",
        type=_positive,
        default=max(2, os.cpu_count() or 1),
        metavar="N",
        help="processes that read photographs",
    )
    _add_pace_arguments(parser)


def _add_pace_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="photographs a step"
    )
    parser.add_argument(
        "--decode-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="longest time to read one photograph (default: 30)",
    )


def add_cluster_arguments(parser: Parser) -> None:
    """Add the flags of a run on a Ray cluster."""
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="photographs and folders: local, s3://, gs://, ..."
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT.jsonl|OUT.parquet",
        help="the folder of the records, local or s3://, gs://, ...; the same command continues it",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew")
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="a Ray cluster; auto is the one of this machine, local a new one (default: what "
        "RAY_ADDRESS says, or local)",
    )
    parser.add_argument(
        "--concurrency", type=_positive, default=1, metavar="N", help="workers, a model each"
    )
    parser.add_argument(
        "--num-cpus", type=_positive, default=1, metavar="N", help="of each worker (default: 1)"
    )
    parser.add_argument(
        "--num-gpus", type=_amount, default=0.0, metavar="X", help="of each worker (default: 0)"
    )
    parser.add_argument(
        "--shard-size",
        type=_positive,
        default=256,
        metavar="N",
        help="photographs of each file of the output; what is lost with a worker (default: 256)",
    )
    _add_pace_arguments(parser)
    _add_model_arguments(parser)
    add_description_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes")


def _add_serve_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen on; another than this machine's own needs a token and "
        "something in front (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=8000,
        metavar="N",
        help="0 takes one that is free (default: 8000)",
    )
    parser.add_argument(
        "--token",
        type=_token,
        default=os.environ.get("CAPTIONER_TOKEN"),
        metavar="TOKEN",
        help="answer only requests that bring it (Authorization: Bearer TOKEN); others on this "
        "machine cannot see it if it is in the environment (CAPTIONER_TOKEN) instead",
    )
    parser.add_argument(
        "--queue",
        type=_positive,
        default=128,
        metavar="N",
        help="photographs received or described at a time; with more, the answer is 503 "
        "(default: 128)",
    )
    parser.add_argument(
        "--max-upload",
        type=_positive,
        default=50,
        metavar="MB",
        help="the largest request, in millions of bytes (default: 50)",
    )
    _add_model_arguments(parser)
    _add_reading_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no notes")


def _add_find_arguments(parser: Parser) -> None:
    parser.add_argument("database", metavar="FILE.sqlite", help="the --output of a run")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORDS",
        help="words that the captions or tags have, all of them; also dogs for dog",
    )
    parser.add_argument(
        "--tag",
        action="append",
        default=[],
        metavar="NAME",
        help="a tag that the photograph has; may be given more than once, for all of them",
    )
    parser.add_argument(
        "--min-score",
        type=_share,
        default=0.0,
        metavar="X",
        help="lowest score of each --tag, from 0 to 1 (default: 0)",
    )
    parser.add_argument(
        "-0", "--null", action="store_true", help="end each path with NUL (xargs -0)"
    )


def _add_output_arguments(parser: Parser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        action=_Once,
        metavar="FILE",
        help="where records go: FILE.jsonl, FILE.csv (UTF-8 with a byte order mark, for "
        "spreadsheets), FILE.json for COCO results, FILE.sqlite for captioner find, or - for "
        "JSON lines on stdout (default: stdout); FILE.journal is kept beside it, to continue a run",
    )
    parser.add_argument(
        "--sidecar",
        action="append",
        default=[],
        choices=("txt", "caption", "xmp"),
        help="write a file of this kind beside each photograph: the caption for trainers (a.txt, "
        "a.caption), or XMP for photo managers (a.jpg.xmp), merged into what is there; may be "
        "given more than once",
    )
    parser.add_argument(
        "--full-names",
        action="store_true",
        help="name sidecars a.jpg.txt, not a.txt, for photographs that share a stem",
    )
    parser.add_argument(
        "--report",
        action=_Once,
        metavar="FILE.html",
        help="write a page to look through the results",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew, and replace files that exist; of sidecars, only what captioner wrote",
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="try again what could not be read before"
    )
    parser.add_argument(
        "--retry-changed",
        action="store_true",
        help="describe again the photographs whose size or time has changed since",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="drop the records of photographs that are no longer there",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 86_400.0:
        raise argparse.ArgumentTypeError(f"expected seconds from 0.1 to 86400, not {text!r}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, not {text!r}")
    return value


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0.0 <= value <= 1.0 or (value.is_integer() and value <= 16.0)):
        raise argparse.ArgumentTypeError(f"expected a share of one, or 1 to 16, not {text!r}")
    return value


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 4096):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 4096, not {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, not {text!r}")
    return int(text)


def _token(text: str) -> str:
    if not (text.isascii() and text.isprintable() and text.strip() == text != ""):
        raise argparse.ArgumentTypeError("expected printable ASCII without space around it")
    return text


def search_options(args: argparse.Namespace) -> SearchOptions:
    """Return the options of the search that the flags say; raises ``ConfigError``."""
    return SearchOptions(**_option_values(args, SearchOptions))


def tag_options(args: argparse.Namespace) -> TagOptions:
    """Return the options of tags that the flags say; raises ``ConfigError``.

    The value of a flag that takes tags may be a file with one a line.
    """
    values = _option_values(args, TagOptions)
    for name in ("only", "exclude"):
        values[name] = [tag for value in values[name] for tag in _listed_tags(value)]
    return TagOptions(**values)


def _listed_tags(value: str) -> list[str]:
    """Return the tags that a file names, one a line, as in a list of tags; or the value itself."""
    if not os.path.isfile(value):
        return [value]
    try:
        with open(value, encoding="utf-8-sig") as file:
            names = [line.split("\t")[0].strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{value} cannot be read as a list of tags: {error}") from error
    return [name for name in names if name and not name.startswith("#")]


def _option_values(
    args: argparse.Namespace, options: type[SearchOptions] | type[TagOptions]
) -> dict[str, Any]:
    """Return what the flags of some options were set to, by the names of the options' fields."""
    return {f.name: getattr(args, flag_of(f)[2:].replace("-", "_")) for f in fields(options)}


def flag_of(option: Field[Any]) -> str:
    """Return the flag of a field of ``SearchOptions`` or ``TagOptions``."""
    return _FLAGS.get(option.name) or f"--{option.name.replace('_', '-')}"


def _add_option_arguments(
    parser: Parser, title: str, options: type[SearchOptions] | type[TagOptions]
) -> None:
    hints = get_type_hints(options)
    group = parser.add_argument_group(title)
    for option in fields(options):
        choices = get_args(hints[option.name])
        group.add_argument(flag_of(option), **_option_argument(option, choices))


def _option_argument(option: Field[Any], choices: tuple[Any, ...]) -> dict[str, Any]:
    default, help = option.default, meaning(option)
    if default is None:
        return {"type": float, "default": None, "metavar": "X", "help": help}
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction, "default": default, "help": help}
    if isinstance(default, tuple):
        tag = option.name not in _WORDS
        help = f"{help}{', or a file with one a line' if tag else ''}; may be given more than once"
        metavar = "TAG" if tag else "WORD"
        return {"action": "append", "default": [], "metavar": metavar, "help": help}
    if isinstance(default, str):
        return {"choices": choices, "default": default, "help": f"{help} (default: {default})"}
    return {
        "type": type(default),
        "default": default,
        "metavar": "N" if isinstance(default, int) else "X",
        "help": f"{help} (default: {default})",
    }
