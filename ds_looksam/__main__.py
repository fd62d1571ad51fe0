"""``python -m ds_looksam``."""

import sys

from .cli import main

sys.exit(main())
