"""What every layer of the family does, row by row of `tests/cases.py`."""

import json
from dataclasses import replace

import keras
import numpy as np
import pytest
from keras import ops

from tests.cases import (
    CASES,
    FILED,
    HALF,
    IMAGE,
    LAYOUTS,
    MASKED,
    MASKS,
    PATHS,
    SEQUENCE,
    U,
    assert_agrees,
    assert_close,
    draw,
    named,
    trained,
)
from tests.oracle import expected, weights_by_name

BACKEND = keras.backend.backend()

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_path = pytest.mark.parametrize("case", PATHS, ids=lambda case: case.name)
every_filed = pytest.mark.parametrize("case", FILED, ids=lambda case: case.name)
every_layout = pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
MODES = ["eager", "graph", "compiled"] if BACKEND == "tensorflow" else ["eager", "compiled"]
every_mode = pytest.mark.parametrize("how", MODES)


def assert_same_weights(layer, other):
    pairs = zip(layer.get_weights(), other.get_weights(), strict=True)
    assert [v.name for v in layer.weights] == [v.name for v in other.weights]
    assert all(np.array_equal(a, b) for a, b in pairs)


def assert_close_weights(layer, other):
    pairs = zip(layer.get_weights(), other.get_weights(), strict=True)
    _ = [assert_close(a, b) for a, b in pairs]


def model_of(case):
    """Return a model of one layer with weights as after some training."""
    model = keras.Sequential([keras.Input(case.shape[1:]), case.make()])
    trained(model.layers[0])
    return model


# Config and files.


@every_case
def test_config_survives_json(case):
    config = case.make(name="n", dtype="mixed_float16").get_config()
    again = case.layer.from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config


@every_case
def test_build_and_call_change_no_option(case):
    layer = case.make()
    before = layer.get_config()
    layer(keras.KerasTensor(case.shape))
    assert (layer.built, layer.get_config()) == (True, before)


@every_filed
def test_keras_file_holds_the_layer(case, tmp_path):
    model = model_of(case)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again.layers[0]) is case.layer
    assert again.layers[0].get_config() == model.layers[0].get_config()
    assert_same_weights(model, again)


@every_filed
def test_weights_file_holds_the_weights(case, tmp_path):
    model = model_of(case)
    model.save_weights(tmp_path / "model.weights.h5")
    again = keras.Sequential([keras.Input(case.shape[1:]), case.make()])
    again.load_weights(tmp_path / "model.weights.h5")
    assert_same_weights(model, again)


@every_filed
def test_clone_has_the_config_and_its_own_weights(case):
    model = model_of(case)
    clone = keras.models.clone_model(model)
    assert clone.layers[0].get_config() == model.layers[0].get_config()
    assert not {id(v) for v in clone.weights} & {id(v) for v in model.weights}
    clone.set_weights(model.get_weights())
    x = case.x()
    assert np.array_equal(*(ops.convert_to_numpy(m(x)) for m in (model, clone)))


# Shapes.


@every_case
def test_output_shape_is_the_inputs(case):
    layer, x = case.make(), case.x()
    assert layer.compute_output_shape(case.shape) == case.shape
    assert tuple(layer(x).shape) == case.shape


@every_case
def test_symbolic_call_knows_shape_and_dtype(case):
    unknown = tuple(n if a in case.kept else None for a, n in enumerate(case.shape))
    y = case.make(dtype="mixed_bfloat16")(keras.KerasTensor(unknown, "float32"))
    assert (tuple(y.shape), y.dtype) == (unknown, "bfloat16")


@every_case
def test_symbolic_call_changes_no_weight(case):
    layer = case.built()
    before = layer.get_weights()
    layer(keras.KerasTensor(case.shape), training=True)
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))


