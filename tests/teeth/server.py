"""Runs pytest again and again in one process, which has imported Keras and its backend once.

A request is a line of JSON, {"folder": ..., "choices": [...], "kernels": ...}: run these choices of
tests, each with options of pytest, of the copy of the package that the folder holds, with these
kernels. The answer is a line, the failed tests with their last line.
"""

import importlib
import json
import os
import sys

import pytest

from keras_bn.kernels.compiled import library


class Failures:
    """Collects what failed, in a test or before it."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            lines = report.longreprtext.splitlines()
            errors = [line for line in lines if line.startswith("E ")]
            self.found.setdefault(report.nodeid, (errors or lines)[0][:200])


def run(folder: str, choices: list[list[str]], kernels: str) -> dict[str, str]:
    """Run each choice of tests in a folder until one fails; return what failed."""
    os.environ["KERAS_BN_KERNELS"] = kernels
    operations = sys.modules.get("keras_bn.kernels.torch.operations")
    if operations is not None:  # PyTorch would warn that others take their place
        operations.SPACE._destroy()
    for name in [name for name in sys.modules if name.split(".")[0] in ("keras_bn", "tests")]:
        del sys.modules[name]
    os.chdir(folder)
    # The folder is the first place to look for the package, wherever else it may be installed.
    sys.path[0] = folder
    importlib.invalidate_caches()
    failures = Failures()
    options = ["--exitfirst", "--quiet", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    for tests in choices:
        code = pytest.main([*options, *tests], plugins=[failures])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise RuntimeError(f"pytest ended with {code!r}: {failures.found}")
    return failures.found


def main() -> None:
    """Answer requests until there are no more."""
    # First of all: it is what the other libraries of a process call.
    library()
    sys.dont_write_bytecode = True
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tests print must not stand among the answers
    for request in sys.stdin:
        answers.write(json.dumps(run(**json.loads(request))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
