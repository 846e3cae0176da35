"""The plain paths, of machines without the passes in C, held to the same contract."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from keras_bn.kernels.compiled import library

FILES = "tests/kernels/test_contract.py tests/layers/test_columns.py tests/layers/test_rows.py"


@pytest.mark.skipif(library() is None, reason="built without a compiler, or switched off")
def test_layers_are_as_right_without_the_passes():
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not compile and not generic"]
    command = [sys.executable, "-m", "pytest", *options, *FILES.split()]
    environment = os.environ | {"KERAS_BN_KERNELS": "uncompiled"}
    folder = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
