"""Functions that TensorFlow replaces by the passes where a graph runs: nothing else changes."""

import contextlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_bn.kernels.compiled import place
from tests import oracle
from tests.cases import assert_close
from tests.kernels import hard
from tests.kernels.compiled_cases import every_layer
from tests.kernels.modes import as_saved

if keras.backend.backend() != "tensorflow":
    pytest.skip("functions of TensorFlow", allow_module_level=True)
if place("tensorflow_ops") is None:
    pytest.skip("built without a compiler, or switched off", allow_module_level=True)

import tensorflow as tf

import keras_bn
from keras_bn import kernels
from keras_bn.core.affine import AS_IS
from keras_bn.core.pooling import Pooling
from keras_bn.kernels import reference
from keras_bn.kernels.normalization import How
from keras_bn.kernels.tensorflow import compiled, replaced

ANY_SIZE = tf.TensorSpec((None, 5, 16))


def drawn(size=6):
    return np.random.default_rng(size).normal(3, 2, (size, 5, 16)).astype("float32")


@tf.function(input_signature=[ANY_SIZE])
def counted(x):
    return replaced.call(lambda _, x: x + 1, lambda _, x: x + 2, How(()), tf.sin(x)) - tf.sin(x)


def test_another_function_runs_than_is_saved(tmp_path):
    module = tf.Module()
    module.function = counted
    tf.saved_model.save(module, tmp_path / "model")
    x = drawn()
    assert np.allclose(counted(x), 2, atol=1e-6)
    with as_saved():
        assert np.allclose(counted.get_concrete_function()(tf.constant(x)), 1, atol=1e-6)
    load = f"import tensorflow as tf; f = tf.saved_model.load({str(tmp_path / 'model')!r}).function"
    use = "print('given', round(float(tf.reduce_mean(f(tf.ones((2, 5, 16))))), 5))"
    done = subprocess.run([sys.executable, "-c", f"{load}; {use}"], capture_output=True, text=True)
    assert "given 1.0" in done.stdout, done.stderr[-2000:]


@pytest.fixture
def marked(monkeypatch):
    """Let each of what replaces plain functions add 100 to y."""
    for name in ("_normalized", "_mapped"):
        own = getattr(compiled, name)

        def more(how, *inputs, own=own):
            found = own(how, *inputs)
            return (found[0] + 100, *found[1:]) if isinstance(found, tuple) else found + 100

        monkeypatch.setattr(compiled, name, more)


def compare(layer, x, mask=None, **use):
    """Compare the output in a graph, as it runs and as it is saved, with the reference."""
    graph = tf.function(lambda x: layer(x, mask=mask, **use), input_signature=[ANY_SIZE])
    for context in (contextlib.nullcontext, as_saved):
        weights = oracle.weights_by_name(layer)
        weighed = None if mask is None else mask[..., None]
        is_training = use.get("training", False)
        wanted = oracle.expected(layer, weights, x, x, training=is_training, mask=weighed)
        with context():
            found = graph(tf.constant(x))
        assert_close(found, wanted.y)


@every_layer
def test_a_layer_is_right_as_it_runs_and_as_it_is_saved(kind, options, use):
    layer = kind(**options)
    layer.build((None, 5, 16))
    for size in (6, 9):
        compare(layer, drawn(size), **use)


@pytest.mark.parametrize("kind", [keras_bn.GroupNormalization, keras_bn.InstanceNormalization])
def test_masked_inference_is_right_as_it_runs_and_as_it_is_saved(kind):
    layer = kind(4) if kind is keras_bn.GroupNormalization else kind()
    layer.build((None, 5, 16))
    compare(layer, drawn(), np.array([[True] * 3 + [False] * 2] * 6))


def used_in(way, layer):
    """Return a function that uses a layer within a part of a graph."""

    def loop(x):
        _, y = tf.while_loop(lambda i, _: i < 1, lambda i, x: (i + 1, layer(x)), (0, x))
        return y

    return {
        "loop": loop,
        "branch": lambda x: tf.cond(tf.reduce_max(x) > 0, lambda: layer(x), lambda: x),
        "function": lambda x: tf.function(layer.__call__)(x) * 1.0,
    }[way]


@pytest.mark.parametrize("way", ["loop", "branch", "function"])
@pytest.mark.parametrize("kind", [keras_bn.GroupNormalization, keras_bn.BatchNormalization])
def test_parts_of_graphs_are_replaced_too(marked, way, kind):
    layer = kind(8) if kind is keras_bn.GroupNormalization else kind()
    layer.build((None, 5, 16))
    graph = tf.function(used_in(way, layer), input_signature=[ANY_SIZE]).get_concrete_function()
    x = tf.constant(drawn())
    with as_saved():
        plain = graph(x)
    assert np.allclose(graph(x), plain + 100, atol=1e-4)


def test_predictions_of_a_model_go_through_the_passes(marked):
    layers = [keras.Input((5, 16)), keras_bn.LayerNormalization(), keras.layers.Dense(4)]
    model = keras.Sequential([*layers, keras_bn.GroupNormalization(2)])
    model.compile(jit_compile=False)
    assert np.all(model.predict(drawn(), verbose=0) > 50)


@pytest.mark.parametrize("kind", [keras_bn.LayerNormalization, keras_bn.BatchNormalization])
def test_a_gradient_may_be_asked_for_outside(kind):
    layer = kind()
    layer.build((None, 5, 16))
    x, found = tf.constant(drawn()), []
    for function in (tf.function(layer.__call__, input_signature=[ANY_SIZE]), layer):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.sin(function(x)))
        found.append(tape.gradient(y, [x, layer.gamma.value]))
    for own, wanted in zip(*found, strict=True):
        assert np.allclose(own, wanted, atol=1e-4)


def test_saved_gradients_hold_no_operations_of_ours(tmp_path):
    module = tf.Module()
    module.layer = layer = keras_bn.LayerNormalization()
    layer.build((None, 5, 16))
    module.function = tf.function(layer.__call__, input_signature=[ANY_SIZE])
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=True)
    tf.saved_model.save(module, tmp_path / "model", options=options)
    assert b"KerasBn" not in (tmp_path / "model" / "saved_model.pb").read_bytes()


def test_a_graph_that_was_traced_before_compiles_under_xla():
    layer = keras_bn.GroupNormalization(4)
    layer.build((None, 5, 16))
    graph = tf.function(layer.__call__, input_signature=[ANY_SIZE]).get_concrete_function()
    x = tf.constant(drawn())
    outer = tf.function(lambda x: graph(x) * 2, jit_compile=True)
    assert np.allclose(outer(x), 2 * layer(x), atol=1e-4)


def test_layers_alike_share_a_function():
    layers = [keras_bn.GroupNormalization(4) for _ in range(3)]
    model = keras.Sequential([keras.Input((5, 16)), *layers])
    graph = tf.function(model.__call__).get_concrete_function(ANY_SIZE).graph
    assert len(graph.as_graph_def().library.function) == 1


def test_a_graph_of_a_session_is_plain():
    with tf.Graph().as_default() as graph:
        given = tf.compat.v1.placeholder("float32", (None, 5, 16))
        y, _ = kernels.normalize(given, Pooling((1,)), AS_IS, hard.EPSILON, "float32")
        with tf.compat.v1.Session(graph=graph) as session:
            found = session.run(y, {given: drawn()})
    assert b"KerasBn" not in graph.as_graph_def().SerializeToString()
    assert_close(found, reference.normalize(drawn(), (1,), epsilon=hard.EPSILON))
