"""Compare the parts of the scores of tags, of one or more checkpoints with the same tags.

    python scripts/compare_tags.py runs/a/best.safetensors runs/b/best.safetensors \\
        --images Flickr8k/images --captions Flickr8k/captions.token.txt --split Flickr8k/dev.txt \\
        --baseline "a head"

Scores are made of the tags' frequencies, the tag decoder, the head, and both. Each half of the
photographs is scored by a fit to the other half. With a baseline, the 95 % intervals of how far
each is ahead of it come from a bootstrap over photographs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from captioner.data.example import DataError
from captioner.memory import keep_freed_memory
from captioner.model.checkpoint import CheckpointError
from measures.tags import compare_tags


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="checkpoints, each in a folder of another name")
    parser.add_argument("--images", type=Path, required=True, help="the folder of photographs")
    parser.add_argument("--captions", type=Path, required=True, help="the references")
    parser.add_argument("--split", default="", help="list of names (Flickr8k), or split (Karpathy)")
    parser.add_argument(
        "--baseline", default="", help="a folder, and frequencies, decoder, head or both"
    )
    parser.add_argument("--draws", type=int, default=400, help="of the bootstrap")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        for name, figures in compare_tags(args):
            shown = ", ".join(f"{key} {value}" for key, value in figures.items())
            print(f"{name:<24} {shown}", flush=True)
    except (CheckpointError, DataError, OSError) as error:
        print(f"compare_tags.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
