"""FeatureScaling: the formulas, what is missing or constant, dtypes, models, files, pipelines."""

import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_bn import FeatureScaling
from tests.cases import SEQUENCE, assert_close, draw
from tests.layers.scaling import (
    DATES,
    NAMES,
    X,
    adapted,
    assert_keeps,
    call,
    each_mode,
    exact,
    formula,
    kept,
    tf_data,
)

BACKEND = keras.backend.backend()

# The formulas.

AXES = {
    "last": (-1, (0, 1)),
    "first-of-features": (1, (0, 2)),
    "two": ((1, 2), (0,)),
    "batch": (0, (1, 2)),
    "none": (None, (0, 1, 2)),
}


@each_mode
@pytest.mark.parametrize(("axis", "pooled"), AXES.values(), ids=AXES)
def test_output_is_the_formula(mode, axis, pooled):
    x = draw(SEQUENCE)
    wanted = formula(mode, x, exact(x, pooled))
    assert_close(call(adapted(x, mode, axis), x), wanted)


@each_mode
@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_output_is_as_exact_far_from_zero(mode, mean):
    x = draw((103, 6), 0, mean, 1.0)
    assert_close(call(adapted(x, mode), x), formula(mode, x, exact(x)))


@each_mode
def test_inverse_leads_back(mode):
    forward, back = adapted(X, mode), adapted(X, mode, inverse=True)
    assert_close(call(back, forward(X)), X)
    assert_close(call(forward, back(forward(X))), formula(mode, X, exact(X)))


@each_mode
def test_inverse_takes_over_the_weights(mode):
    forward, back = adapted(X, mode), FeatureScaling(mode, inverse=True)
    back.build((None, 6))
    back.set_weights(forward.get_weights())
    assert_close(call(back, forward(X)), X)


@each_mode
def test_weights_serve_every_mode(mode):
    layer = FeatureScaling(mode)
    layer.build((None, 6))
    layer.set_weights(adapted(X, "standard").get_weights())
    assert_close(call(layer, X), formula(mode, X, exact(X)))


def test_known_statistics_are_assigned():
    layer, wanted = FeatureScaling(), exact(X)
    layer.build((None, 6))
    layer.mean.assign(wanted["mean"][0])
    layer.stddev.assign(wanted["stddev"][0])
    assert_close(call(layer, X), formula("standard", X, wanted))


@each_mode
def test_layer_that_was_not_adapted_is_the_identity(mode):
    assert np.array_equal(call(FeatureScaling(mode), X), X)


def test_new_data_lie_outside_of_the_range():
    layer = adapted(np.array([[0.0], [10.0]]), "min_max")
    assert_close(call(layer, np.array([[-5.0], [20.0]], "float32")), [[-0.5], [2.0]])


def test_variance_is_the_square_of_the_deviation():
    assert_close(ops.convert_to_numpy(adapted(X).variance), X.astype("float64").var(0))


# What is constant, missing or not finite.


@each_mode
@pytest.mark.parametrize("value", [0.0, 0.1, -1e5, 1 / 3e30])
def test_constant_feature_becomes_zero(mode, value):
    x = np.full((1000, 2), value, "float32")
    layer = adapted([x[:1], x[1:]], mode)
    assert np.array_equal(call(layer, x), np.zeros_like(x))
    assert np.array_equal(call(layer, x + 1), (x + 1) - x)


@each_mode
def test_one_sample_becomes_zero(mode):
    assert np.array_equal(call(adapted(X[:1], mode), X[:1]), np.zeros((1, 6)))


def holed():
    """Return X with NaN in two columns and an infinity in two others."""
    x = X.copy()
    x[::3, 0], x[5, 1], x[6, 2], x[::2, 3] = np.nan, np.inf, -np.inf, np.nan
    return x


@each_mode
def test_what_is_not_finite_is_missing_and_stays(mode):
    x = holed()
    y, known = call(adapted([x[:50], x[50:]], mode), x), np.isfinite(x)
    assert_close(y[known], formula(mode, x, exact(x))[known])
    assert np.array_equal(y[~known], x[~known], equal_nan=True)


@each_mode
def test_inverse_keeps_what_is_not_finite(mode):
    x = holed()
    back = call(adapted(x, mode, inverse=True), adapted(x, mode)(x))
    assert_close(back[np.isfinite(x)], x[np.isfinite(x)])
    assert np.array_equal(back[~np.isfinite(x)], x[~np.isfinite(x)], equal_nan=True)


def test_count_is_that_of_each_feature():
    assert np.array_equal(kept(adapted(holed()))["count"], np.isfinite(holed()).sum(0))


