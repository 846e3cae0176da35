"""What only TensorFlow offers: graphs that are saved and read by something else."""

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn.kernels.compiled import place

if keras.backend.backend() != "tensorflow":
    pytest.skip("these are properties of TensorFlow", allow_module_level=True)

import tensorflow as tf

SHAPE = (8, 6, 6, 64)
LAYERS = {
    "layer": keras_bn.LayerNormalization,
    "group": lambda: keras_bn.GroupNormalization(8),
    "instance": keras_bn.InstanceNormalization,
    "rms": keras_bn.RMSNormalization,
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def traced(layer, *, trained):
    """Return the graph of an output, traced under a tape as in training, or without one."""

    @tf.function
    def function(x):
        if not trained:
            return layer(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, x)

    return function.get_concrete_function(tf.TensorSpec(SHAPE)).graph


def operations(graph):
    return {operation.type for operation in graph.get_operations()}


# What a graph must not hold that somebody else is to read, or to compile.
OURS = {"EuclideanNorm", "KerasBnNormalize", "KerasBnGradients"}


@every_layer
def test_operations_that_others_lack_are_for_training_alone(make):
    layer = make()
    layer.build(SHAPE)
    assert not operations(traced(layer, trained=False)) & OURS
    assert operations(traced(layer, trained=True)) & OURS


@every_layer
@pytest.mark.skipif(place("tensorflow_ops") is None, reason="built without a compiler")
def test_training_goes_through_the_passes(make):
    layer = make()
    layer.build(SHAPE)
    assert operations(traced(layer, trained=True)) >= {"KerasBnNormalize", "KerasBnGradients"}


@every_layer
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
def test_jacobian_is_a_loop_over_gradients(make, compiled):
    layer = make()
    layer.build((None, 2, 64))
    x = tf.constant(np.random.default_rng(0).normal(3, 2, (1, 2, 64)), tf.float32)

    def jacobian(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)[0, :, :3]
        return tape.jacobian(y, x)

    found = (tf.function(jacobian) if compiled else jacobian)(x)
    for place_of, gradient in np.ndenumerate(np.zeros((2, 3))):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)[0][place_of]
        assert np.allclose(found[place_of], tape.gradient(y, x), atol=1e-5), gradient


def test_an_empty_batch_has_gradients_of_0():
    layer = keras_bn.LayerNormalization()
    layer.build((None, 5))

    @tf.function(input_signature=[tf.TensorSpec((None, 5))])
    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, [x, *(weight.value for weight in layer.trainable_variables)])

    dx, *others = gradients(tf.zeros((0, 5)))
    assert dx.shape == (0, 5)
    assert np.array_equal(others, np.zeros((2, 5)))


@every_layer
def test_saved_graph_may_be_compiled_later(make, tmp_path):
    model = keras.Sequential([keras.Input(SHAPE[1:]), make()])
    model.export(tmp_path / "model", verbose=False)
    saved = tf.saved_model.load(tmp_path / "model")
    x = np.random.default_rng(0).normal(3, 1, SHAPE).astype("float32")
    compiled = tf.function(saved.serve, jit_compile=True)(x)
    assert np.allclose(compiled, model(x), atol=1e-5)
