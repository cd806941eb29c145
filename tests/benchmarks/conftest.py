"""`benchmarks` is not installed: it is run from the root of the repository, wherever pytest was started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
