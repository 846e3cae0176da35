"""What the whole suite leaves out on a backend, another one runs."""

import pytest

from tests.run_suite import left_out, most_telling_first

TESTS = ("tests/core/test_a.py::test_one", "tests/layers/test_b.py::test_two")
COMMON = [f"{test}[{row}]" for test in TESTS for row in range(20)]
MODES = [f"{TESTS[0]}[{mode}-{row}]" for mode in ("eager", "compiled") for row in range(20)]
OWN = [f"{TESTS[1]}[own-{row}]" for row in range(7)]
ROWS = {
    "tensorflow": [*OWN, *COMMON, *MODES],
    "jax": [*COMMON, *MODES, "tests/core/test_a.py::test_alone"],
    "torch": [*COMMON[1:], *MODES],
}


@pytest.fixture
def run():
    left = left_out(ROWS)
    return {backend: set(rows) - set(left[backend]) for backend, rows in ROWS.items()}


def test_every_row_runs(run):
    assert set().union(*run.values()) == set().union(*ROWS.values())


def test_every_test_and_every_mode_run_on_each_backend_that_has_them(run):
    for backend, rows in ROWS.items():
        wanted, found = ({case(row) for row in some} for some in (rows, run[backend]))
        assert found == wanted


def case(row):
    test, _, values = row.partition("[")
    return test, values.partition("-")[0] if row in MODES else ""


def test_what_all_have_is_shared_evenly(run):
    for some in (COMMON, MODES):
        assert all(len(set(some) & rows) <= len(some) / 3 + 4 for rows in run.values())


def test_halves_begin_with_what_tells_most():
    rows = ROWS["tensorflow"]
    order = [rows[index] for index in most_telling_first(rows)]
    assert sorted(order) == sorted(rows)
    cases = {case(row) for row in rows}
    size = len(cases) // 2
    half = len(rows) // 2
    assert {case(row) for row in (*order[:size], *order[half : half + size])} == cases
