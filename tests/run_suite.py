"""Run the cross-backend files, then the suite once per backend, and print one summary.

Keras chooses its backend when it is imported, so each backend needs a process of its own;
the cross-backend files start such processes themselves and run when all three are asked for.
What is not listed below (`-k moments`, `tests/core`, `-x`) goes to pytest.

The whole suite, on all three backends, plants no faults and takes in turn the rows of tests that
ask the same of each (`left_out`). What is asked for by name, or on fewer backends, runs with every
row. Where time is limited (`--minutes`) each run has an equal share of what is left of it, begins
with the first row of each test in each mode, and skips what it does not come to: "no time" in the
summary.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from math import inf
from pathlib import Path
from xml.etree import ElementTree

BACKENDS = ("tensorflow", "jax", "torch")
CROSS_BACKEND = "tests/cross_backend"
PLANTED = "tests/test_teeth.py"
# These ask the same of each backend.
SHARED = (
    "tests/core",
    "tests/layers",
    "tests/models",
    "tests/kernels/test_reference.py",
    "tests/test_fuzz.py",
)
MODE = re.compile(r"\b(eager|graph|compiled?|jit|xla|traced)\b")
NO_TIME = "no time is left"  # why a test was skipped
NO_TESTS_COLLECTED = 5  # pytest's exit code; under `-k` one backend alone may have nothing to run

# Two workers with a thread pool each would fight for the cores; the environment may say otherwise.
DEFAULTS = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
PYTEST = [sys.executable, "-m", "pytest", "--quiet", "-n", "2", "--dist", "worksteal"]


def run_pytest(name: str, backend: str, arguments: list[str], seconds: float) -> Counter[str]:
    """Run pytest in a process of its own; count its outcomes and its seconds."""
    limit = [f"--until={time.time() + seconds}"] if seconds < inf else []
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        # Many tests compile the same programs, and so do both workers.
        shared = {"JAX_COMPILATION_CACHE_DIR": folder}
        code = subprocess.run(
            [*PYTEST, f"--junit-xml={report}", *limit, *arguments],
            env=DEFAULTS | shared | os.environ | {"KERAS_BACKEND": backend},
            check=False,
        ).returncode
        counts = count_outcomes(report)
    if code not in (0, NO_TESTS_COLLECTED) and not counts["failed"]:
        counts["failed"] = 1  # pytest itself failed: a broken conftest, a crash, a wrong option
    counts["seconds"] = round(time.monotonic() - start)
    return counts


def count_outcomes(report: Path) -> Counter[str]:
    """Count the outcomes in a JUnit report; an error in a fixture is a failure."""
    if not report.exists():
        return Counter()
    outcome = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    counts: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        found = [child for child in case if child.tag in outcome]
        counts[outcome[found[0].tag] if found else "passed"] += 1
        counts["no time"] += any(child.get("message") == NO_TIME for child in found)
    return counts


def collect(backend: str) -> list[str]:
    """Return the tests that ask the same of each backend, row by row, as this one has them.

    An error is left to the run itself, which shows it.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", *SHARED]
    environment = DEFAULTS | os.environ | {"KERAS_BACKEND": backend}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return [line for line in done.stdout.splitlines() if "::" in line]


def left_out(rows: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return what each backend leaves to another one.

    Of the backends that have a row one runs it, in turn; the first row of each test in each mode
    runs on all.
    """
    holders: dict[str, list[str]] = {}
    first: dict[tuple[str, ...], str] = {}
    for backend, own in rows.items():
        for row in own:
            holders.setdefault(row, []).append(backend)
            first.setdefault((backend, *kind_of(row)), row)
    found: dict[str, list[str]] = {backend: [] for backend in rows}
    for turn, (row, backends) in enumerate(holders.items()):
        for backend in set(backends) - {backends[turn % len(backends)]}:
            if first[backend, *kind_of(row)] != row:
                found[backend].append(row)
    return found


def kind_of(row: str) -> tuple[str, ...]:
    """Return the test and the mode that a row is a case of."""
    test, _, values = row.partition("[")
    return test, *MODE.findall(values)


def most_telling_first(rows: list[str]) -> list[int]:
    """Return an order in which both workers begin with the first row of each test in each mode.

    pytest-xdist gives each a half of the list.
    """
    seen: set[tuple[str, ...]] = set()
    groups: tuple[list[int], list[int]] = ([], [])
    for index, row in enumerate(rows):
        groups[kind_of(row) in seen].append(index)
        seen.add(kind_of(row))
    halves = [(group[: len(group) // 2], group[len(group) // 2 :]) for group in groups]
    return [index for half in zip(*halves, strict=True) for part in half for index in part]


def in_turn(backends: list[str]) -> dict[str, list[str]]:
    """Return pytest's arguments for the part of each backend in the whole suite."""
    with ThreadPoolExecutor(2) as pool:
        left = left_out(dict(zip(backends, pool.map(collect, backends), strict=True)))
    return {
        backend: [f"--ignore={PLANTED}", *(f"--deselect={row}" for row in rows)]
        for backend, rows in left.items()
    }


def plan(backends: list[str], arguments: list[str]) -> dict[str, tuple[str, list[str]]]:
    """Name each run, with its backend and pytest's arguments; a path given replaces the default."""
    paths = [argument for argument in arguments if argument.startswith("tests")]
    crossing = [path.startswith(CROSS_BACKEND) for path in paths]
    runs, has_all = {}, set(backends) == set(BACKENDS)
    if all(crossing) and has_all and Path(CROSS_BACKEND).is_dir():
        runs["cross-backend"] = (backends[0], ["-o", f"testpaths={CROSS_BACKEND}", *arguments])
    if not paths or not all(crossing):
        is_whole = has_all and not arguments
        options = in_turn(backends) if is_whole else dict.fromkeys(backends, arguments)
        for name in backends:
            runs[name] = (name, [f"--ignore={CROSS_BACKEND}", *options[name]])
    return runs


def summarize(results: dict[str, Counter[str]]) -> Counter[str]:
    """Print a line per run and the total as the last line; return the total."""
    columns = ("passed", "failed", "skipped", "no time", "seconds")
    heading = f"keras {version('keras')}"
    print(f"\n{heading:15}" + "".join(f"{column:>9}" for column in columns))
    for name, counts in results.items():
        print(f"{name:15}" + "".join(f"{counts[column]:9}" for column in columns))
    total = sum(results.values(), Counter())
    skipped = f", {total['skipped']} skipped" if total["skipped"] else ""
    print(f"{total['passed']} passed, {total['failed']} failed{skipped}", flush=True)
    return total


def main() -> int:
    """Run what the command line asks for; 0 if tests ran and none failed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--backends", default=" ".join(BACKENDS), help="default: all three")
    parser.add_argument("--minutes", default=inf, type=float, help="then skip what is left")
    options, arguments = parser.parse_known_args()
    backends = options.backends.split()
    if unknown := set(backends) - set(BACKENDS):
        parser.error(f"backends must be among {BACKENDS}. Received: {sorted(unknown)}")
    os.chdir(Path(__file__).parents[1])
    end = time.monotonic() + 60 * options.minutes
    runs, results = plan(backends, arguments), {}
    for left, (name, run) in zip(range(len(runs), 0, -1), runs.items(), strict=True):
        results[name] = run_pytest(name, *run, (end - time.monotonic()) / left)
    total = summarize(results)
    return int(total["failed"] > 0 or total["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
