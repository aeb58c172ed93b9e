"""Train a captioner on your own data.

    python scripts/train.py configs/flickr8k.toml --run runs/first \\
        --set data.images=… --set data.captions=… --set data.split=… --set data.val_split=…

On several devices, or on several machines that share the folder of the run:

    torchrun --nproc-per-node 2 -- scripts/train.py configs/flickr8k.toml --run …

A run that was cut off, or stopped by Ctrl-C or SIGTERM, continues with the same command.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from captioner.console import Parser, complain, shown_notices


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a TOML file of what differs from the defaults")
    parser.add_argument("--run", type=Path, required=True, help="the folder the run lives in")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key, as section.key"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args(argv)

    from captioner.training.stopper import StoppedError, Stopper

    with Stopper() as stopper, shown_notices("train.py"):
        try:
            with stopper.idle():
                from captioner.config import Config
                from captioner.data.example import DataError
                from captioner.memory import keep_freed_memory
                from captioner.model.checkpoint import CheckpointError
                from captioner.model.device import choose_device
                from captioner.settings import ConfigError, load_config
                from captioner.training.advice import TrainingError
                from captioner.training.fit import fit
            keep_freed_memory()
            config = load_config(Config, args.config, args.set)
            fit(config, args.run, choose_device(args.device), stopper=stopper)
        except StoppedError:
            if os.environ.get("RANK", "0") == "0":  # torchrun's processes need one voice
                complain("train.py", "stopped; the same command continues the run")
            return 128 + stopper.signal
        except (CheckpointError, ConfigError, DataError, OSError) as error:
            complain("train.py", error)
            return 2
        except TrainingError as error:
            complain("train.py", error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