@each_mode
def test_feature_that_is_all_missing_is_left_as_it_is(mode):
    x = X.copy()
    x[:, 4] = np.nan
    layer = adapted([x[:50], x[50:]], mode)
    assert np.array_equal(call(layer, X)[:, 4], X[:, 4])
    assert_close(call(layer, X)[:, :4], formula(mode, X, exact(X))[:, :4])


def test_too_large_for_the_statistics_is_missing():
    layer = adapted(np.array([[1.0], [3.0], [1e39], [-2e38]]))
    assert {name: float(value[0]) for name, value in kept(layer).items()} == {
        "mean": 2.0,
        "stddev": 1.0,
        "minimum": 1.0,
        "maximum": 3.0,
        "count": 2.0,
    }


@each_mode
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_units_are_scaled(mode, size):
    x = draw((103, 6), 0, 0.0, size)
    # Squares of these leave the range of float32: the deviation is kept, not the variance.
    assert_close(call(adapted(x, mode), x), formula(mode, x, exact(x)))


def test_empty_batch_changes_nothing():
    layer = adapted([X[:0], X, X[:0]])
    layer.update_state(X[:0])
    assert_keeps(layer, exact(X))
    assert call(layer, X[:0]).shape == (0, 6)


# Dtypes.

KINDS = {
    "bool": X > 3,
    "uint8": np.arange(103 * 6).reshape(103, 6).astype("uint8"),
    "int8": (X * 5).astype("int8"),
    "int64": (X * 100).astype("int64"),
    "float16": X.astype("float16"),
    "dates": DATES,
    "dates-int32": DATES.astype("int32"),
}


@each_mode
@pytest.mark.parametrize("x", KINDS.values(), ids=KINDS)
def test_every_dtype_is_used_to_its_last_digit(mode, x):
    layer = adapted(x, mode)
    assert_keeps(layer, exact(x))
    y = call(layer, x)
    assert y.dtype == "float32"
    assert_close(y, formula(mode, x, exact(x)))


def test_dates_lead_back():
    z = adapted(DATES)(DATES)
    assert_close(call(adapted(DATES, inverse=True), z), DATES)


@each_mode
@pytest.mark.usefixtures("x64")
def test_float64_input_far_from_zero_keeps_its_digits(mode):
    x = np.random.default_rng(0).normal(1e9, 1.0, (103, 6))
    layer = adapted(x, mode)
    assert layer.mean.dtype == "float32"
    assert_close(call(layer, x), formula(mode, x, exact(x)))


def test_statistics_of_float64_data_need_no_float64_backend():
    x = np.random.default_rng(0).normal(1e9, 1.0, (103, 6))
    layer = adapted([x[:10], x[10:]])
    assert_keeps(layer, exact(x))
    assert_close(np.array(layer.stddev), x.std(0))


@each_mode
@pytest.mark.usefixtures("x64")
def test_float64_policy_is_float64_throughout(mode):
    x = np.random.default_rng(0).normal(3.0, 2.0, (103, 6))
    layer = adapted([x[:10], x[10:]], mode, dtype="float64")
    assert_keeps(layer, exact(x))
    y = call(layer, x)
    assert y.dtype == "float64"
    assert_close(y, formula(mode, x, exact(x)), dtype="float64")


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_output_is_rounded_to_the_compute_dtype_at_the_end(policy):
    x = draw((103, 6), 0, 1e6, 1e3)  # above 65504
    layer = adapted(x, dtype=policy)
    assert_keeps(layer, exact(x))
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    found = ops.convert_to_numpy(ops.cast(y, "float32"))
    assert_close(found, formula("standard", x, exact(x)), dtype=layer.compute_dtype)


HOWS = ["graph", "compiled"] if BACKEND == "tensorflow" else ["compiled"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("x", [X, DATES.astype("int32")], ids=["floats", "dates"])
def test_compiled_call_is_as_exact(how, x, run):
    assert_close(run(adapted(x), x, how=how).y, formula("standard", x, exact(x)))


# In front of a model, in a model, and in files.


def network(*layers):
    return keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(1)])


def test_fit_leaves_the_statistics():
    layer = adapted(X * 100)
    model = network(layer)
    model.compile("sgd", "mse")
    losses = model.fit(X * 100, X.sum(1, keepdims=True), epochs=20, verbose=0).history["loss"]
    assert_keeps(layer, exact(X * 100))
    # Without scaling this diverges to NaN.
    assert losses[-1] < losses[0] / 4


