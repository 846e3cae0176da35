"""What only TensorFlow offers: graphs that are saved and read by something else."""

import keras
import numpy as np
import pytest

import keras_bn

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


@every_layer
def test_norm_that_xla_lacks_is_for_training_alone(make):
    layer = make()
    layer.build(SHAPE)
    assert "EuclideanNorm" not in operations(traced(layer, trained=False))
    assert "EuclideanNorm" in operations(traced(layer, trained=True))


@every_layer
def test_saved_graph_may_be_compiled_later(make, tmp_path):
    model = keras.Sequential([keras.Input(SHAPE[1:]), make()])
    model.export(tmp_path / "model", verbose=False)
    saved = tf.saved_model.load(tmp_path / "model")
    x = np.random.default_rng(0).normal(3, 1, SHAPE).astype("float32")
    compiled = tf.function(saved.serve, jit_compile=True)(x)
    assert np.allclose(compiled, model(x), atol=1e-5)
