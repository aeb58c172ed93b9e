"""Train a captioner on your own data.

    python scripts/train.py configs/flickr8k.toml --run runs/first \\
        --set data.images=… --set data.captions=… --set data.split=… --set data.val_split=…

On several devices, or on several machines that share the folder of the run:

    torchrun --nproc-per-node 2 -- scripts/train.py configs/flickr8k.toml --run …

A run that was cut off, or stopped by Ctrl-C or SIGTERM, continues with the same command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captioner.stopper import StoppedError, Stopper

    with Stopper() as stopper:
        try:
            with stopper.idle():
                from captioner.checkpoint import CheckpointError
                from captioner.config import ConfigError, load_config
                from captioner.model import choose_device
                from captioner.readers import DataError
                from captioner.training import TrainingError, fit
            config = load_config(args.config, args.set)
            best = fit(config, args.run, choose_device(args.device), stopper=stopper)
        except StoppedError:
            print("train.py: stopped; the same command continues the run", file=sys.stderr)
            return 128 + stopper.signal
        except (CheckpointError, ConfigError, DataError, OSError) as error:
            print(f"train.py: {error}", file=sys.stderr)
            return 2
        except TrainingError as error:
            print(f"train.py: {error}", file=sys.stderr)
            return 1
    print(f"best checkpoint: {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
