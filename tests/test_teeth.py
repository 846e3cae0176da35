"""The suite has teeth: planted in a copy of the package, each fault turns it red."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import keras_bn
from tests.teeth.faults import FAULTS

PACKAGE = Path(keras_bn.__file__).parent
ROOT = Path(__file__).parents[1]
SERVER = Path(__file__).parent / "teeth" / "server.py"
CASES = {"FUZZ_CASES": "90"}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Return a function that runs choices of tests of a copy of the package: what failed."""
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [sys.executable, SERVER],
            env=os.environ | CASES,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

    def run(folder, choices, kernels):
        choices = [shlex.split(choice) for choice in choices]
        request = {"folder": str(folder), "choices": choices, "kernels": kernels}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, log.read_text()[-3000:]
        return json.loads(answer)

    with process:
        yield run
        process.stdin.close()


@pytest.fixture
def copy(tmp_path):
    """Return a folder with a copy of the package, its tests and its settings."""
    shutil.copytree(
        PACKAGE,
        tmp_path / "keras_bn",
        ignore=shutil.ignore_patterns("__pycache__"),
        copy_function=copy_or_link,
    )
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def copy_or_link(source, target):
    """Copy a file; link a library, for a backend takes the same operations from one place only."""
    if source.endswith(".so"):
        os.symlink(os.path.realpath(source), target)
    else:
        shutil.copy2(source, target)


def plant(fault, folder):
    file = folder / "keras_bn" / fault.file
    file.write_text(fault.planted_in(file.read_text()))
    if file.suffix in (".c", ".h"):
        build(file.parent)


def build(folder):
    """Compile the passes of a copy, for one kind of processor and quickly."""
    (library,) = folder.glob("passes.*.so")
    library.unlink()  # a link to what other tests have loaded
    command = ["cc", "-O1", "-std=gnu11", "-w", "-DONE_GENERATION", "-fPIC", "-shared"]
    # Else it would call the functions of the library that other tests have loaded.
    command.append("-Wl,-Bsymbolic")
    sources = [folder / name for name in ("passes.c", "any.c", "torch_ops.c")]
    subprocess.run([*command, "-o", library, *sources, "-lm"], check=True)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_turns_the_suite_red(name, copy, failures):
    plant(FAULTS[name], copy)
    assert failures(copy, [FAULTS[name].tests], FAULTS[name].kernels)


@pytest.mark.parametrize("kernels", sorted({fault.kernels for fault in FAULTS.values()}))
def test_without_a_fault_the_same_tests_are_green(kernels, copy, failures):
    choices = {fault.tests for fault in FAULTS.values() if fault.kernels == kernels}
    assert failures(copy, sorted(choices), kernels) == {}
