"""What only JAX offers: forward mode, vmap, and their combinations."""

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn import kernels
from keras_bn.core.affine import standardize

if keras.backend.backend() != "jax":
    pytest.skip("these are transformations of JAX", allow_module_level=True)

import jax
import jax.numpy as jnp

AXES = (0, 1)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def sample(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(3, 2, shape))


def normalized(x, weights=None):
    moments = kernels.moments(x, AXES, weights)
    return kernels.apply(x, standardize(moments, 1e-3), "float64")


def loss(x):
    return jnp.sum(jnp.sin(normalized(x)))


WEIGHTS = {"plain": None, "weighted": np.random.default_rng(1).integers(0, 3, (4, 5, 1)) / 2}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_jvp_agrees_with_finite_differences(weights, compiled):
    x, direction = sample(4, 5, 3), sample(4, 5, 3, seed=1)

    def function(x):
        return normalized(x, None if weights is None else jnp.asarray(weights))

    def forward(x, direction):
        return jax.jvp(function, (x,), (direction,))[1]

    found = (jax.jit(forward) if compiled else forward)(x, direction)
    difference = function(x + 1e-5 * direction) - function(x - 1e-5 * direction)
    assert np.allclose(found, difference / 2e-5, rtol=1e-6, atol=1e-8)


def test_jacfwd_is_jacrev():
    x = sample(4, 5, 3)
    assert np.allclose(jax.jacfwd(normalized)(x), jax.jacrev(normalized)(x), atol=1e-12)


def test_hessian_is_symmetric_and_agrees_with_finite_differences():
    x, direction = sample(2, 3, 2), sample(2, 3, 2, seed=1)
    hessian = jax.jit(jax.hessian(loss))(x).reshape(12, 12)
    gradient = jax.grad(loss)
    difference = gradient(x + 1e-5 * direction) - gradient(x - 1e-5 * direction)
    assert np.allclose(hessian, hessian.T, atol=1e-12)
    assert np.allclose(hessian @ direction.ravel(), difference.ravel() / 2e-5, atol=1e-8)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["x", "weights", "both"])
def test_vmap_is_a_loop(axes):
    x = sample(6, 4, 5, 3) if axes[0] == 0 else sample(4, 5, 3)
    weights = jnp.asarray(np.random.default_rng(2).integers(0, 3, (6, 4, 5, 1)) / 2)
    weights = weights if axes[1] == 0 else weights[0]
    found = jax.vmap(normalized, axes)(x, weights)
    rows = [
        (x[i] if axes[0] == 0 else x, weights[i] if axes[1] == 0 else weights) for i in range(6)
    ]
    assert np.allclose(found, [normalized(*row) for row in rows], atol=1e-13)


def test_vmap_of_gradients_is_a_loop():
    x = sample(6, 4, 5, 3)
    found = jax.vmap(jax.grad(loss))(x)
    assert np.allclose(found, [jax.grad(loss)(row) for row in x], atol=1e-13)


SAVING = {
    "batch": keras_bn.BatchNormalization,
    "groups": keras_bn.GroupNormalization,
    "instances": keras_bn.InstanceNormalization,
    "rows": keras_bn.LayerNormalization,
}


@pytest.mark.parametrize("make", SAVING.values(), ids=SAVING)
def test_of_the_input_s_size_only_the_input_is_kept_for_backward(make):
    layer, x = make(), jnp.asarray(sample(4, 16, 16, 64), "float32")
    layer.build(x.shape)
    weights = [
        [v.value for v in kept]
        for kept in (layer.trainable_variables, layer.non_trainable_variables)
    ]
    use = {"training": True} if layer.non_trainable_variables else {}
    _, gradient = jax.vjp(lambda x: layer.stateless_call(*weights, x, **use)[0], x)
    large = [leaf for leaf in jax.tree.leaves(gradient) if leaf.nbytes >= x.nbytes]
    assert len(large) == 1
    assert (large[0] == x).all()


def test_a_checkpoint_changes_no_gradient():
    x = sample(4, 5, 3)
    assert np.allclose(jax.grad(jax.checkpoint(loss))(x), jax.grad(loss)(x), atol=1e-13)


def test_a_scan_over_batches_has_the_gradients_of_a_loop():
    x = sample(6, 4, 5, 3)

    def scanned(x):
        return jax.lax.scan(lambda total, row: (total + loss(row), None), 0.0, x)[0]

    expected = jax.grad(lambda x: sum(loss(row) for row in x))(x)
    assert np.allclose(jax.grad(scanned)(x), expected, atol=1e-12)
