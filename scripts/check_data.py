"""Look a data set over before training on it: photographs, captions, leaks, words, memory.

    python scripts/check_data.py configs/flickr8k.toml --set data.images=… --set data.captions=…

Takes the config and the --set of scripts/train.py, opens every photograph, and trains nothing.
Ends with 0 when no problem was found, 1 when there are some, 2 when nothing could be checked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from captioner.console import Parser, complain


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a TOML file of what differs from the defaults")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key, as section.key"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything found, in full")
    args = parser.parse_args(argv)

    import torch

    from captioner.config import Config
    from captioner.data.audit import audit, summary
    from captioner.data.example import DataError
    from captioner.model.encoder import Encoder
    from captioner.photos.workers import DecodingError
    from captioner.settings import ConfigError, load_config

    try:
        config = load_config(Config, args.config, args.set)
        size = config.preprocessing.size
        encoder = Encoder(config.encoder.name, config.preprocessing).eval()
        with torch.inference_mode():
            features = encoder(torch.zeros(1, 3, size, size, dtype=torch.uint8)).half()
        found = audit(config, features.nbytes, os.cpu_count() or 1)
        print("\n".join(summary(found, config.data)))
        if args.json:
            args.json.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    except (ConfigError, DataError, DecodingError, OSError) as error:
        complain("check_data.py", error)
        return 2
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
