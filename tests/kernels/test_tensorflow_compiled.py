"""The passes in C as operations of TensorFlow and as calls of its XLA: right in both."""

import re

import keras
import numpy as np
import pytest

from keras_bn.core.affine import Learned
from keras_bn.core.estimators import Correction, Limits
from keras_bn.core.pooling import Pooling
from keras_bn.kernels.compiled import place
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
    every_layer,
    every_weight,
)

if keras.backend.backend() != "tensorflow":
    pytest.skip("operations of TensorFlow", allow_module_level=True)
if place("tensorflow_ops") is None:
    pytest.skip("built without a compiler, or switched off", allow_module_level=True)

import tensorflow as tf

import keras_bn
from keras_bn import kernels
from keras_bn.kernels.tensorflow import calls, compiled

CALL = re.compile(r"custom_call @keras_bn_(\w+)")
every_way = pytest.mark.parametrize("xla", [False, True], ids=["graph", "XLA"])


def traced(function, *arrays, xla, unknown=True):
    """Return a function as a graph, which knows no size of its first argument's first axis."""
    given = [tf.constant(array) for array in arrays]
    specs = [tf.TensorSpec(part.shape, part.dtype) for part in given]
    if unknown:
        specs[0] = tf.TensorSpec([None, *given[0].shape[1:]], given[0].dtype)
    graph = tf.function(function, jit_compile=xla).get_concrete_function(*specs)
    return graph, given


def operations(graph):
    """Return the passes that a graph, or a function in it, names: as operations or as calls."""
    defined = graph.graph.as_graph_def()
    found = set()
    for nodes in (defined.node, *(own.node_def for own in defined.library.function)):
        for node in nodes:
            if node.op.startswith("KerasBn"):
                found.add(node.op.removeprefix("KerasBn").lower())
            elif node.op == "XlaCallModule":
                found.update(CALL.findall(node.attr["module"].s.decode()))
    return found


def whole(axes, dtype="float32", correct=None):
    """Return y, the variance and the gradients of x, gamma and beta."""

    def function(x, dy, *learned):
        given = Learned(*learned) if learned else Learned(None, None)
        with tf.GradientTape() as tape:
            tape.watch([x, *learned])
            y, moments = kernels.normalize(
                x, Pooling(axes), given, hard.EPSILON, dtype, correct=correct
            )
        return y, moments.variance, *tape.gradient(y, [x, *learned], tf.cast(dy, y.dtype))

    return function


@every_handed
@every_way
def test_normalization_and_its_gradients_are_right(shape, axes, varied, dtype, mean, xla):
    x, dy, gamma, beta = drawn(shape, axes, varied, mean, dtype)
    is_unknown = 0 not in varied and 0 in axes
    graph, given = traced(whole(axes, dtype), x, dy, gamma, beta, xla=xla, unknown=is_unknown)
    assert operations(graph) == {"normalize", "gradients"}
    found = [np.asarray(part, "float64") for part in graph(*given)]
    compare(found, x, dy, gamma, beta, axes, dtype)


@every_way
@pytest.mark.parametrize("axis", [1, 2], ids=["first", "last"])
def test_groups_are_merged_as_the_core_merges_them(axis, xla):
    x, pooling = drawn_groups(axis)

    def normalized(x):
        with tf.GradientTape():
            return kernels.normalize(x, pooling, Learned(None, None), hard.EPSILON, "float32")[0]

    graph, given = traced(normalized, x, xla=xla)
    assert operations(graph) == {"normalize"}
    compare_groups(graph(*given), x, axis)


@every_way
def test_ghosts_are_merged_in_one_pass(xla):
    layer = keras_bn.BatchNormalization(virtual_batch_size=2)
    layer.build((6, 5, 16))
    step, x = gradients_of(layer, {"training": True}), np.zeros((6, 5, 16), "float32")
    graph, _ = traced(step, x, xla=xla, unknown=False)
    assert operations(graph) == {"normalize", "gradients"}


@every_way
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=str)
@every_weight
def test_weights_count_and_what_lies_under_a_0_does_not(axes, sizes, xla):
    def moments(x, weights, count):
        graph, given = traced(taped, x, weights, count, xla=xla, unknown=False)
        assert operations(graph) == {"moments"}
        return [part.numpy() for part in graph(*given)]

    def taped(x, weights, count):
        with tf.GradientTape():
            return compiled.moments(None, x, weights, count, axes)

    compare_weighted(moments, sizes, axes)


