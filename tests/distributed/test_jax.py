"""Statistics of all replicas in JAX: mapped axes, and arrays that are spread over devices."""

import fcntl
import json
import os
import re

import keras
import numpy as np
import pytest

from tests.distributed.launching import run
from tests.distributed.shards import LAYERS, PAIRS, Shards, built
from tests.oracle import expected, weights_by_name

if keras.backend.backend() != "jax":
    pytest.skip("these are replicas of JAX", allow_module_level=True)

import jax
from jax.sharding import AbstractMesh, Mesh

from tests.distributed import jax_fit, jax_maps
from tests.distributed.jax_maps import (
    AXIS,
    REPLICAS,
    SPLIT,
    SYNCHRONIZED,
    VMAP,
    WAYS,
    WHOLE,
    cases,
    forward,
    values,
)

DEVICES = "--xla_force_host_platform_device_count={}"
# Of so many small programs most of the time is the compiler's.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# jax 0.10.2: threads that virtual devices share; with one for each, devices that wait for each
# other can wait for ever, where another task has taken a thread.
THREADS = {"NPROC": "64"}
OUTSIDE = [way.name for way in WAYS if not way.is_inside]

every_layer = pytest.mark.parametrize("kind", LAYERS)


def every(table):
    return pytest.mark.parametrize("name", table)


