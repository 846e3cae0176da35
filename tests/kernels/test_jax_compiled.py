"""The passes in C as operations of JAX: right, and in plain JAX wherever they do not serve."""

import re

import keras
import numpy as np
import pytest

from keras_bn.core.affine import Learned
from keras_bn.core.estimators import Correction, Limits
from keras_bn.core.pooling import Pooling
from keras_bn.kernels.compiled import library, numbers
from tests.kernels import hard
from tests.kernels.compiled_cases import (
    compare,
    compare_groups,
    compare_weighted,
    drawn,
    drawn_groups,
    drawn_to_correct,
    every_corrected,
    every_handed,
    every_weight,
)

if keras.backend.backend() != "jax":
    pytest.skip("operations of JAX", allow_module_level=True)
if library() is None:
    pytest.skip("built without a compiler, or switched off", allow_module_level=True)

import jax
import jax.numpy as jnp

import keras_bn
from keras_bn import kernels
from keras_bn.kernels.jax import compiled

CALL = re.compile(r"custom_call @keras_bn_(\w+)")


@pytest.fixture
def in_plain(monkeypatch):
    """Switch the operations off from here on."""

    def switch():
        monkeypatch.setattr(compiled, "serves", lambda *_, **__: False)

    return switch


def normalized(axes, dtype="float32"):
    def function(x, gamma, beta):
        pooling, learned = Pooling(axes), Learned(gamma, beta)
        y, moments = kernels.normalize(x, pooling, learned, hard.EPSILON, dtype)
        return y, moments.variance

    return function


@every_handed
def test_normalization_and_its_gradients_are_right(shape, axes, varied, dtype, mean):
    x, dy, gamma, beta = drawn(shape, axes, varied, mean, dtype)

    @jax.jit
    def all_of(x, dy, gamma, beta):
        y, pull, variance = jax.vjp(normalized(axes, dtype), x, gamma, beta, has_aux=True)
        return y, variance, *pull(dy)

    given = [jnp.asarray(part) for part in (x, dy, gamma, beta)]
    assert set(CALL.findall(all_of.lower(*given).as_text())) == {"normalize", "gradients"}
    found = [np.asarray(part, "float64") for part in all_of(*given)]
    compare(found, x, dy, gamma, beta, axes, dtype)


@pytest.mark.parametrize("axis", [1, 2], ids=["first", "last"])
def test_groups_are_merged_as_the_core_merges_them(axis):
    x, pooling = drawn_groups(axis)
    given = (pooling, Learned(None, None), hard.EPSILON, "float32")
    compare_groups(jax.jit(lambda x: kernels.normalize(x, *given)[0])(x), x, axis)


def test_sets_are_merged_within_transforms_too():
    many = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (3, 4, 60, 7)), "float32")

    def merged(x):
        given = (Pooling((0,)), Learned(None, None), hard.EPSILON, "float32")
        return kernels.normalize(x, *given, merges=True)[1][1:]

    each = jax.jit(merged)
    assert CALL.findall(each.lower(many[0]).as_text()) == ["normalize"]
    for x, *found in zip(many, *jax.vmap(merged)(many), strict=True):
        for own, wanted in zip(found, each(x), strict=True):
            assert np.allclose(own, wanted, rtol=1e-5, atol=1e-6)
    assert not any(part.any() for part in jax.jvp(merged, (many[0],), (many[0],))[1])


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=str)
@every_weight
def test_weights_count_and_what_lies_under_a_0_does_not(axes, sizes):
    def moments(x, weights, _):
        function = jax.jit(lambda x, w: kernels.moments(x, axes, w)[1:])
        assert CALL.findall(function.lower(x, weights).as_text()) == ["moments"]
        return [np.asarray(part) for part in function(x, weights)]

    compare_weighted(moments, sizes, axes)


# Each goes through other rules of the operations.
DERIVATIVES = {
    "forward": lambda f, x, v: jax.jvp(f, (x,), (v,))[1],
    "forward over reverse": lambda f, x, v: jax.jvp(jax.grad(f), (x,), (v,))[1],
    "reverse over reverse": lambda f, x, v: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x),
    "reverse over forward": lambda f, x, v: jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1])(x),
    "vmap of reverse": lambda f, x, v: jax.vmap(jax.grad(f))(jnp.stack([x, v])),
    "third": lambda f, x, v: jax.jvp(lambda x: jax.jvp(jax.grad(f), (x,), (v,))[1], (x,), (x * v,))[
        1
    ],
    "recomputed": lambda f, x, _: jax.grad(jax.checkpoint(f))(x),
}
LAYERS = {
    "batch": (keras_bn.BatchNormalization, {}, {"training": True}),
    "renormalization": (keras_bn.BatchRenormalization, {}, {"training": True}),
    "ghosts": (keras_bn.BatchNormalization, {"virtual_batch_size": 2}, {"training": True}),
    "groups": (keras_bn.GroupNormalization, {"groups": 4}, {}),
    "layer": (keras_bn.LayerNormalization, {}, {}),
    "root mean square": (keras_bn.RMSNormalization, {}, {}),
    "no scale": (keras_bn.LayerNormalization, {"scale": False}, {}),
    "nothing learned": (keras_bn.LayerNormalization, {"scale": False, "center": False}, {}),
}


# Each compiles two programs.
SOME = ("batch", "groups", "nothing learned")
DERIVED = [
    ("jit", layer, derivative)
    for layer in LAYERS
    for derivative in DERIVATIVES
    if layer in SOME or derivative in ("reverse over reverse", "vmap of reverse")
] + [("eager", "batch", derivative) for derivative in DERIVATIVES]