@every_way
@every_corrected
def test_sets_are_corrected_as_the_core_corrects_them(shape, learned, limits, xla):
    (x, dy), (mean, stddev, gamma, beta) = drawn_to_correct(shape)
    ends = Limits(*(None if end is None else tf.constant(end) for end in limits))
    correct = Correction(tf.constant(mean), tf.constant(stddev), ends, hard.EPSILON)
    given = [x, dy, gamma, beta] if learned else [x, dy]
    axes, results = (x.ndim - 2,), []
    for own in (correct, lambda batch: correct(batch)):
        graph, parts = traced(whole(axes, correct=own), *given, xla=xla)
        results.append([part.numpy() for part in graph(*parts)])
        assert ("normalize" in operations(graph)) == (own is correct)
    for found, wanted in zip(*results, strict=True):
        assert np.allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


def gradients_of(layer, use):
    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.sin(layer(x, **use)))
        weights = [weight.value for weight in layer.trainable_variables]
        return tape.gradient(y, [x, *weights])

    return function


@every_layer
def test_one_program_serves_any_batch_size(kind, options, use):
    layer = kind(**options)
    layer.build((None, 5, 16))
    step = gradients_of(layer, use)
    any_size = [tf.TensorSpec((None, 5, 16))]
    compiled_step = tf.function(step, jit_compile=True, input_signature=any_size)
    for size in (6, 9):
        x = tf.random.stateless_normal((size, 5, 16), (0, size))
        state = [weight.numpy() for weight in layer.non_trainable_variables]
        found = compiled_step(x)
        for weight, value in zip(layer.non_trainable_variables, state, strict=True):
            weight.assign(value)
        for own, wanted in zip(found, step(x), strict=True):
            assert np.allclose(own, wanted, atol=1e-4)
    assert operations(compiled_step.get_concrete_function())


@every_layer
def test_an_empty_batch_has_gradients_of_0(kind, options, use):
    layer = kind(**options)
    layer.build((None, 5, 16))
    any_size = [tf.TensorSpec((None, 5, 16))]
    step = tf.function(gradients_of(layer, use), jit_compile=True, input_signature=any_size)
    for part in step(tf.zeros((0, 5, 16))):
        assert not np.any(part)


def test_a_gradient_may_be_asked_for_outside():
    layer = keras_bn.GroupNormalization(4)
    layer.build((6, 5, 16))
    x, found = tf.random.stateless_normal((6, 5, 16), (0, 0)), []
    for function in (tf.function(layer.__call__, jit_compile=True), layer):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.sin(function(x)))
        found.append(tape.gradient(y, x))
    assert np.allclose(*found, atol=1e-5)


def test_inference_goes_through_the_passes_under_xla_alone():
    layer = keras_bn.GroupNormalization(4)
    layer.build((None, 5, 16))
    x = np.random.default_rng(0).normal(size=(6, 5, 16)).astype("float32")
    graph, given = traced(layer.__call__, x, xla=True)
    assert operations(graph) == {"normalize"}
    plain, _ = traced(layer.__call__, x, xla=False)
    assert not operations(plain)
    assert np.allclose(graph(*given), plain(*given), atol=1e-5)


# What Keras exports is no function for XLA, whatever the model trains and predicts with.
def test_a_model_that_xla_compiles_is_exported_without_operations_of_ours(tmp_path):
    model = keras.Sequential([keras.Input((5, 16)), keras_bn.GroupNormalization(4)])
    model.compile("sgd", "mse", jit_compile=True)
    x = np.random.default_rng(0).normal(3, 1, (6, 5, 16)).astype("float32")
    model.fit(x, x, verbose=0)
    predicted = model.predict(x, verbose=0)
    model.export(tmp_path / "model", verbose=False)
    saved = tf.saved_model.load(tmp_path / "model")
    assert not operations(saved.signatures["serving_default"])
    assert np.allclose(saved.serve(x), predicted, atol=1e-5)


def test_without_such_calls_xla_gets_the_plain_kernels(monkeypatch):
    layer = keras_bn.LayerNormalization()
    layer.build((None, 5, 16))
    x = tf.random.stateless_normal((6, 5, 16), (0, 0))
    step = gradients_of(layer, {})
    monkeypatch.setattr(calls, "are_known", lambda: False)
    graph = tf.function(step, jit_compile=True).get_concrete_function(tf.TensorSpec(x.shape))
    assert not operations(graph)
    for own, wanted in zip(graph(x), step(x), strict=True):
        assert np.allclose(own, wanted, atol=1e-4)


def test_eight_axes_are_not_served():
    x = tf.zeros((1,) * 7 + (3,))
    with tf.GradientTape():
        assert compiled.moments(None, x, None, 3, (7,)) is None


# The gradient is asked for where no tape is recording any more.
@every_way
def test_a_masked_step_goes_through_the_passes_both_ways(xla):
    layer, mask = keras_bn.BatchNormalization(), tf.constant([[True, True, False]] * 6)
    layer.build((None, 3, 16))
    x = np.random.default_rng(0).normal(size=(6, 3, 16)).astype("float32")
    graph, _ = traced(gradients_of(layer, {"training": True, "mask": mask}), x, xla=xla)
    assert operations(graph) == {"moments", "map", "products", "combined"}
