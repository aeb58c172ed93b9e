"""The command line. Imports nothing heavy until a command needs it, so that help is quick."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from captioner.console import complain, shown_notices
from captioner.flags import parse, search_options, tag_options
from captioner.settings import ConfigError

if TYPE_CHECKING:
    from tqdm import tqdm

    from captioner.folder import FolderRun, RunResult
    from captioner.folder.outputs import Output
    from captioner.generation.options import SearchOptions
    from captioner.inference import Captioner
    from captioner.onnx_runtime import OnnxCaptioner

__all__ = ["main"]


class _UsageError(Exception):
    """An error that ends the command with status 2 before any work."""


class _StoppedError(Exception):
    """An error that ends the command with status 1 in the middle of its work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = parse(argv, caption=_caption, tag=_tag, find=_find, info=_info, serve=_serve)
    try:
        with shown_notices("captioner", getattr(args, "quiet", False)):
            return int(args.run(args))
    except (_UsageError, ConfigError) as error:
        complain("captioner", error)
        return 2
    except (_StoppedError, OSError) as error:
        with suppress(OSError):  # Python would complain again when it flushes stdout at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            complain("captioner", error)
        return 1
    except KeyboardInterrupt:
        complain("captioner", f"stopped; {_how_to_continue(args)}")
        return 130


def _how_to_continue(args: argparse.Namespace) -> str:
    if "output" not in args:
        return "nothing was written"
    if not (args.output not in {None, "-"} or args.sidecar or args.report):
        return "with --output FILE a run can be continued"
    without = " without --overwrite" if args.overwrite else ""
    return f"the same command{without} continues where it was"


def _caption(args: argparse.Namespace) -> int:
    return _run(args, search_options(args), args.tags)


def _tag(args: argparse.Namespace) -> int:
    if args.output and args.output.lower().endswith(".json"):
        raise _UsageError(f"{args.output}: COCO results hold captions, not tags; use .jsonl")
    return _run(args, options=None, tags=True)


def _run(args: argparse.Namespace, options: SearchOptions | None, tags: bool) -> int:
    from captioner.folder import FolderRun, RunError, WriteError
    from captioner.photos.workers import DecodingError

    progress = _Progress(args)
    run = FolderRun(
        output=_output(args),
        sidecar=args.sidecar,
        report=args.report,
        overwrite=args.overwrite,
        retry_errors=args.retry_errors,
        retry_changed=args.retry_changed,
        prune=args.prune,
        protect=args.model or (),
        captions=options is not None,
        tags=tags,
        min_confidence=getattr(args, "min_confidence", 0.0),
        batch_size=args.batch_size,
        workers=args.workers,
        decode_timeout=args.decode_timeout,
        full_names=args.full_names,
        exclude=args.exclude,
        progress=progress,
        note=partial(progress.note, args),
    )
    paths = _paths(args)
    try:
        result = run.run(partial(_load, args), paths, options, tag_options(args))
    except RunError as error:
        raise _UsageError(str(error)) from error
    except WriteError as error:
        raise _StoppedError(f"cannot write any further: {error}") from error
    except DecodingError as error:
        raise _StoppedError(str(error)) from error
    finally:
        progress.close()
    _summarize(args, run, result)
    return 1 if result.errors or result.sidecar_errors or result.report_error else 0


def _summarize(args: argparse.Namespace, run: FolderRun, result: RunResult) -> None:
    """Tell a person what a run came to."""
    if not result.total:
        _note(args, f"no photographs in {', '.join(args.paths) or 'the list'}")
    if result.torn:
        _note(args, "the last line of the journal was cut off; what it held was done again")
    counts = {
        "photographs changed since they were described; --retry-changed describes them again": (
            result.changed
        ),
        "records are of photographs that are gone; --prune drops them": result.gone,
        "records of photographs that are gone were dropped": result.pruned,
        f"of {result.total} could not be read": result.errors,
    }
    for text, count in counts.items():
        if count:
            _note(args, f"{count} {text}")
    if result.total and (written := _written(run, result)):
        before = f"{result.skipped} done before, " if result.skipped else ""
        _note(args, f"{before}{result.described} described, in {written}")


def _written(run: FolderRun, result: RunResult) -> str:
    """Return the files of a run that have what was described."""
    output = [run.output] if isinstance(run.output, str) else []
    report = [str(run.report)] if run.report and not result.report_error else []
    kinds = " and ".join(f".{kind}" for kind in run.kinds)
    there = kinds and result.skipped + result.described > result.sidecar_errors
    beside = [f"{kinds} beside the photographs"] if there else []
    return ", ".join([*output, *report, *beside])


