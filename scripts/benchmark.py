"""Measure what the package does; `--help` of each command says how.

python scripts/benchmark.py folder parts --images Flickr8k/images
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import benchmark_folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="WHAT", required=True)
    benchmark_folder.add_arguments(commands.add_parser("folder", help="folder runs"))
    args = parser.parse_args(argv)
    for name, figure in args.run(args).items():
        print(f"{name:<40} {figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
