"""``python -m captioner``."""

import sys

# Python puts the current directory first, where a file among photographs may be called random.py.
if not sys.flags.safe_path:
    del sys.path[0]

from captioner.cli import main

sys.exit(main())