@pytest.mark.parametrize(
    # Only TensorFlow traces with sizes that are unknown.
    "case",
    CASES if BACKEND == "tensorflow" else LAYOUTS,
    ids=lambda case: case.name,
)
def test_unknown_sizes_change_nothing(case, run):
    unknown = tuple(n if a in case.kept else None for a, n in enumerate(case.shape))
    inputs = keras.Input(batch_shape=unknown)
    layer = case.make()
    model = keras.Model(inputs, layer(inputs))
    trained(layer)
    wanted = run(case.built(), case.x(), training=True)
    y = ops.convert_to_numpy(_traced(model, unknown)(case.x()))
    assert_close(y, wanted.y)
    found = weights_by_name(layer)
    assert all(np.allclose(found[k], v, rtol=0, atol=1e-6) for k, v in wanted.state.items())


def _traced(model, shape):
    """Return a training call that, in TensorFlow, is traced without the unknown sizes."""

    def call(x):
        return model(x, training=True)

    if BACKEND != "tensorflow":
        return call
    import tensorflow as tf

    return tf.function(call, input_signature=[tf.TensorSpec(shape, "float32")])


# Values, gradients and statistics, against the float64 oracle.


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_call_gives_the_formula(case, training, run):
    layer, x, dy = case.built(), case.x(), draw(case.shape, 1, 0, 1)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=training)
    assert_agrees(run(layer, x, dy, training=training), wanted, dy)


@every_path
@every_mode
def test_every_mode_gives_the_formula(case, how, run):
    layer, x, dy = case.built(), case.x(), draw(case.shape, 1, 0, 1)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    assert_agrees(run(layer, x, dy, how, training=True), wanted, dy)


@every_path
@every_mode
def test_every_mode_counts_by_the_mask(case, how, run):
    layer, x, dy = case.built(), case.x(), draw(case.shape, 1, 0, 1)
    mask, full = MASKS[0].draw(case)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True, mask=full)
    assert_agrees(run(layer, x, dy, how, training=True, mask=mask), wanted, dy)


@pytest.mark.parametrize(
    "case", named("batch", "renorm-clipped", "group"), ids=lambda case: case.name
)
@every_mode
def test_every_mode_is_as_exact_far_from_zero(case, how, run):
    layer, x, dy = case.built(), draw(case.shape, 0, 3e4, 3), draw(case.shape, 1, 0, 1)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    # The mean is a pivot and a small difference: κ is 1e4, yet the bound is as for κ below 4.
    assert_agrees(run(layer, x, dy, how, training=True), wanted, dy)


@pytest.mark.parametrize(("case", "form"), MASKED, ids=lambda item: item.name)
def test_mask_is_the_count(case, form, run):
    layer, x, dy = case.built(), case.x(), draw(case.shape, 1, 0, 1)
    mask, full = form.draw(case)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True, mask=full)
    assert_agrees(run(layer, x, dy, training=True, mask=mask), wanted, dy)


@every_case
def test_frozen_layer_is_in_inference(case):
    layer, x = case.built(), case.x()
    wanted, before = ops.convert_to_numpy(layer(x, training=False)), layer.get_weights()
    layer.trainable = False
    assert np.array_equal(ops.convert_to_numpy(layer(x, training=True)), wanted)
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))


# Dtypes.


def rounded(array, dtype):
    """Return the array as a tensor of the dtype, and what that holds in float32."""
    tensor = ops.cast(array, dtype)
    return tensor, ops.convert_to_numpy(ops.cast(tensor, "float32"))


ROUNDED = [
    *((case, policy) for case in LAYOUTS for policy in ("mixed_float16", "bfloat16")),
    *((case, policy) for case in PATHS for policy in ("mixed_bfloat16", "float16")),
]


@pytest.mark.parametrize(("case", "policy"), ROUNDED, ids=lambda item: getattr(item, "name", item))
def test_policy_rounds_once(case, policy, run):
    layer = case.built(dtype=policy)
    (x, exact_x), (dy, exact_dy) = (
        rounded(a, layer.compute_dtype) for a in (case.x(), draw(case.shape, 1, 0, 1))
    )
    wanted = expected(layer, weights_by_name(layer), exact_x, exact_dy, training=True)
    found = run(layer, x, dy, training=True)
    assert keras.backend.standardize_dtype(layer(x).dtype) == layer.compute_dtype
    assert_agrees(found, wanted, exact_dy, layer.compute_dtype)


