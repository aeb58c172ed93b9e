"""Collect the tags that a data set has, in a file that a person can edit before training.

    python scripts/build_tags.py configs/flickr8k.toml tags.tsv --set data.images=… --set …
    python scripts/train.py configs/flickr8k.toml --set data.tags=tags.tsv --run …

Takes the config and the --set of scripts/train.py, which collects the same tags by itself if it is
not given a list. On each line of the file: a tag, how many photographs have it, and the words of
captions that say it, with tabs between them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a TOML file of what differs from the defaults")
    parser.add_argument("list", type=Path, help="the file to write")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key, as section.key"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a list that exists")
    args = parser.parse_args(argv)

    from captioner.config import Config
    from captioner.data.example import DataError
    from captioner.data.sources import read_data
    from captioner.data.tags import TagSet
    from captioner.settings import ConfigError, load_config

    try:
        if args.list.exists() and not args.overwrite:
            raise DataError(f"{args.list} exists, maybe edited; --overwrite replaces it")
        config = load_config(Config, args.config, args.set)
        examples = read_data(config).train
        tags = TagSet.build(examples, config.data.tag_size, config.data.tag_min_count)
        tags.write(args.list, len(examples))
    except (ConfigError, DataError, OSError) as error:
        print(f"build_tags.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(tags.names)} tags of {len(examples)} photographs in {args.list}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
