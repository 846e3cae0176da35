"""Run the suite once per backend, then the cross-backend files, and print one summary.

Keras chooses its backend when it is imported, so each backend needs a process of its own;
the cross-backend files start such processes themselves and run when all three are asked for.
What is not listed below (`-k moments`, `tests/core`, `-x`) goes to pytest.

The whole suite, on all three backends, plants no faults and takes in turn the rows of tests that
ask the same of each (`left_out`). What is asked for by name, or on fewer backends, runs with every
row.
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


def run_pytest(name: str, backend: str, arguments: list[str]) -> Counter[str]:
    """Run pytest in a process of its own; count its outcomes and its seconds."""
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        # Many tests compile the same programs, and so do both workers.
        shared = {"JAX_COMPILATION_CACHE_DIR": folder}
        code = subprocess.run(
            [*PYTEST, f"--junit-xml={report}", *arguments],
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
    return Counter(
        next((outcome[child.tag] for child in case if child.tag in outcome), "passed")
        for case in ElementTree.parse(report).iter("testcase")
    )


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
            first.setdefault((backend, *test_and_mode(row)), row)
    found: dict[str, list[str]] = {backend: [] for backend in rows}
    for turn, (row, backends) in enumerate(holders.items()):
        for backend in set(backends) - {backends[turn % len(backends)]}:
            if first[backend, *test_and_mode(row)] != row:
                found[backend].append(row)
    return found


def test_and_mode(row: str) -> list[str]:
    """Return what a row is a case of."""
    test, _, values = row.partition("[")
    return [test, *MODE.findall(values)]


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
    runs = {}
    if not paths or not all(crossing):
        is_whole = not arguments and set(backends) == set(BACKENDS)
        options = in_turn(backends) if is_whole else dict.fromkeys(backends, arguments)
        runs = {name: (name, [f"--ignore={CROSS_BACKEND}", *options[name]]) for name in backends}
    if all(crossing) and set(backends) == set(BACKENDS) and Path(CROSS_BACKEND).is_dir():
        runs["cross-backend"] = (backends[0], ["-o", f"testpaths={CROSS_BACKEND}", *arguments])
    return runs


def summarize(results: dict[str, Counter[str]]) -> Counter[str]:
    """Print a line per run and the total as the last line; return the total."""
    columns = ("passed", "failed", "skipped", "seconds")
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
    options, arguments = parser.parse_known_args()
    backends = options.backends.split()
    if unknown := set(backends) - set(BACKENDS):
        parser.error(f"backends must be among {BACKENDS}. Received: {sorted(unknown)}")
    os.chdir(Path(__file__).parents[1])
    runs = plan(backends, arguments)
    total = summarize({name: run_pytest(name, *run) for name, run in runs.items()})
    return int(total["failed"] > 0 or total["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