@pytest.fixture(scope="session")
def printed(tmp_path_factory):
    """Return a function that gives what a program prints, run once for all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def found(program, flags=""):
        file = base / program
        with open(f"{file}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                path = f"tests/distributed/{program}.py"
                settings = THREADS | {"XLA_FLAGS": f"{QUICK} {flags}"}
                file.write_text(run(path, backend="jax", **settings))
        return json.loads(file.read_text().splitlines()[-1])

    return found


@pytest.fixture(scope="session")
def maps(printed):
    return printed("jax_maps", DEVICES.format(REPLICAS))


@pytest.fixture(scope="session")
def devices(printed):
    return printed("jax_fit", DEVICES.format(8))


@pytest.fixture(scope="session")
def processes(printed):
    return printed("jax_processes")


# On a mapped axis.


@every(cases(WAYS))
def test_shards_are_normalized_as_one_batch(name, maps):
    found = maps["errors"][name]
    assert max(found.values()) <= cases(WAYS)[name][-1].tolerance, found


def test_a_sum_inside_a_derivative_by_hand_would_be_counted_twice(maps):
    assert maps["planted"]["y"] <= 2e-5 < 0.1 < maps["planted"]["dx"]


@every(cases(VMAP))
def test_shards_of_vmap_are_normalized_as_one_batch(name):
    way, kind, shards = cases(VMAP)[name]
    found = jax_maps.found_errors(way, kind, shards, **SYNCHRONIZED)
    assert max(found.values()) <= shards.tolerance, found


@every(cases(VMAP[:1]))
def test_without_synchronization_they_are_not(name):
    way, kind, shards = cases(VMAP)[name]
    assert max(jax_maps.found_errors(way, kind, shards).values()) > 10 * shards.tolerance


@every_layer
def test_ghosts_are_local_and_what_is_kept_is_of_all(kind):
    shards, layer = Shards((6, 6)), built(kind)
    call = jax_maps.step(VMAP[0], kind, (*SYNCHRONIZED.items(), ("virtual_batch_size", 4)))
    (y, dx), (_, state) = call({"x": shards.x, "dy": shards.dy}, values(layer))
    kept = wanted(layer, shards.x, shards.dy).state
    layer.virtual_batch_size = 4
    own = [
        wanted(layer, *part)
        for part in zip(shards.cut(shards.x), shards.cut(shards.dy), strict=True)
    ]
    np.testing.assert_allclose(y, np.concatenate([part.y for part in own]), atol=2e-5)
    np.testing.assert_allclose(dx, np.concatenate([part.dx for part in own]), atol=2e-5)
    for variable, array in zip(layer.non_trainable_variables, state, strict=True):
        np.testing.assert_allclose(array, [kept[variable.name]] * REPLICAS, rtol=2e-5)


def wanted(layer, x, dy):
    return expected(layer, weights_by_name(layer), x, dy, training=True)


@every_layer
def test_forward_mode_agrees_with_reverse_mode(kind):
    ahead, back = jax_maps.slopes(VMAP[1], kind)
    np.testing.assert_allclose(ahead, back, rtol=1e-4)


@every(OUTSIDE)
def test_forward_mode_agrees_with_reverse_mode_on_devices(name, maps):
    ahead, back = maps["slopes"][name]
    np.testing.assert_allclose(ahead, back, rtol=1e-4)


# What is sent.


def symbolic(layer, x):
    layer(keras.KerasTensor(x.shape), training=True)
    return x


def frozen(layer, x):
    layer.trainable = False
    return layer(x, training=True)


CALLS = {
    "training": (SYNCHRONIZED, lambda layer, x: layer(x, training=True), 2),
    "not synchronized": ({}, lambda layer, x: layer(x, training=True), 0),
    "inference": (SYNCHRONIZED, lambda layer, x: layer(x), 0),
    "frozen": (SYNCHRONIZED, frozen, 0),
    "symbolic": (SYNCHRONIZED, symbolic, 0),
}


def sums(call, x, **how):
    with keras.StatelessScope():
        return str(jax.make_jaxpr(call, **how)(x)).count("= psum")


@every_layer
@pytest.mark.parametrize(("options", "call", "number"), CALLS.values(), ids=CALLS)
def test_only_training_sums_over_replicas_and_twice(kind, options, call, number):
    layer, x = built(kind, **options), PAIRS["equal"].x
    assert sums(lambda x: call(layer, x), x, axis_env=[(AXIS, 2)]) == number


@every_layer
def test_without_a_mapped_axis_nothing_is_summed(kind):
    layer, x = built(kind, **SYNCHRONIZED), PAIRS["equal"].x
    assert sums(lambda x: layer(x, training=True), x) == 0


@every_layer
@pytest.mark.parametrize("is_checked", [True, False], ids=["checked", "not checked"])
def test_one_replica_is_the_plain_layer(kind, is_checked):
    x, layer, plain = PAIRS["equal"].x, built(kind, **SYNCHRONIZED), built(kind)
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))

    def alone(layer, is_checked):
        return jax.shard_map(
            lambda x: forward(layer, x, values(layer)),
            mesh=mesh,
            in_specs=SPLIT,
            out_specs=(SPLIT, WHOLE),
            check_vma=is_checked,
        )

    found = jax.jit(alone(layer, is_checked))(x)
    # Nobody says of the plain one that its statistics are those of all.
    same = jax.jit(alone(plain, is_checked=False))(x)
    jax.tree.map(np.testing.assert_array_equal, found, same)


# What is refused.

ABSTRACT = AbstractMesh((REPLICAS,), (AXIS,))
MAPS = {
    "shard_map": (lambda f: jax.shard_map(f, mesh=ABSTRACT, in_specs=SPLIT, out_specs=SPLIT), AXIS),
    "pmap": (lambda f: lambda x: jax.pmap(f, AXIS)(x[None]), AXIS),
    # jax 0.10.2: pmap without a name.
    "pmap without a name": (lambda f: lambda x: jax.pmap(f)(x[None]), "_internal_pmap_axis_name"),
}
every_map = pytest.mark.parametrize(("over", "mapped"), MAPS.values(), ids=MAPS)


@every_map
@every_layer
@pytest.mark.parametrize("name", [None, "other"])
def test_statistics_of_one_shard_alone_are_refused(name, kind, over, mapped):
    layer = built(kind, synchronized=True, axis_name=name)
    text = (
        f"{type(layer).__name__}: `axis_name` must be the name of a mapped axis. "
        f"Received: axis_name={name!r}, mapped_axes=('{mapped}',). "
        "Give the layer the name that shard_map or pmap has for the axis of replicas."
    )
    with pytest.raises(ValueError) as error:  # noqa: PT011
        jax.eval_shape(over(lambda x: layer(x, training=True)), PAIRS["equal"].x)
    assert text in str(error.value)


@every_map
@every_layer
def test_inference_needs_no_name(kind, over, mapped):
    layer = built(kind, synchronized=True)
    x = PAIRS["equal"].x
    assert jax.eval_shape(over(layer), x).size == x.size


def test_other_names_of_vmap_are_not_seen():
    # jax 0.10.2 does not say what vmap maps: all that can be seen is that kept statistics differ.
    layer, x = built("batch", **SYNCHRONIZED), PAIRS["equal"].x.reshape(2, 4, 3, 2, 5)
    each = jax.vmap(lambda x: forward(layer, x, values(layer)), 0, (0, None), axis_name="other")
    with pytest.raises(ValueError, match="out_axes is None"):
        each(x)


# With `fit`.


@every(jax_fit.CASES)
def test_trained_weights_are_those_of_one_device(name, devices):
    assert devices[name]["difference"] <= 5e-5


NETWORKS = [name.removesuffix(", plain") for name in jax_fit.CASES if name.endswith("plain")]
# Per layer: pivot; offset and m2; in the gradient mean and m2. Those of gamma and beta go with the
# gradients of all weights. Whether a step counts is one number more where channels are split.
SENT = dict.fromkeys(NETWORKS, 2 * 3) | {"model_parallel, images": 2 * 3 + 1}


@every(NETWORKS)
def test_a_layer_adds_three_all_reduces_of_channels(name, devices):
    plain, ours = (devices[f"{name}, {norms}"]["sent"] for norms in ("plain", "synchronized"))
    assert len(ours["all-reduce"]) - len(plain["all-reduce"]) == SENT[name]
    assert sum(ours["all-reduce"]) - sum(plain["all-reduce"]) <= sent_numbers(name)


def sent_numbers(name):
    """Return how many numbers a step may send for two layers."""
    channels = 2 * jax_fit.WIDE if "table" in name else 8 + 16
    # Three in the forward pass, two in the backward pass, gamma and beta; whether a step counts.
    return 7 * channels + 1


@every(NETWORKS)
def test_a_layer_gathers_nothing(name, devices):
    plain, ours = (devices[f"{name}, {norms}"]["sent"] for norms in ("plain", "synchronized"))
    assert {**ours, "all-reduce": []} == {**plain, "all-reduce": []}


def test_ghosts_send_no_more_than_their_statistics(devices):
    plain, ghosts = (
        devices[f"DataParallel, images, {norms}"]["sent"] for norms in ("plain", "ghosts")
    )
    assert {**ghosts, "all-reduce": []} == {**plain, "all-reduce": []}
    *statistics, gradients = sorted(ghosts["all-reduce"])
    assert max(statistics) <= jax_fit.SAMPLES // 4 * 16
    assert gradients <= max(plain["all-reduce"]) + 2 * (8 + 16)


# In two processes.


def test_two_processes_train_the_weights_of_one(processes):
    assert max(processes["differences"]) <= 5e-5


def test_a_process_says_that_another_one_has_died(processes):
    assert re.search("Gloo .* failed: .* by peer", processes["error of the first"])


def test_processes_end_when_one_takes_a_step_less(processes):
    assert all(processes["ended"])
    assert all("Barrier timed out" in text for text in processes["said"])
