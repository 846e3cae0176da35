"""Synchronized statistics over `torch.distributed`: what each process finds, and what all agree on.

The programs beside this file start the processes, once for many checks.
"""

import functools
import json

import keras
import numpy as np
import pytest

from tests.distributed.launching import run

if keras.backend.backend() != "torch":
    pytest.skip("these are properties of PyTorch", allow_module_level=True)

from tests.distributed import torch_failures, torch_values
from tests.distributed.shards import LAYERS, PAIRS, built

# The float32 weights of a run in parts and of a run as a whole.
TRAINED = 5e-5

each_kind = pytest.mark.parametrize("kind", LAYERS)
each_pair = pytest.mark.parametrize("case", PAIRS)


@functools.cache
def printed(program, *arguments):
    """Return what a program beside this file found."""
    path = f"tests/distributed/{program}.py"
    output = run(path, *arguments, backend="torch", OMP_NUM_THREADS="1")
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


def values(name):
    return printed("torch_ranks", 2, "values")[name]


def training(name):
    return printed("torch_ranks", 2, "training")[name]


def of_three(name):
    return printed("torch_ranks", 3, "three")[name]


def worst(found, shards):
    """Return the largest share of its tolerance that an error uses up."""
    return max(error for errors in found for error in errors.values()) / shards.tolerance


# Values.


@each_kind
@each_pair
def test_two_processes_agree_with_the_whole_batch(case, kind):
    assert worst(values(f"{case}, {kind}"), PAIRS[case]) < 1


@each_kind
@each_pair
def test_not_synchronized_they_do_not(case, kind):
    assert worst(values(f"{case}, {kind}, not synchronized"), PAIRS[case]) > 1


@each_kind
@pytest.mark.parametrize("case", torch_values.TRIPLES)
def test_three_processes_agree_with_the_whole_batch(case, kind):
    assert worst(of_three(f"{case}, {kind}"), torch_values.TRIPLES[case]) < 1


@each_kind
def test_processes_of_a_group_agree_with_their_batch(kind):
    assert worst(of_three(f"group, {kind}"), PAIRS["equal"]) < 1


def test_a_compiled_layer_agrees_with_the_whole_batch():
    assert worst(training("compiled"), PAIRS["7 and 1"]) < 1


def test_a_ghost_stays_in_its_process_and_what_is_kept_is_of_all():
    assert worst(values("ghosts"), PAIRS["equal"]) < 1


@pytest.mark.parametrize("found", [values, of_three], ids=["all", "group"])
def test_second_derivative_is_that_of_the_whole_batch(found):
    assert max(found("second order")) < 2e-5


# Communication.


def test_a_step_gathers_once_forward_and_once_backward():
    assert values("calls") == [[["all_gather"], ["all_gather"]]] * 2


def test_a_step_of_ghosts_gathers_once():
    assert values("calls of ghosts") == [[["all_gather"], []]] * 2


@each_kind
@pytest.mark.parametrize("name", torch_values.SILENT)
def test_nothing_is_sent_where_there_is_nothing_to_merge(name, kind):
    assert values(f"{name}, {kind}") == [{"calls": [], "is plain": True}] * 2


def test_nothing_is_sent_while_a_model_is_built():
    assert values("symbolic") == [[], []]


@each_kind
def test_nothing_is_sent_without_an_engine(kind):
    x, dy, _ = torch_values.tensors(PAIRS["equal"], 0)
    with torch_values.counted() as calls:
        results = [
            torch_values.step(built(kind, synchronized=flag), x.detach().clone(), dy, None)
            for flag in (True, False)
        ]
    assert calls == []
    y, plain = (result[:2] for result in results)
    assert all(map(np.array_equal, y, plain))


# Models in DistributedDataParallel.


each_run = pytest.mark.parametrize(
    "name", ["trained", "trained, accumulated", "trained, 8 and 0", "trained, compiled"]
)


@each_run
def test_model_trains_as_in_one_process(name):
    assert max(found["distance"] for found in training(name)) < TRAINED


def test_not_synchronized_it_does_not():
    assert min(found["distance"] for found in training("trained, not synchronized")) > TRAINED


@each_run
def test_trained_processes_are_the_same_to_the_bit(name):
    first, second = training(name)
    assert first == second


def test_what_rank_0_saves_is_the_same_everywhere_to_the_bit():
    digests = [digest for found in training("saved") for digest in found]
    assert all(digest == digests[0] for digest in digests)


# Failures.

TORCH_SAYS = {
    "ended": "peer",
    "ended halfway": "peer",
    "one step short": "Timed out waiting 4000ms",
    "one step short, at a barrier": "gloo",  # the first of two time limits, or what it ends
    "one step short, checked": "Detected mismatch between collectives",
}


def failed(case):
    return printed("torch_failures")[case]


@pytest.mark.parametrize("case", TORCH_SAYS)
def test_failure_of_another_process_is_an_error_that_says_so(case):
    said = failed(case)["said"]
    assert "BatchNormalization: `process_group` must be of processes that take the same" in said
    assert "Another one ended, ran fewer steps or something else. PyTorch says: " in said
    assert TORCH_SAYS[case] in said.partition("PyTorch says: ")[2]


def test_join_guards_against_uneven_steps():
    assert "at least one rank that exhausted inputs" in failed("one step short, joined")["said"]


@pytest.mark.parametrize("case", torch_failures.CASES)
def test_failure_ends_within_the_time_limit(case):
    assert failed(case)["seconds"] < 3 * torch_failures.LIMIT.total_seconds()