def test_new_statistics_reach_a_compiled_model():
    layer = adapted(X + 100)
    model = keras.Sequential([keras.Input((6,)), layer])
    model.predict(X, verbose=0)
    layer.adapt(X)
    assert_close(model.predict(X, verbose=0), formula("standard", X, exact(X)))


def test_layer_may_be_adapted_after_the_model_is_made():
    inputs = keras.Input((6,))
    layer = FeatureScaling("min_max")
    model = keras.Model(inputs, layer(inputs))
    layer.adapt(X)
    assert_close(model.predict(X, verbose=0), formula("min_max", X, exact(X)))


def test_scaled_targets_lead_back_behind_a_model():
    targets = X[:, :1] * 1000
    model = network(adapted(X))
    model.compile("sgd", "mse")
    model.fit(X, adapted(targets)(targets), epochs=40, verbose=0)
    found = keras.Sequential([model, adapted(targets, inverse=True)]).predict(X, verbose=0)
    assert np.abs(found - targets).mean() < np.abs(targets - targets.mean()).mean() / 4


@each_mode
def test_keras_file_holds_the_statistics(mode, tmp_path):
    layer = adapted(DATES, mode)
    model = keras.Sequential([keras.Input((6,), dtype="int64"), layer])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").layers[0]
    again.update_state(DATES[:50] - 9)
    assert_keeps(again, exact(np.append(DATES, DATES[:50] - 9, axis=0)), resumed=True)


def test_weights_file_holds_the_statistics(tmp_path):
    model, again = network(adapted(DATES)), network(FeatureScaling())
    model.save_weights(tmp_path / "model.weights.h5")
    again.load_weights(tmp_path / "model.weights.h5")
    assert_keeps(again.layers[0], exact(DATES))


def test_nothing_is_trained():
    layer = adapted(X)
    assert layer.trainable_variables == []
    assert [v.name for v in layer.weights] == [*NAMES, "offsets"]


def test_mask_goes_on():
    model = keras.Sequential([keras.layers.Masking(), adapted(draw(SEQUENCE))])
    x = draw(SEQUENCE)
    x[0, 2:] = 0
    assert np.array_equal(ops.convert_to_numpy(model(x)._keras_mask), (x != 0).any(-1))


# In a `tf.data` pipeline, beside any backend.


def mapped(layer, *arrays):
    """Return what a pipeline with the layer gives for the first of the arrays."""
    data = tf_data(*arrays)
    scaled = data.map(layer) if len(arrays) == 1 else data.map(lambda x, y: (layer(x), y))
    batches = [item if len(arrays) == 1 else item[0] for item in scaled.as_numpy_iterator()]
    return np.concatenate(batches)


@each_mode
@pytest.mark.parametrize("x", [X, DATES], ids=["floats", "dates"])
def test_pipeline_scales(mode, x):
    assert_close(mapped(adapted(x, mode), x), formula(mode, x, exact(x)))


def test_pipeline_scales_float64_far_from_zero():
    x = np.random.default_rng(0).normal(1e9, 1.0, (103, 6))
    assert_close(mapped(adapted(x), x), formula("standard", x, exact(x)))


def test_pipeline_scales_pairs():
    assert_close(mapped(adapted(X), X, X[:, 0]), formula("standard", X, exact(X)))


def test_pipeline_leads_back():
    layer = adapted(X, "min_max", inverse=True)
    assert_close(mapped(layer, formula("min_max", X, exact(X)).astype("float32")), X)


def test_pipeline_may_see_the_layer_first():
    assert np.array_equal(mapped(FeatureScaling(), X), X)


def test_pipeline_gives_the_compute_dtype():
    data = tf_data(X).map(adapted(X, dtype="mixed_float16"))
    assert data.element_spec.dtype.name == "float16"


def test_model_is_fitted_on_a_pipeline():
    layer, model = adapted(X * 100), network()
    model.compile("sgd", "mse")
    data = tf_data(X * 100, X.sum(1, keepdims=True)).map(lambda x, y: (layer(x), y))
    losses = model.fit(data, epochs=20, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 4


# What is refused.


def test_other_features_than_adapted_to_are_refused():
    with pytest.raises(ValueError, match="of input shape to have value 6"):
        adapted(X)(draw((8, 5)))


def test_pipeline_of_samples_is_refused():
    text = "`data.shape` must be (None, 6), for which" if BACKEND != "tensorflow" else "ndim=2"
    with pytest.raises(ValueError, match=re.escape(text)):
        tf_data(X, batch_size=None).map(adapted(X))
