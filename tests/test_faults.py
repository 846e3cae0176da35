"""Each fault that `test_teeth.py` plants can be planted; it is not run with the whole suite."""

from pathlib import Path

import pytest

import keras_bn
from tests.teeth.faults import FAULTS

PACKAGE = Path(keras_bn.__file__).parent


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault_changes_its_file(fault):
    text = (PACKAGE / fault.file).read_text()
    assert fault.planted_in(text) != text
