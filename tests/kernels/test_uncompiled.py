"""The plain paths, of machines without the passes in C and of debugging, held to the same."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from keras_bn.kernels.compiled import library

# Eager JAX compiles each operation for each shape.
USUAL = "not saved and " + ("not eager" if keras.backend.backend() == "jax" else "not compile")
RUNS = {
    "uncompiled": (
        "tests/kernels/test_contract.py tests/layers/test_columns.py tests/layers/test_rows.py",
        f"{USUAL} and not generic",
    ),
    # What compilers make of these kernels is in test_contract.py.
    "generic": ("tests/layers/test_conformance.py", f"every_mode and {USUAL}"),
}


@pytest.mark.skipif(library() is None, reason="built without a compiler, or switched off")
@pytest.mark.parametrize(("kernels", "files", "chosen"), [(k, *RUNS[k]) for k in RUNS], ids=RUNS)
def test_layers_are_as_right_on_plain_paths(kernels, files, chosen):
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    command = [sys.executable, "-m", "pytest", *options, *files.split()]
    environment = os.environ | {"KERAS_BN_KERNELS": kernels}
    folder = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