@every_layout
@pytest.mark.usefixtures("x64")
def test_float64_policy_is_float64_throughout(case, run):
    layer = case.built(dtype="float64")
    x, dy = (draw(case.shape, s).astype("float64") * np.pi for s in (0, 1))
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    found = run(layer, x, dy, training=True)
    assert (found.y.dtype, found.dx.dtype) == ("float64", "float64")
    assert_agrees(found, wanted, dy, "float64")


@every_layout
@pytest.mark.parametrize("policy", ["float32", *HALF])
def test_statistics_are_kept_in_float32(case, policy):
    layer = case.built(dtype=policy)
    dtypes = {v.name: v.dtype for v in layer.non_trainable_variables}
    steps = dtypes.pop("step", "int32")
    assert (set(dtypes.values()) <= {"float32"}, steps) == (True, "int32")
    assert {v.dtype for v in layer.trainable_variables} <= {layer.variable_dtype}


@every_path
def test_integers_are_normalized(case, run):
    layer, x = case.built(), np.random.default_rng(0).integers(-9, 9, case.shape, "int32")
    wanted = expected(layer, weights_by_name(layer), x, x, training=True)
    assert_close(run(layer, x, training=True).y, wanted.y)


@every_path
@pytest.mark.skipif(BACKEND != "torch", reason="memory layouts are torch's")
def test_memory_layout_does_not_matter(case, run):
    layer, dy = case.built(), draw(case.shape, 1, 0, 1)
    first = np.moveaxis(case.x(), -1, 1).copy()
    x = ops.moveaxis(ops.convert_to_tensor(first), 1, -1)
    wanted = expected(layer, weights_by_name(layer), case.x(), dy, training=True)
    assert_agrees(run(layer, x, dy, training=True), wanted, dy)


# Models.

FAMILY = [replace(case, shape=IMAGE) for case in PATHS]
SPEED = 0.01
FEW = named("batch", "renormalization-ramp", "group")  # torch.compile takes long


def family(cases=tuple(FAMILY)):
    """Return a model with a layer for each row; the first sees the input itself."""
    layers = [case.make(name=case.name.replace("-", "_")) for case in cases]
    head = [keras.layers.Flatten(), keras.layers.Dense(2)]
    inputs = x = keras.Input(IMAGE[1:])
    for layer in (*layers, *head):
        x = layer(x)
    return keras.Model(inputs, x)


def data(n=12):
    return draw((n, *IMAGE[1:])), np.zeros((n, 2), "float32")


def moved_mean(x, batches, momentum=0.99):
    """Return the moving mean of a new layer after these batches, by hand."""
    mean = np.zeros(x.shape[-1])
    for batch in np.split(x.astype("float64"), batches):
        mean = mean * momentum + batch.mean((0, 1, 2)) * (1 - momentum)
    return mean


FITS = {
    "auto": {"jit_compile": "auto"},
    "jit": {"jit_compile": True},
    "no-jit": {"jit_compile": False},
    "eager": {"run_eagerly": True},
}


@pytest.mark.parametrize("mode", FITS.values(), ids=FITS)
def test_fit_moves_statistics_by_each_batch(mode):
    model, (x, y) = family(FEW), data()
    model.compile(keras.optimizers.SGD(SPEED), "mse", **mode)
    history = model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    found = weights_by_name(model.get_layer("batch"))["moving_mean"]
    assert_close(found, moved_mean(x, 3))
    assert int(weights_by_name(model.get_layer("renormalization_ramp"))["step"]) == 3


def test_train_on_batch_is_a_step():
    model, (x, y) = family(), data(4)
    model.compile(keras.optimizers.SGD(SPEED), "mse")
    model.train_on_batch(x, y)
    assert_close(weights_by_name(model.get_layer("batch"))["moving_mean"], moved_mean(x, 1))


