"""Train a captioner: python scripts/train.py configs/flickr8k.toml --run runs/first --set …"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args(argv)

    import torch

    from captioner.config import load_config
    from captioner.training import fit

    print(fit(load_config(args.config, args.set), args.run, torch.device("cpu")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
