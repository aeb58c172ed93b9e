"""Describe the photographs of an archive on a Ray cluster.

    python scripts/caption_cluster.py s3://archive/photos --output s3://archive/captions.parquet \\
        --address auto --concurrency 64 --num-cpus 2

Needs the extra "ray". The same command continues a run; docs/cluster.md has the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature

from tqdm import tqdm

from captioner.console import Parser, complain, shown_notices
from captioner.flags import add_cluster_arguments, search_options, tag_options
from captioner.settings import ConfigError

_NAME = "caption_cluster.py"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_cluster_arguments(parser)
    args = parser.parse_args(argv)
    say = partial(complain, _NAME)
    note: Callable[[object], object] = _say_nothing if args.quiet else say
    try:
        from captioner.cluster import ClusterError, describe_dataset
        from captioner.folder import RunError, RunResult, WriteError
        from captioner.model.checkpoint import CheckpointError

        known = signature(describe_dataset).parameters
        values = {name: value for name, value in vars(args).items() if name in known}
        values |= {"options": search_options(args), "tag_options": tag_options(args)}
    except (ImportError, ConfigError) as error:
        say(error)
        return 2
    try:
        hidden = args.quiet or None
        with shown_notices(_NAME, args.quiet), tqdm(unit=" photographs", disable=hidden) as bar:

            def show(result: RunResult) -> None:
                bar.total, bar.n = result.total, result.done
                bar.set_postfix(errors=result.errors)

            result = describe_dataset(args.paths, progress=show, note=note, **values)
    except (RunError, ConfigError, CheckpointError) as error:
        say(error)
        return 2
    except (ClusterError, WriteError) as error:
        say(f"{error}; the same command without --overwrite continues where it was")
        return 1
    except KeyboardInterrupt:
        say("stopped; the same command without --overwrite continues where it was")
        return 130
    note(f"{result.skipped} done before, {result.described} described, {result.errors} errors")
    return 1 if result.errors else 0


def _say_nothing(_: object) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
