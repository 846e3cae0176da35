"""Statistics of all replicas in JAX: mapped axes, and arrays that are spread over devices."""

import fcntl
import json
import os

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
from tests.distributed.jax_maps import AXIS, SPLIT, VMAP, WAYS, WHOLE, Way, cases, forward, values

SYNCHRONIZED = {"synchronized": True, "axis_name": AXIS}
DEVICES = "--xla_force_host_platform_device_count={}"
# Half of the time of so many small programs is the compiler's.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

every_layer = pytest.mark.parametrize("kind", LAYERS)


def of(table):
    return pytest.mark.parametrize("name", table)


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Return a function that gives what a program prints, run once for all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def found(name, *arguments, flags="", limit=180):
        file = base / "-".join(["jax", name, *arguments])
        with open(f"{file}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                path = f"tests/distributed/{name}.py"
                file.write_text(
                    run(path, *arguments, backend="jax", limit=limit, XLA_FLAGS=flags)
                )
        return json.loads(file.read_text().splitlines()[-1])

    return found


# On a mapped axis.


@of(cases(WAYS))
def test_replicas_are_normalized_as_one_batch(name, program):
    found = program("jax_maps", flags=f"{DEVICES.format(2)} {QUICK}")[name]
    assert max(found.values()) <= cases(WAYS)[name][-1].tolerance, found


@of(cases(VMAP))
def test_replicas_of_vmap_are_normalized_as_one_batch(name):
    way, kind, shards = cases(VMAP)[name]
    found = jax_maps.found_errors(way, kind, shards, **SYNCHRONIZED)
    assert max(found.values()) <= shards.tolerance, found


@of(cases(VMAP[:1]))
def test_without_synchronization_they_are_not(name):
    way, kind, shards = cases(VMAP)[name]
    found = jax_maps.found_errors(way, kind, shards)
    assert max(found.values()) > 100 * shards.tolerance


@every_layer
def test_ghosts_are_local_and_what_is_kept_is_of_all(kind):
    shards = Shards((6, 6))
    (y, _), (_, state) = jax_maps.step(
        VMAP[0], kind, (*SYNCHRONIZED.items(), ("virtual_batch_size", 4))
    )({"x": shards.x, "dy": shards.dy}, values(built(kind)))
    layer = built(kind)
    kept = wanted(layer, shards.x).state
    layer.virtual_batch_size = 4
    own = [wanted(layer, part).y for part in shards.cut(shards.x)]
    np.testing.assert_allclose(y, np.concatenate(own), rtol=0, atol=shards.tolerance)
    for variable, array in zip(layer.non_trainable_variables, state, strict=True):
        np.testing.assert_allclose(array, [kept[variable.name]] * 2, rtol=shards.tolerance)


def wanted(layer, x):
    return expected(layer, weights_by_name(layer), x, np.zeros_like(x), training=True)


@every_layer
@pytest.mark.parametrize("mapped", ["vmap", "shard_map checked", "shard_map"])
def test_forward_mode_agrees_with_reverse_mode(kind, mapped):
    shards, layer = PAIRS["equal"], built(kind, **SYNCHRONIZED)
    way = Way(mapped.split()[0], False, "checked" in mapped)
    each = way.over(lambda x, trainable: forward(layer, x, trainable)) if way else None
    y = lambda x, trainable: each(x, trainable)[0]
    ways = np.cos(shards.x), [np.sin(v + 1) for v in values(layer)]
    _, slope = jax.jvp(y, (shards.x, values(layer)), ways)
    _, pull = jax.vjp(y, shards.x, values(layer))
    back = sum(map(np.vdot, jax.tree.leaves(pull(shards.dy)), jax.tree.leaves(ways)))
    np.testing.assert_allclose(np.vdot(slope, shards.dy), back, rtol=1e-5)
