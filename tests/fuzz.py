"""Run any number of random cases on one backend and print a summary.

    python tests/fuzz.py --cases 10000 --backend torch

`FUZZ_CASES=1000 pytest tests/test_fuzz.py` runs them as tests, one for each seed.
"""

import argparse
import importlib
import os
import sys
import time
import traceback
from pathlib import Path


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run the cases; 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--backend", default=os.environ.get("KERAS_BACKEND", "tensorflow"))
    options = parser.parse_args()
    # Keras chooses its backend when it is imported.
    os.environ["KERAS_BACKEND"] = options.backend
    sys.path.insert(0, str(Path(__file__).parents[1]))
    cases = importlib.import_module("tests.fuzzing.cases")

    start, worst, failed = time.monotonic(), (0.0, ""), 0
    for seed in range(options.first, options.first + options.cases):
        try:
            finding = cases.judge(seed)
        except Exception:  # a crash is a finding too
            finding = (float("inf"), f"seed {seed}: {traceback.format_exc()}")
        if not finding[0] <= 1:
            failed += 1
            tell(f"FAILED, {finding[0]:.3g} tolerances: {finding[1]}")
        worst = max(worst, tuple(finding))
    seconds = time.monotonic() - start
    tell(f"{options.backend}: {options.cases} cases, {failed} failed, {seconds:.0f} seconds")
    tell(f"largest error: {worst[0]:.3g} of its tolerance, {worst[1]}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