class _Progress:
    """A bar that shows how far a run is, from when it is first told."""

    def __init__(self, args: argparse.Namespace) -> None:
        # On a terminal the records themselves show how far the run is.
        self._hidden = args.quiet or not (_has_files(args) or not sys.stdout.isatty())
        self._bar: tqdm[Any] | None = None

    def __call__(self, result: RunResult) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=result.total,
                initial=result.skipped,
                unit=" photographs",
                disable=True if self._hidden else None,
            )
        self._bar.set_postfix(errors=result.errors, refresh=False)
        self._bar.update(result.done - self._bar.n)

    def note(self, args: argparse.Namespace, text: str) -> None:
        """Tell a person something, below the bar."""
        self.close()
        _note(args, text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _note(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        complain("captioner", text)


def _paths(args: argparse.Namespace) -> list[str]:
    """Return the paths of the command and of the list on standard input."""
    from captioner.photos.formats import URL_HINT, is_url

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
        hint = f"; {URL_HINT}" if any(map(is_url, missing)) else ""
        raise _UsageError(f"no such file or folder: {', '.join(map(repr, missing[:5]))}{hint}")
    return paths


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


def _output(args: argparse.Namespace) -> str | Output:
    """Return where records go: a file, or a stream; a run that has only other files says errors."""
    from captioner.folder.outputs import ErrorStream, JsonLinesStream, TerminalStream

    if args.output not in {None, "-"}:
        return str(args.output)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if _has_files(args):
        return ErrorStream(sys.stderr)
    if args.output is None and sys.stdout.isatty():
        return TerminalStream(sys.stdout)
    return JsonLinesStream(sys.stdout.buffer)


def _load(args: argparse.Namespace) -> Captioner | OnnxCaptioner:
    if any(path.lower().endswith(".onnx") for path in args.model or ()):
        return _load_onnx(args)
    from captioner.inference import Captioner
    from captioner.memory import keep_freed_memory
    from captioner.model.checkpoint import CheckpointError

    keep_freed_memory()
    try:
        return Captioner.load(args.model, device=args.device, precision=args.precision)
    except CheckpointError as error:
        raise _UsageError(str(error)) from error


def _find(args: argparse.Namespace) -> int:
    from captioner.files import printable
    from captioner.folder.database import DatabaseError, find_images

    words = " ".join(args.words)
    if not words.strip() and not args.tag:
        raise _UsageError("nothing to find: name words, or --tag NAME")
    if args.min_score and not args.tag:
        raise _UsageError("--min-score is the lowest score of a tag, and needs --tag NAME")
    try:
        images = list(find_images(args.database, words, args.tag, args.min_score))
    except DatabaseError as error:
        raise _UsageError(str(error)) from error
    on_terminal = sys.stdout.isatty() and not args.null
    end = b"\0" if args.null else b"\n"
    for image in images:
        shown = printable(image) if on_terminal else image
        sys.stdout.buffer.write(os.fsencode(shown) + end)
    sys.stdout.flush()
    return 0 if images else 1


def _load_onnx(args: argparse.Namespace) -> OnnxCaptioner:
    """Load a model without importing torch, which need not be there."""
    from captioner.onnx_runtime import OnnxError, load

    if len(args.model) > 1:
        raise _UsageError("a model in an ONNX file goes alone; an ensemble is of checkpoints")
    if args.device not in {"auto", "cpu"} or args.precision not in {"auto", "float32"}:
        raise _UsageError("a model in an ONNX file computes on the CPU, in float32")
    try:
        return load(args.model[0])
    except OnnxError as error:
        raise _UsageError(str(error)) from error


def _info(args: argparse.Namespace) -> int:
    from captioner.console import shown
    from captioner.files import printable
    from captioner.onnx_runtime import OnnxCaptioner

    captioner = _load(args)
    rows = captioner.about() if isinstance(captioner, OnnxCaptioner) else _about(args, captioner)
    for key, value in rows.items():
        print(printable(f"{key:<13} {shown(value)}"))
    return 0


def _about(args: argparse.Namespace, captioner: Captioner) -> dict[str, object]:
    from captioner.data.vocabulary import SPECIAL
    from captioner.evaluation import versions
    from captioner.model.checkpoint import default_path

    provenance = {
        "trained with" if key == "versions" else key: value
        for key, value in captioner.checkpoint.provenance.items()
    }
    checkpoint, config = captioner.checkpoint, captioner.checkpoint.config
    size = sum(os.path.getsize(path) for path in args.model or [default_path()])
    parameters = sum(p.numel() for c in captioner.checkpoints for p in c.model.parameters())
    return {
        "model": ", ".join(args.model or ["the one in the package"]),
        "size": f"{size:,} bytes, {parameters:,} parameters",
        "encoder": config.encoder.name,
        "pixels": f"{config.preprocessing.size} x {config.preprocessing.size}, "
        f"{config.preprocessing.fit}",
        "words": f"{len(checkpoint.vocabulary) - len(SPECIAL):,}",
        "tags": f"{len(checkpoint.tags.vocabulary) - len(SPECIAL):,}",
        "device": str(captioner.device),
        "precision": str(captioner.precision).removeprefix("torch."),
        "installed": ", ".join(f"{name} {number}" for name, number in versions().items()),
        **provenance,
    }


def _serve(args: argparse.Namespace) -> int:
    try:
        from captioner.serve.app import Limits
        from captioner.serve.server import is_local, listen, serve
    except ModuleNotFoundError as error:
        needed = 'captioner serve needs an extra: pip install "captioner[serve]"'
        raise _UsageError(f"{needed} ({error})") from error
    try:
        listening = listen(args.host, args.port)
    except OSError as error:
        raise _UsageError(error.strerror) from error
    with listening:
        if not is_local(listening) and args.token is None:
            _note(args, f"anyone who reaches {args.host} may use this server: no --token was given")
        serve(
            _load(args),
            listening,
            Limits(queue=args.queue, upload=args.max_upload * 1_000_000, token=args.token),
            batch_size=args.batch_size,
            workers=args.workers,
            decode_timeout=args.decode_timeout,
            ready=lambda url: _note(args, f"{url} answers; Ctrl-C ends it"),
        )
    return 0
