"""Random layers, inputs, masks and modes agree with the float64 oracle; see `tests/fuzz.py`."""

import os

import pytest

from tests.fuzzing.cases import judge

SEEDS = range(int(os.environ.get("FUZZ_CASES", "300")))


@pytest.mark.parametrize("seed", SEEDS)
def test_layer_agrees_with_the_oracle(seed):
    finding = judge(seed)
    assert finding.ratio <= 1, finding.text
