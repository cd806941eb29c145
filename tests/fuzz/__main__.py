"""Search for longer than CI does:  python -m tests.fuzz [--scene NAME] [--first SEED] [--seconds 600]

Prints every case in which a rule was broken, with what was said; exits with 1 if there was one. A case is known by its
scene and its seed, and `--first SEED --seconds 0` plays that one alone.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .material import made
from .scenes import SCENES, play


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--scene", choices=SCENES, action="append")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600)
    options = parser.parse_args()
    ends, counts, broken = time.monotonic() + options.seconds, Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        world = made(Path(folder))
        for seed in itertools.count(options.first):
            for name in options.scene or SCENES:
                found = play(world, name, seed)
                ending = "broken" if found.fault else {0: "went on", 2: "refused"}.get(found.outcome.code or 0)
                counts[f"{name}: {ending}"] += 1
                if found.fault:
                    broken += 1
                    print(f"{name} {seed}: {found.fault}: {found.what}\n{found.outcome.said[-3000:]}\n", flush=True)
            if time.monotonic() > ends:
                break
    print("\n".join(f"{count:6} {what}" for what, count in sorted(counts.items())))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
