"""The command line. Imports nothing heavy until a command needs it, so that help is quick."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import Field, asdict, fields
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from captioner.generation.options import SearchOptions, meaning
from captioner.settings import ConfigError
from captioner.version import __version__

if TYPE_CHECKING:
    from tqdm import tqdm

    from captioner.folder.journal import Journal
    from captioner.folder.outputs import Output
    from captioner.folder.sidecars import Sidecars
    from captioner.inference import Captioner
    from captioner.photos.workers import Found

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
        with suppress(OSError):  # Python would complain again when it flushes stdout at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"captioner: cannot write any further: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"captioner: stopped; {_how_to_continue(args)}", file=sys.stderr)
        return 130


def _how_to_continue(args: argparse.Namespace) -> str:
    if not (_journal_path(args) or getattr(args, "sidecar", None)):
        return "with --output FILE a run can be continued"
    without = " without --overwrite" if args.overwrite else ""
    return f"the same command{without} continues where it was"


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
    _add_model_arguments(parser)
    _add_output_arguments(parser)
    parser.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="photographs a step"
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        default=max(2, os.cpu_count() or 1),
        metavar="N",
        help="processes that read photographs",
    )
    parser.add_argument(
        "--decode-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="longest time to read one photograph (default: 30)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes")


def _add_output_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where records go: FILE.jsonl, FILE.csv, FILE.json for COCO results, or - for JSON "
        "lines on stdout (default: stdout); FILE.journal is kept beside it, to continue a run",
    )
    parser.add_argument(
        "--sidecar",
        choices=("txt", "caption", "xmp"),
        help="write a file of this kind beside each photograph",
    )
    parser.add_argument(
        "--report", metavar="FILE.html", help="write a page to look through the results"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew, and replace files that exist"
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="try again what could not be read before"
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 86_400.0:
        raise argparse.ArgumentTypeError(f"expected seconds from 0.1 to 86400, not {text!r}")
    return value


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
    from captioner.photos.workers import DecodingError

    photographs = _find(args)
    _check_output(args, photographs)
    if not photographs:
        _note(args, f"no photographs in {', '.join(args.paths) or 'the list'}")
        return 0
    captioner = _load(args)
    if options := what.get("options"):
        captioner.check(options)
    with ExitStack() as stack:
        try:
            journal = stack.enter_context(_journal(args, captioner, what))
            output = _output(args)
            output.start(journal.records() if journal else ())
        except OSError as error:
            where = error.filename or args.output
            raise _UsageError(f"cannot write {where}: {error.strerror}") from error
        engine = {
            "batch_size": args.batch_size,
            "workers": args.workers,
            "decode_timeout": args.decode_timeout,
            "attention": bool(args.report) and what["captions"],
            **what,
        }
        try:
            errors = _describe(args, captioner, photographs, journal, output, engine)
            if args.report and journal is not None:
                _report(args, captioner, journal)
        except DecodingError as error:
            raise _UsageError(str(error)) from error
    if errors:
        _note(args, f"{errors} of {len(photographs)} could not be read")
    return 1 if errors else 0


def _describe(
    args: argparse.Namespace,
    captioner: Captioner,
    photographs: Sequence[Found],
    journal: Journal | None,
    output: Output,
    engine: dict[str, Any],
) -> int:
    """Do what is left to do, and return how many photographs have an error record."""
    from captioner.folder import describe_folder
    from captioner.folder.run import Part, catch_up, keep, plan

    sidecars = _sidecars(args)
    if journal is not None:
        if sidecars is not None:
            catch_up(journal, sidecars)
        parts = plan(photographs, journal, args.retry_errors)
    else:
        parts = [Part(photographs, _with_sidecars(args, photographs, sidecars))]
    errors = 0
    again = sum(1 for part in parts[1:] for _ in part.photographs)
    done = sum(found.path in parts[0].done for found in photographs) - again
    with _progress(args, len(photographs), done) as bar:
        try:
            for part in parts:
                records = describe_folder(
                    captioner, part.photographs, done=part.done, progress=bar.update, **engine
                )
                for record in keep(records, output, journal, sidecars):
                    errors += "error" in record
                    bar.set_postfix(errors=errors, refresh=False)
        finally:
            output.finish(journal.records() if journal else (), bool(journal and journal.reordered))
    if sidecars is not None and sidecars.left_alone:
        _note(args, f"{sidecars.left_alone} sidecars hold something else and were left alone")
    if journal is not None:
        return sum(found.path in journal.errors for found in photographs)
    return errors


def _report(args: argparse.Namespace, captioner: Captioner, journal: Journal) -> None:
    from captioner.folder.report import write_report

    write_report(
        args.report,
        journal.records(),
        len(journal.done),
        len(journal.errors),
        title=", ".join(args.paths) or "captioner",
        fit=captioner.checkpoint.config.preprocessing.fit,
        workers=args.workers,
        decode_timeout=args.decode_timeout,
    )


def _progress(args: argparse.Namespace, total: int, done: int) -> tqdm[Any]:
    from tqdm import tqdm

    # On a terminal the records themselves show how far the run is.
    shown = not args.quiet and (_has_files(args) or not sys.stdout.isatty())
    bar: tqdm[Any] = tqdm(
        total=total, initial=done, unit=" photographs", disable=None if shown else True
    )
    return bar


def _note(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"captioner: {text}", file=sys.stderr)


def _find(args: argparse.Namespace) -> list[Found]:
    from captioner.folder import find_photographs

    if not args.paths and not args.null:
        raise _UsageError("the following arguments are required: PATH")
    paths: list[str] = []
    for path in [*args.paths, *(["-"] if args.null and "-" not in args.paths else [])]:
        if path == "-":
            paths += _listed("\0" if args.null else "\n")
        else:
            paths.append(path)
    missing = [path for path in paths if not os.path.exists(path)]
    if paths and len(missing) == len(paths):
        raise _UsageError(f"no such file or folder: {', '.join(map(repr, missing[:5]))}")
    return list({found.path: found for found in find_photographs(paths)}.values())


def _listed(separator: str) -> list[str]:
    from captioner.files import listed_paths

    if sys.stdin is None:
        raise _UsageError("- needs a list of paths on standard input")
    try:
        return listed_paths(sys.stdin.buffer.read(), separator)
    except ValueError as error:
        raise _UsageError(f"the list of paths on standard input: {error}") from None


def _has_files(args: argparse.Namespace) -> bool:
    """Whether records go elsewhere than to stdout."""
    return args.output != "-" and bool(args.output or args.sidecar or args.report)


def _journal_path(args: argparse.Namespace) -> str | None:
    output = getattr(args, "output", None)
    path = output if output not in {None, "-"} else getattr(args, "report", None)
    return f"{path}.journal" if path else None


def _check_output(args: argparse.Namespace, photographs: Sequence[Found]) -> None:
    from captioner.folder.outputs import FORMS

    if args.retry_errors and _journal_path(args) is None:
        raise _UsageError("--retry-errors needs --output FILE, where the errors are")
    if args.output not in {None, "-"}:
        _check_file("--output", args.output, FORMS)
        if os.path.lexists(args.output) and not args.overwrite:
            _check_existing(args.output, f"{args.output}.journal")
        if args.output.lower().endswith(".json"):
            _check_image_ids(photographs)
    if args.report:
        _check_file("--report", args.report, (".html", ".htm"))
        _check_report(args)
    if args.sidecar:
        _check_sidecars(photographs, args.sidecar)


def _check_file(option: str, path: str, endings: Sequence[str]) -> None:
    if not path.lower().endswith(tuple(endings)):
        raise _UsageError(f"{option} {path}: the name must end in {', '.join(endings)}")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise _UsageError(f"{option} {path}: there is no folder {folder}")


def _check_report(args: argparse.Namespace) -> None:
    from captioner.files import check_replaceable
    from captioner.folder.report import is_report

    if os.path.lexists(args.report) and not args.overwrite and not is_report(args.report):
        raise _UsageError(f"--report {args.report} is something else; --overwrite replaces it")
    try:
        check_replaceable(args.report)
    except OSError as error:
        raise _UsageError(f"cannot write {args.report}: {error.strerror}") from error


def _check_existing(output: str, journal: str) -> None:
    if not os.path.isfile(output):
        raise _UsageError(f"--output {output} is not a plain file")
    if not os.path.exists(journal):
        raise _UsageError(
            f"--output {output} exists, but not {journal}, without which it cannot be continued; "
            "--overwrite replaces it"
        )


def _check_image_ids(photographs: Sequence[Found]) -> None:
    from captioner.folder.outputs import coco_image_id

    def image_id(path: str) -> int:
        found = coco_image_id(path)
        if found is None:
            raise _UsageError(f"{path}: its name ends in no number to be a COCO image id")
        return found

    _check_different(photographs, image_id, "COCO image id")


def _check_sidecars(photographs: Sequence[Found], kind: str) -> None:
    from captioner.folder.sidecars import sidecar_path

    _check_different(photographs, lambda path: sidecar_path(path, kind), "sidecar")


def _check_different(photographs: Sequence[Found], of: Callable[[str], object], what: str) -> None:
    seen: dict[object, str] = {}
    for path, _ in photographs:
        value = of(path)
        if value in seen:
            raise _UsageError(f"{path} and {seen[value]} have the same {what}, {value}")
        seen[value] = path


@contextmanager
def _journal(
    args: argparse.Namespace, captioner: Captioner, what: dict[str, Any]
) -> Iterator[Journal | None]:
    from captioner.folder.journal import Journal, JournalError

    path = _journal_path(args)
    if path is None:
        yield None
        return
    try:
        journal = Journal(path, _settings(args, captioner, what), args.overwrite)
    except JournalError as error:
        raise _UsageError(str(error)) from error
    with journal:
        yield journal


def _settings(
    args: argparse.Namespace, captioner: Captioner, what: dict[str, Any]
) -> dict[str, Any]:
    """Return what the records depend on."""
    from captioner.model.checkpoint import default_path

    models = []
    for path in args.model or [default_path()]:
        with open(path, "rb") as file:
            models.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
    return {
        "model": f"the one of SHA-256 {' and '.join(models)}",
        "precision": str(captioner.precision).removeprefix("torch."),
        "captions": what["captions"],
        "tags": what["tags"],
        **(asdict(what["options"]) if "options" in what else {}),
    }


def _output(args: argparse.Namespace) -> Output:
    from captioner.folder.outputs import ErrorStream, JsonLinesStream, TerminalStream, output_file

    if args.output not in {None, "-"}:
        return output_file(args.output)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if _has_files(args):
        return ErrorStream(sys.stderr)
    if args.output is None and sys.stdout.isatty():
        return TerminalStream(sys.stdout)
    return JsonLinesStream(sys.stdout.buffer)


def _sidecars(args: argparse.Namespace) -> Sidecars | None:
    from captioner.folder.sidecars import Sidecars

    return Sidecars(args.sidecar, args.overwrite) if args.sidecar else None


def _with_sidecars(
    args: argparse.Namespace, photographs: Sequence[Found], sidecars: Sidecars | None
) -> set[str]:
    """Return the photographs that are done where sidecars are the only output."""
    if sidecars is None or args.output == "-" or args.overwrite:
        return set()
    return {found.path for found in photographs if sidecars.exists(found.path)}


def _load(args: argparse.Namespace) -> Captioner:
    from captioner.inference import Captioner
    from captioner.memory import keep_freed_memory
    from captioner.model.checkpoint import CheckpointError

    keep_freed_memory()
    try:
        return Captioner.load(args.model, device=args.device, precision=args.precision)
    except CheckpointError as error:
        raise _UsageError(str(error)) from error


def _info(args: argparse.Namespace) -> int:
    from captioner.data.vocabulary import SPECIAL
    from captioner.files import printable
    from captioner.model.checkpoint import default_path

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