def test_evaluate_and_predict_change_nothing():
    model, (x, y) = family(), data(4)
    model.compile(loss="mse")
    before = model.get_weights()
    loss = model.evaluate(x, y, verbose=0)
    # Predictions pass five layers and a loss, each as exact as the bound.
    assert loss == pytest.approx(np.mean(model.predict(x, verbose=0) ** 2), rel=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_frozen_part_of_a_model_keeps_its_weights():
    (x, y), frozen = data(4), family()
    frozen.trainable = False
    model = keras.Sequential([keras.Input(IMAGE[1:]), frozen, keras.layers.Dense(2)])
    before = frozen.get_weights()
    model.compile("sgd", "mse", run_eagerly=True)
    model.train_on_batch(x, y)
    assert all(np.array_equal(a, b) for a, b in zip(before, frozen.get_weights(), strict=True))


def test_model_within_a_model_trains():
    inner = family()
    model = keras.Sequential([keras.Input(IMAGE[1:]), inner])
    model(data(4)[0], training=True)
    found = weights_by_name(inner.get_layer("batch"))["moving_mean"]
    assert_close(found, moved_mean(data(4)[0], 1))


@every_path
def test_shared_layer_moves_at_each_call(case, run):
    shared, alone = case.built(), case.built()
    inputs = keras.Input(case.shape[1:])
    y = keras.Model(inputs, shared(shared(inputs)))(case.x(), training=True)
    first = run(alone, case.x(), training=True).y
    wanted = run(alone, first, training=True)
    assert_close(ops.convert_to_numpy(y), wanted.y)
    assert_close_weights(shared, alone)


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norms = [case.make() for case in FAMILY]

    def call(self, x, training=None):
        for norm in self.norms:
            x = norm(x, training=training)
        return x


def test_subclassed_model_trains_as_the_layers_one_by_one(run):
    model, x = Subclassed(), draw(IMAGE)
    alone = [case.make() for case in FAMILY]
    y = ops.convert_to_numpy(model(x, training=True))
    for layer in alone:
        layer.build(IMAGE)
        x = run(layer, x, training=True).y
    assert_close(y, x)


def test_subclassed_model_saves_its_weights(tmp_path):
    model, again = Subclassed(), Subclassed()
    model(draw(IMAGE), training=True)
    again(draw(IMAGE))
    model.save_weights(tmp_path / "m.weights.h5")
    again.load_weights(tmp_path / "m.weights.h5")
    assert_same_weights(model, again)


def test_summary_counts_the_parameters():
    lines = []
    family().summary(print_fn=lambda text, **_: lines.append(text))
    # 2 of 6, 2 of 4·6 (two axes), 5 of 6 (renorm), and 2 of 6 with a step.
    assert "Non-trainable params: 103" in "\n".join(lines)


# Masks in models.


class Probe(keras.layers.Layer):
    """Keeps the mask that reaches it."""

    def call(self, x, mask=None):
        self.mask = mask
        return x

    def compute_mask(self, x, mask=None):
        return mask


SEQUENCES = [replace(case, shape=SEQUENCE) for case in PATHS if "axis" not in case.options]


@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case.name)
def test_mask_reaches_the_layer_and_goes_on(case, run):
    x, probe = case.x(), Probe()
    x[1, 2:] = 0
    mask = (x != 0).any(-1)
    layer, alone = case.built(), case.built()
    y = keras.Sequential([keras.layers.Masking(), layer, probe])(x, training=True)
    wanted = run(alone, x, training=True, mask=mask)
    assert_close(ops.convert_to_numpy(y), wanted.y)
    assert np.array_equal(ops.convert_to_numpy(probe.mask), mask)
    assert_close_weights(layer, alone)


def test_gradients_reach_what_lies_before(run):
    model = keras.Sequential([keras.layers.Dense(6), *(case.make() for case in SEQUENCES)])
    model.build(SEQUENCE)
    found = run(model, draw(SEQUENCE), draw(SEQUENCE, 1), training=True)
    assert np.isfinite(found.dx).all()
    assert np.abs(found.dx).max() > 8 * U["float32"]
