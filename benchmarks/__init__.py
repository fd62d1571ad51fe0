"""What is claimed of costs, as programs: `python -m benchmarks.NAME` from the root of the repository."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