@pytest.mark.parametrize(("mode", "name", "derivative"), DERIVED)
def test_derivatives_are_those_of_the_plain_kernels(mode, name, derivative, in_plain):
    jit = jax.jit if mode == "jit" else lambda function: function
    derivative = DERIVATIVES[derivative]
    kind, options, use = LAYERS[name]
    layer, rng = kind(**options), np.random.default_rng(0)
    layer.build((6, 5, 16))
    x, v, w = (jnp.asarray(rng.normal(0.5, 1, (6, 5, 16)), "float32") for _ in range(3))
    trained = [weight + 0.3 for weight in layer.trainable_variables]
    kept = [weight.value for weight in layer.non_trainable_variables]

    def scalar(x):
        return jnp.vdot(jnp.sin(layer.stateless_call(trained, kept, x, **use)[0]), w)

    found = jit(lambda x, v: derivative(scalar, x, v))(x, v)
    in_plain()
    wanted = jit(lambda x, v: derivative(scalar, x, v))(x, v)
    scale = float(jnp.max(jnp.abs(wanted)))
    assert np.allclose(found, wanted, rtol=1e-4, atol=2e-5 * scale)


@every_corrected
def test_sets_are_corrected_as_the_core_corrects_them(shape, learned, limits):
    big, kept = drawn_to_correct(shape)
    x, dy, mean, stddev, gamma, beta = map(jnp.asarray, big + kept)
    correct = Correction(mean, stddev, Limits(*limits), hard.EPSILON)
    given, pooling, results = ((gamma, beta) if learned else ()), Pooling((x.ndim - 2,)), []
    for own in (correct, lambda batch: correct(batch)):

        def normalized(x, *parts, own=own):
            parts = Learned(*parts) if parts else Learned(None, None)
            return kernels.normalize(x, pooling, parts, hard.EPSILON, "float32", correct=own)[0]

        def all_of(x, *parts, normalized=normalized):
            y, pull = jax.vjp(normalized, x, *parts)
            return y, *pull(dy)

        names = set(CALL.findall(jax.jit(all_of).lower(x, *given).as_text()))
        assert names == ({"normalize", "gradients"} if own is correct else {"moments"})
        results.append(jax.jit(all_of)(x, *given))
    for found, wanted in zip(*results, strict=True):
        assert np.allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(("kind", "options", "use"), LAYERS.values(), ids=LAYERS)
def test_what_is_learned_has_the_gradient_of_the_plain_kernels(kind, options, use, in_plain):
    layer, rng = kind(**options), np.random.default_rng(0)
    layer.build((6, 5, 16))
    x, w = (jnp.asarray(rng.normal(0.5, 1, (6, 5, 16)), "float32") for _ in range(2))
    kept = [weight.value for weight in layer.non_trainable_variables]

    def scalar(trained):
        return jnp.vdot(layer.stateless_call(trained, kept, x, **use)[0], w)

    trained = [weight.value for weight in layer.trainable_variables]
    found = jax.grad(scalar)(trained)
    in_plain()
    for own, wanted in zip(found, jax.grad(scalar)(trained), strict=True):
        assert np.allclose(own, wanted, rtol=1e-4, atol=1e-4)


def test_an_export_holds_no_operation_of_ours():
    layer = keras_bn.GroupNormalization(groups=4)
    layer.build((2, 5, 16))
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    called = jax.jit(layer.__call__)
    assert CALL.search(called.lower(x).as_text())
    exported = jax.export.export(called)(x)
    assert not CALL.search(exported.mlir_module())
    assert np.allclose(exported.call(x), called(x), atol=1e-5)


# Where the type of an array tells how it lies on devices, what comes of it must tell that, too.
@pytest.mark.parametrize("kind", [keras_bn.BatchNormalization, keras_bn.LayerNormalization])
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_a_mesh_of_one_device_is_one_as_any(kind, axis_type):
    layer, batch = kind(), jax.sharding.PartitionSpec("batch")
    layer.build((8, 6, 16))
    types = (getattr(jax.sharding.AxisType, axis_type),)
    mesh = jax.make_mesh((1,), ("batch",), axis_types=types)
    x = jax.random.normal(jax.random.key(0), (8, 6, 16))
    on_mesh = jax.device_put(x, jax.sharding.NamedSharding(mesh, batch))
    trained = [weight.value for weight in layer.trainable_variables]
    kept = [weight.value for weight in layer.non_trainable_variables]
    use = {"training": True} if kind is keras_bn.BatchNormalization else {}

    def gradient(x):
        return jax.grad(lambda x: jnp.sin(layer.stateless_call(trained, kept, x, **use)[0]).sum())(
            x
        )

    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=batch, out_specs=batch)
    for way in (jax.jit(mapped), jax.jit(gradient)):
        assert np.allclose(way(on_mesh), gradient(x), atol=1e-4)


UNSERVED = {
    "eight axes": lambda: jnp.zeros((1,) * 7 + (3,)),
    "whole numbers": lambda: jnp.zeros((4, 3), "int32"),
    "empty": lambda: jnp.zeros((0, 3)),
}


@pytest.mark.parametrize("given", UNSERVED.values(), ids=UNSERVED)
def test_what_is_not_served_is_refused(given):
    assert not compiled.serves(given())


def test_float64_is_not_served():
    with jax.enable_x64(True):
        assert not compiled.serves(jnp.zeros((4, 3), "float64"))


def test_what_the_passes_cannot_do_is_an_error():
    x = jnp.zeros((2, 3) * 4)
    given = np.array(numbers(range(0, 8, 2)), np.int64)
    call = jax.ffi.ffi_call("keras_bn_moments", jax.ShapeDtypeStruct((3, *(1, 3) * 4), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="too many axes"):
        jax.block_until_ready(call(x, numbers=given, epsilon=np.zeros(1)))
