"""Layers may be differentiated forward, and twice, as functions of their weights and input."""

import keras
import numpy as np
import pytest

from tests.models.networks import LAYERS, called, layer_like

if keras.backend.backend() != "jax":
    pytest.skip("these are transformations of JAX", allow_module_level=True)

import jax

every_layer = pytest.mark.parametrize("name", LAYERS)
pytestmark = pytest.mark.usefixtures("x64")


def jax_loss(name):
    """Return a loss of gamma and x through a layer, and values for both."""
    layer = layer_like(LAYERS[name](dtype="float64"))
    beta = layer.beta.value

    def loss(gamma, x):
        return (called(layer, [x, gamma, beta]) ** 3).sum()

    rng = np.random.default_rng(0)
    return loss, rng.normal(size=4), rng.normal(size=(2, 1, 2, 4))


@every_layer
def test_forward_mode_agrees_with_reverse_mode(name):
    loss, gamma, x = jax_loss(name)
    ways = np.ones_like(gamma), np.cos(x)
    _, slope = jax.jit(lambda *v: jax.jvp(loss, v, ways))(gamma, x)
    gradients = jax.jit(jax.grad(loss, (0, 1)))(gamma, x)
    np.testing.assert_allclose(slope, sum(map(np.vdot, gradients, ways)), rtol=1e-12)


@every_layer
def test_hessian_is_the_slope_of_the_gradient(name):
    loss, gamma, x = jax_loss(name)
    hessian = jax.jit(jax.hessian(loss, 1))(gamma, x).reshape(x.size, x.size)
    gradient = jax.jit(jax.grad(loss, 1))
    step = 1e-5 * np.cos(x)
    differences = (gradient(gamma, x + step) - gradient(gamma, x - step)).ravel() / 2e-5
    np.testing.assert_allclose(hessian @ np.cos(x).ravel(), differences, rtol=1e-5, atol=1e-5)
