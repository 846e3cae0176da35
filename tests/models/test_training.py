"""Networks train in every way that Keras, and each backend below it, offers."""

import keras
import numpy as np
import pytest

from tests.models.networks import LAYERS, assert_close, called, images, layer_like, network

BACKEND = keras.backend.backend()
SPEED = 0.1
TARGETS = np.random.default_rng(1).normal(size=(6, 2)).astype("float32")

every_layer = pytest.mark.parametrize("name", LAYERS)


# Loops.


def loop_of_tensorflow(model, x, y):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    keras.optimizers.SGD(SPEED).apply(gradients, model.trainable_variables)


def loop_of_jax(model, x, y):
    import jax

    def loss(trainable, fixed):
        predictions, fixed = model.stateless_call(trainable, fixed, x, training=True)
        return ((predictions - y) ** 2).mean(), fixed

    variables = model.trainable_variables + model.non_trainable_variables
    trainable = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]
    gradients, fixed = jax.jit(jax.grad(loss, has_aux=True))(trainable, fixed)
    trainable = [value - SPEED * g for value, g in zip(trainable, gradients, strict=True)]
    for variable, value in zip(variables, trainable + fixed, strict=True):
        variable.assign(value)


def loop_of_torch(model, x, y):
    import torch

    optimizer = torch.optim.SGD(model.parameters(), SPEED)
    ((model(x, training=True) - torch.from_numpy(y)) ** 2).mean().backward()
    optimizer.step()


def test_custom_loop_is_a_step_of_fit():
    model, other = network(), network()
    other.set_weights(model.get_weights())
    model.compile(keras.optimizers.SGD(SPEED), "mse")
    model.fit(images(), TARGETS, batch_size=6, verbose=0)
    globals()[f"loop_of_{BACKEND}"](other, images(), TARGETS)
    assert_close(other.get_weights(), model.get_weights())


def test_fit_takes_an_uneven_last_batch():
    model = network()
    model.compile(keras.optimizers.SGD(SPEED), "mse")
    history = model.fit(images(), TARGETS, batch_size=4, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]


# Shared layers.


@every_layer
def test_shared_layer_gets_the_gradient_of_both_uses(name, run):
    layer = LAYERS[name]()
    inputs = keras.Input((5, 5, 4)), keras.Input((5, 5, 4))
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 5, 4)).astype("float32")
    model = keras.Model(inputs, keras.layers.Add()([layer(part) for part in inputs]))
    alone = [run(layer_like(layer), part, np.ones_like(part), training=True) for part in x]
    found = run(Summed(model), x, np.ones_like(x[0]), training=True)
    wanted = [sum(one.gradients[n] for one in alone) for n in ("gamma", "beta")]
    assert_close([found.gradients[n] for n in ("gamma", "beta")], wanted)
    assert_close(found.dx, [one.dx for one in alone])


class Summed(keras.layers.Layer):
    """Calls a model of two inputs with one that holds both."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.built = True

    def call(self, x, training=None):
        return self.model([x[0], x[1]], training=training)


# Gradients of gradients. Only our layer: in Keras 3.15.1 a Dense layer of the policy "float64" is
# as exact as float32 on JAX and torch, too little for finite differences.


def penalty_of_tensorflow(layer, values):
    import tensorflow as tf

    with tf.GradientTape() as outer:
        outer.watch(values)
        with tf.GradientTape() as inner:
            inner.watch(values)
            loss = tf.reduce_sum(called(layer, values) ** 3)
        penalty = sum(tf.reduce_sum(g**2) for g in inner.gradient(loss, values))
    return penalty, outer.gradient(penalty, values)


def penalty_of_jax(layer, values):
    import jax

    def loss(values):
        return (called(layer, values) ** 3).sum()

    def penalty(values):
        return sum((g**2).sum() for g in jax.grad(loss)(values))

    return jax.jit(jax.value_and_grad(penalty))(values)


def penalty_of_torch(layer, values):
    import torch

    values = [value.detach().requires_grad_() for value in values]
    loss = (called(layer, values) ** 3).sum()
    penalty = sum((g**2).sum() for g in torch.autograd.grad(loss, values, create_graph=True))
    return penalty.detach(), torch.autograd.grad(penalty, values)


@every_layer
@pytest.mark.usefixtures("x64")
def test_gradient_penalty_has_the_gradient_of_finite_differences(name):
    layer = layer_like(LAYERS[name](dtype="float64"))
    rng = np.random.default_rng(0)
    start, ways = ([rng.normal(size=s) for s in ((3, 2, 1, 4), 4, 4)] for _ in range(2))

    def penalty(distance):
        moved = [value + distance * way for value, way in zip(start, ways, strict=True)]
        tensors = [keras.ops.convert_to_tensor(value, "float64") for value in moved]
        return globals()[f"penalty_of_{BACKEND}"](layer, tensors)

    slope = float(penalty(1e-5)[0] - penalty(-1e-5)[0]) / 2e-5
    gradients = [keras.ops.convert_to_numpy(g) for g in penalty(0.0)[1]]
    # The differences are off by the third derivative times 1e-10, and by rounding over 1e-5.
    np.testing.assert_allclose(sum(map(np.vdot, gradients, ways)), slope, rtol=1e-7)
