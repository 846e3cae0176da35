"""Weight normalization: the kernel g·v / |v| of each layer inside, and where it starts."""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_bn import WeightNormalization
from keras_bn.kernels import reference
from tests.cases import U, assert_close, draw
from tests.layers.inside import FEW, INSIDE, TOKENS, WITH_BIAS, named, trained
from tests.oracle import weights_by_name

BACKEND = keras.backend.backend()
MODES = ["eager", "graph", "compiled"] if BACKEND == "tensorflow" else ["eager", "compiled"]

every_inside = pytest.mark.parametrize("inside", INSIDE, ids=lambda row: row.name)
few_inside = pytest.mark.parametrize("inside", FEW, ids=lambda row: row.name)
with_bias = pytest.mark.parametrize("inside", WITH_BIAS, ids=lambda row: row.name)
every_mode = pytest.mark.parametrize("how", MODES)


def assert_agrees(found, inside, weights, x, dy, dtype="float32"):
    """Compare with the formula; a sum is as large as all its terms."""
    exact, sizes = inside.expected(weights, x, dy)
    assert_close(found.y, exact.y, sizes.y.max(), dtype)
    assert_close(found.dx, exact.dx, sizes.dx.max(), dtype)
    assert found.gradients.keys() == exact.gradients.keys()
    for name, gradient in exact.gradients.items():
        assert_close(found.gradients[name], gradient, sizes.gradients[name].max(), dtype)


(DENSE,) = named("dense")


def dense(units=3, **options):
    return WeightNormalization(layers.Dense(units, **options))


def as_numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def dy_of(inside, wrapper):
    shape = inside.callable(wrapper)(inside.x()).shape
    return draw(tuple(shape), 1, 0, 1)


# Values and gradients.


@every_inside
def test_call_gives_the_formula(inside, run):
    wrapper = inside.built()
    x, dy = inside.x(), dy_of(inside, wrapper)
    found, weights = run(inside.callable(wrapper), x, dy), weights_by_name(wrapper)
    assert_agrees(found, inside, weights, x, dy)
    # The gradient of v is orthogonal to v.
    _, sizes = inside.expected(weights, x, dy)
    for (v, _), axes in zip(inside.kernels.items(), inside.pooled, strict=True):
        products = (weights[v] * found.gradients[v]).sum(axes)
        assert_close(
            products, 0 * products, np.abs(weights[v] * sizes.gradients[v]).sum(axes).max()
        )


@few_inside
@every_mode
def test_every_mode_gives_the_formula(inside, how, run):
    wrapper = inside.built()
    x, dy = inside.x(), dy_of(inside, wrapper)
    found = run(inside.callable(wrapper), x, dy, how)
    assert_agrees(found, inside, weights_by_name(wrapper), x, dy)


@few_inside
def test_wrapped_layer_starts_as_the_plain_one(inside):
    wrapper = inside.make()
    wrapper.build(inside.shape)
    for found, wanted in zip(
        wrapper.unwrap().get_weights(), wrapper.layer.get_weights(), strict=True
    ):
        assert_close(found, wanted)


def test_built_layer_keeps_its_output():
    plain, x = layers.Dense(3, bias_initializer="ones"), draw((6, 4))
    wanted = as_numpy(plain(x))
    assert_close(as_numpy(WeightNormalization(plain)(x)), wanted)


def test_given_rows_of_an_embedding_are_its_start():
    rows = draw((5, 3))
    wrapper = WeightNormalization(layers.Embedding(5, 3, weights=rows))
    assert_close(as_numpy(wrapper(TOKENS)), rows[TOKENS])


def test_class_derived_from_a_known_one_can_be_wrapped():
    class Doubled(layers.Dense):
        def call(self, inputs):
            return 2 * super().call(inputs)

    wrapper, x = WeightNormalization(Doubled(3)), draw((6, 4))
    y, v = as_numpy(wrapper(x)), wrapper.layer.get_weights()[0]
    assert_close(y, 2 * x @ v.astype("float64"), scale=2 * (np.abs(x) @ np.abs(v)).max())


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_kernel_depends_on_the_direction_of_v_alone(scale):
    wrapper, v = dense(), draw((4, 3))
    wrapper.build((6, 4))
    wrapper.set_weights([np.ones(3), v * np.float32(scale), np.zeros(3)])
    assert_close(
        wrapper.unwrap().get_weights()[0],
        reference.weight_normalize(wrapper.layer.get_weights()[0], 1.0, (0,)),
    )


def test_length_of_a_long_kernel_is_exact():
    wrapper, v = dense(), draw((50_000, 3), mean=1.0, std=1e-2)
    wrapper.build((6, 50_000))
    wrapper.set_weights([np.ones(3), v, np.zeros(3)])
    wanted = reference.weight_normalize(v, 1.0, (0,))
    np.testing.assert_allclose(wrapper.unwrap().get_weights()[0], wanted, rtol=8 * U["float32"])


def test_zero_of_v_is_a_zero_of_the_kernel(run):
    wrapper, v = dense(), draw((4, 3))
    v[:, 1] = 0
    wrapper.build((6, 4))
    wrapper.set_weights([np.ones(3), v, np.ones(3)])
    found = run(wrapper, draw((6, 4)), draw((6, 3), 1))
    assert np.array_equal(found.y[:, 1], np.ones(6))
    assert all(np.isfinite(gradient).all() for gradient in found.gradients.values())


def test_zero_of_v_starts_with_length_zero():
    wrapper = dense(kernel_initializer="zeros")
    wrapper.build((6, 4))
    assert np.array_equal(weights_by_name(wrapper)["g"], np.zeros(3))


# Dtypes.


@few_inside
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_policy_rounds_the_kernel_and_the_output_only(inside, policy, run):
    wrapper = inside.built(dtype=policy)
    half = wrapper.layer.compute_dtype
    x = as_numpy(ops.cast(inside.x(), half))
    found = inside.callable(wrapper)(x)
    exact, sizes = inside.expected(weights_by_name(wrapper), x, np.zeros(found.shape, "float32"))
    assert {v.dtype for v in wrapper.weights} == {"float32"}
    assert_close(as_numpy(found), exact.y, sizes.y.max(), half)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_half_precision_has_the_gradient(policy, run):
    (inside,) = named("dense")
    wrapper = inside.built(dtype=policy)
    half = wrapper.layer.compute_dtype
    x, dy = (ops.cast(a, half) for a in (inside.x(), draw((6, 3), 1, 0, 1)))
    found = run(wrapper, x, dy)
    assert_agrees(found, inside, weights_by_name(wrapper), as_numpy(x), as_numpy(dy), half)


# Not `Dense`: Keras 3.15.1's matmul rounds float64 to float32 in PyTorch.
@pytest.mark.parametrize(
    "inside",
    named("conv-2", "separable-2", "einsum-other-order", "embedding"),
    ids=lambda row: row.name,
)
@pytest.mark.usefixtures("x64")
def test_float64_policy_is_float64_throughout(inside, run):
    wrapper = inside.built(dtype="float64")
    x = inside.x().astype("float64") * np.pi
    dy = dy_of(inside, wrapper).astype("float64") * np.pi
    found = run(inside.callable(wrapper), x, dy)
    assert (found.y.dtype, found.dx.dtype) == ("float64", "float64")
    assert_agrees(found, inside, weights_by_name(wrapper), x, dy, "float64")


AROUND = {"alone": lambda layer: layer, "in-a-model": lambda layer: keras.Sequential([layer])}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_mixed_policy_does_not_round_v(around):
    keras.config.set_dtype_policy("mixed_float16")
    wrapper = DENSE.built()
    g, v, bias = wrapper.get_weights()
    wanted = as_numpy(wrapper(DENSE.x()))
    # The smallest float16 is 6e-8.
    wrapper.set_weights([g, 2.0**-30 * v, bias])
    assert np.array_equal(as_numpy(around(wrapper)(DENSE.x())), wanted)


def test_policy_is_that_of_the_layer_inside():
    y = dense(dtype="mixed_float16")(keras.KerasTensor((None, 4)))
    assert (tuple(y.shape), y.dtype) == ((None, 3), "float16")


# The variables.


@few_inside
def test_call_changes_no_variable(inside):
    wrapper = inside.built()
    before = wrapper.get_weights()
    inside.callable(wrapper)(inside.x(), training=True)
    assert all(np.array_equal(a, b) for a, b in zip(before, wrapper.get_weights(), strict=True))


@few_inside
def test_scope_around_the_call_gives_the_values(inside):
    wrapper, other = inside.built(), trained(inside.built(), 1)
    pairs = zip(wrapper.variables, other.variables, strict=True)
    with keras.StatelessScope([(a, ops.copy(b)) for a, b in pairs]):
        y = as_numpy(inside.callable(wrapper)(inside.x()))
    assert np.array_equal(y, as_numpy(inside.callable(other)(inside.x())))


FITS = {
    "auto": {"jit_compile": "auto"},
    "jit": {"jit_compile": True},
    "no-jit": {"jit_compile": False},
    "eager": {"run_eagerly": True},
}
every_fit = pytest.mark.parametrize("mode", FITS.values(), ids=FITS)
RATE = 0.1


def fit(wrapper, x, target, epochs=1, **mode):
    """Train in batches of the whole; return the losses."""
    model = keras.Sequential([keras.Input(x.shape[1:]), wrapper])
    model.compile(keras.optimizers.SGD(RATE), "mse", **mode)
    history = model.fit(x, target, len(x), epochs=epochs, verbose=0)
    return history.history["loss"]


@every_fit
def test_fit_steps_down_the_gradient(mode):
    wrapper, x, target = DENSE.built(), DENSE.x(), draw((6, 3), 1)
    before = weights_by_name(wrapper)
    y = x @ DENSE.normalized(before)[0] + before["bias"]
    wanted, _ = DENSE.expected(before, x, 2 * (y - target) / target.size)
    losses = fit(wrapper, x, target, **mode)
    after = weights_by_name(wrapper)
    assert_close(losses, np.mean((y - target) ** 2))
    for name, gradient in wanted.gradients.items():
        assert_close(after[name], before[name] - RATE * gradient)


@few_inside
def test_every_layer_learns(inside):
    x, layer = inside.x(), inside.callable(inside.built())
    target = np.zeros(layer(x).shape)
    model = keras.Sequential([layer])
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    before = model.layers[0].get_weights()
    losses = model.fit(x, target, len(x), epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    after = model.layers[0].get_weights()
    assert not any(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_frozen_layer_inside_freezes_g():
    wrapper = dense(trainable=False)
    wrapper.build((6, 4))
    assert (wrapper.trainable, wrapper.trainable_variables) == (False, [])


def test_penalty_on_the_kernel_is_on_v():
    wrapper = dense(kernel_regularizer=keras.regularizers.L2(0.1))
    wrapper.build((6, 4))
    trained(wrapper)
    wanted = 0.1 * (weights_by_name(wrapper)["kernel"] ** 2).sum()
    assert_close([as_numpy(loss) for loss in wrapper.losses], [wanted])


def test_constraint_of_the_kernel_is_on_v():
    wrapper = dense(kernel_constraint=keras.constraints.NonNeg())
    fit(wrapper, DENSE.x(), draw((6, 3), 1))
    assert weights_by_name(wrapper)["kernel"].min() == 0


@pytest.mark.parametrize("mode", [FITS["auto"], FITS["eager"]], ids=["auto", "eager"])
def test_penalty_on_the_output_counts_once(mode):
    wrapper, x = dense(activity_regularizer=keras.regularizers.L2(0.1)), DENSE.x()
    wrapper.build(x.shape)
    y = x @ weights_by_name(wrapper)["kernel"]
    losses = fit(wrapper, x, np.zeros((6, 3)), **mode)
    # Keras divides such a penalty by the number of samples.
    assert_close(losses, np.mean(y**2) + 0.1 * np.sum(y**2) / 6)


# Config and files.


@every_inside
def test_config_survives_json(inside):
    wrapper = inside.make(name="n", dtype="mixed_float16")
    config = wrapper.get_config()
    again = WeightNormalization.from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    assert again.layer.get_config() == wrapper.layer.get_config()


def test_building_changes_no_option():
    wrapper = DENSE.make()
    before = wrapper.get_config()
    wrapper.build((6, 4))
    assert wrapper.get_config() == before


def test_config_holds_data_init():
    wrapper = WeightNormalization(layers.Dense(3), data_init=True)
    config = wrapper.get_config()
    assert (config["data_init"], "dtype" in config) == (True, False)
    assert WeightNormalization.from_config(config).data_init
    assert sorted(config) == ["data_init", "layer", "name", "trainable"]


FILED = [row for row in FEW if row.layer is not layers.Embedding]
every_filed = pytest.mark.parametrize(
    ("inside", "data_init"),
    [(row, data_init) for row in FILED for data_init in (False, True)],
    ids=lambda item: getattr(item, "name", item),
)


def model_of(inside, data_init, name="wrapper"):
    """Return a model of one wrapper with weights as after some training."""
    wrapper = WeightNormalization(inside.layer(**inside.options), data_init=data_init, name=name)
    model = keras.Sequential([keras.Input(inside.shape[1:]), wrapper])
    model(inside.x(), training=True)
    trained(wrapper)
    return model


def assert_same(model, again, x):
    pairs = zip(model.get_weights(), again.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert np.array_equal(*(as_numpy(m(x, training=True)) for m in (model, again)))


@every_filed
def test_keras_file_holds_the_layer(inside, data_init, tmp_path):
    model = model_of(inside, data_init)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again.layers[0]) is WeightNormalization
    config, wanted = (m.layers[0].get_config() for m in (again, model))
    # JSON knows no tuples: an output shape comes back as a list.
    assert json.dumps(config) == json.dumps(wanted)
    paths, before = ([v.path.partition("wrapper")[2] for v in m.weights] for m in (again, model))
    assert paths == before
    assert_same(model, again, inside.x(1))


@every_filed
def test_weights_file_holds_the_weights(inside, data_init, tmp_path):
    model, again = model_of(inside, data_init), model_of(inside, data_init, "other")
    again.set_weights([0 * w for w in again.get_weights()])
    model.save_weights(tmp_path / "model.weights.h5")
    again.load_weights(tmp_path / "model.weights.h5")
    assert_same(model, again, inside.x(1))


def test_keras_file_holds_an_embedding(tmp_path):
    wrapper = WeightNormalization(layers.Embedding(6, 4, mask_zero=True))
    model = keras.Sequential([keras.Input((3,)), wrapper, layers.LSTM(2)])
    trained(wrapper)
    model.save(tmp_path / "model.keras")
    assert_same(model, keras.saving.load_model(tmp_path / "model.keras"), TOKENS)


@every_filed
def test_clone_has_its_own_weights(inside, data_init):
    model = model_of(inside, data_init)
    clone = keras.models.clone_model(model)
    assert not {id(v) for v in clone.weights} & {id(v) for v in model.weights}
    clone.set_weights(model.get_weights())
    assert_same(model, clone, inside.x(1))


# The plain layer.


@every_inside
def test_unwrapped_layer_has_the_normalized_kernel(inside):
    wrapper = inside.built()
    plain = wrapper.unwrap()
    assert (type(plain), plain.get_config()) == (inside.layer, wrapper.layer.get_config())
    found = weights_by_name(plain)
    for name, kernel in zip(
        inside.kernels, inside.normalized(weights_by_name(wrapper)), strict=True
    ):
        assert_close(found[name], kernel)


@few_inside
def test_unwrapped_layer_gives_the_same_output(inside):
    wrapper = inside.built()
    x = TOKENS if inside.layer is layers.Embedding else inside.x()
    assert np.array_equal(as_numpy(wrapper(x)), as_numpy(wrapper.unwrap()(x)))


def test_unwrapping_shares_no_variable():
    wrapper = DENSE.built()
    plain, before = wrapper.unwrap(), wrapper.get_weights()
    plain.set_weights([0 * w for w in plain.get_weights()])
    assert not {id(v) for v in plain.weights} & {id(v) for v in wrapper.weights}
    assert all(np.array_equal(a, b) for a, b in zip(before, wrapper.get_weights(), strict=True))


def test_layers_of_a_model_can_be_unwrapped():
    model = keras.Sequential([keras.Input((4,)), DENSE.built(), DENSE.make(units=2)][:2])

    def unwrapped(layer):
        return layer.unwrap()

    plain = keras.models.clone_model(model, clone_function=unwrapped)
    assert np.array_equal(as_numpy(plain(DENSE.x())), as_numpy(model(DENSE.x())))


# Shapes and masks.


@every_inside
def test_symbolic_call_knows_shape_and_dtype(inside):
    plain = inside.layer(**inside.options, dtype="mixed_bfloat16")
    inputs = keras.KerasTensor((None, *inside.shape[1:]), "float32")
    y, wanted = inside.make(dtype="mixed_bfloat16")(inputs), plain(inputs)
    assert (tuple(y.shape), y.dtype) == (tuple(wanted.shape), "bfloat16")
    assert inside.make().compute_output_shape(inputs.shape) == plain.compute_output_shape(
        inputs.shape
    )


@pytest.mark.parametrize("inside", FILED, ids=lambda row: row.name)
def test_batches_may_have_any_size(inside):
    model = model_of(inside, False)
    x, weights = inside.x(), weights_by_name(model.layers[0])
    for size in (1, 2):
        exact, sizes = inside.expected(weights, x[:size], np.zeros(model(x[:size]).shape))
        assert_close(model.predict(x[:size], verbose=0), exact.y, sizes.y.max())


def test_other_channels_than_built_for_are_refused():
    with pytest.raises(ValueError, match="of input shape to have value 4"):
        DENSE.built()(keras.KerasTensor((None, 5)))


def test_mask_of_an_embedding_goes_on():
    wrapper = WeightNormalization(layers.Embedding(6, 4, mask_zero=True))
    assert np.array_equal(ops.convert_to_numpy(wrapper.compute_mask(TOKENS)), TOKENS != 0)
    assert np.array_equal(ops.convert_to_numpy(wrapper(TOKENS)._keras_mask), TOKENS != 0)


def test_mask_of_the_input_goes_on():
    x = draw((3, 5, 4))
    x[1, 2:] = 0
    masked = layers.Masking()(x)
    assert np.array_equal(ops.convert_to_numpy(dense()(masked)._keras_mask), (x != 0).any(-1))


# What cannot be wrapped. The table of the messages has what needs no model.

TAKEN = (
    "WeightNormalization: `layer` must be in no model and no other wrapper. "
    r"Received: layer=<Dense name=d, built=True>. Wrap it before its first use"
)


def test_layer_of_a_model_is_refused():
    layer = layers.Dense(3, name="d")
    keras.Sequential([keras.Input((4,)), layer])
    with pytest.raises(ValueError, match=TAKEN):
        WeightNormalization(layer)


def test_layer_in_another_wrapper_is_refused():
    layer = layers.Dense(3, name="d")
    WeightNormalization(layer).build((6, 4))
    with pytest.raises(ValueError, match=TAKEN):
        WeightNormalization(layer)


def test_quantized_later_is_refused_in_the_call():
    wrapper = DENSE.built()
    wrapper.layer.quantize("int8")
    with pytest.raises(ValueError, match="must be without quantization and LoRA"):
        wrapper(DENSE.x())


def test_unwrapping_before_building_is_refused():
    text = "WeightNormalization: `built` must be True before `unwrap`. Received: built=False."
    with pytest.raises(ValueError, match=text):
        dense().unwrap()


# Data-dependent initialization.


def starting(inside, **options):
    """Return a wrapper before its first batch, with g not as long as v."""
    return inside.built(data_init=True, **options)


def weights_in_use(wrapper):
    """Return the weights, with what the first batch has set added to what is trained."""
    found = weights_by_name(wrapper)
    start, bias_start = found.pop("g_start"), found.pop("bias_start")
    g = next(name for name in ("pointwise_g", "g") if name in found)
    return found | {g: found[g] + start, "bias": found["bias"] + bias_start}


@with_bias
def test_first_batch_sets_where_g_and_bias_start(inside, run):
    wrapper, x = starting(inside), inside.x()
    before = weights_in_use(wrapper)
    wanted = before | inside.started(before, x)
    dy = dy_of(inside, inside.built())
    found = run(wrapper, x, dy, training=True)
    exact, sizes = inside.expected(wanted, x, dy)
    assert_close(found.y, exact.y, sizes.y.max())
    axes = tuple(range(found.y.ndim - wanted["bias"].ndim))
    assert_close(found.y.mean(axes), np.zeros(wanted["bias"].shape), sizes.y.max())
    assert_close(found.y.var(axes), np.ones(wanted["bias"].shape), sizes.y.max())
    for name, gradient in exact.gradients.items():
        assert_close(found.gradients[name], gradient, sizes.gradients[name].max())
    after = weights_in_use(wrapper)
    for name, value in inside.started(before, x).items():
        assert_close(after[name], value, max(np.abs(value).max(), np.abs(before[name]).max()))
    assert after["initialized"] == 1


def test_second_batch_changes_no_start(run):
    wrapper = starting(DENSE)
    run(wrapper, DENSE.x(), training=True)
    before = weights_by_name(wrapper)
    state = run(wrapper, 5 * DENSE.x(1), training=True).state
    assert all(np.array_equal(state[name], value) for name, value in before.items())


@every_fit
def test_fit_starts_from_the_first_batch(mode):
    wrapper, x, target = DENSE.make(data_init=True), DENSE.x(), draw((6, 3), 1)
    wrapper.build(x.shape)
    before = weights_in_use(wrapper)
    wanted = DENSE.started(before, x)
    losses = fit(wrapper, x, target, epochs=2, **mode)
    y = x @ reference.weight_normalize(before["kernel"], wanted["g"], (0,)) + wanted["bias"]
    assert_close(losses[0], np.mean((y - target) ** 2), 1 + np.mean(target**2))
    # g begins at 0, so the starts are the values themselves; the second step leaves them.
    found = weights_by_name(wrapper)
    assert_close(found["g_start"], wanted["g"])
    assert_close(found["bias_start"], wanted["bias"])


def test_start_is_that_of_the_output_before_the_activation(run):
    wrapper, plain = (starting(DENSE, activation=name) for name in ("relu", None))
    plain.set_weights(wrapper.get_weights())
    wanted = run(plain, DENSE.x(), training=True)
    found = run(wrapper, DENSE.x(), training=True)
    assert_close(found.y, np.maximum(wanted.y, 0))
    assert wrapper.layer.activation is keras.activations.relu


def test_start_is_right_far_from_zero(run):
    wrapper, x = starting(DENSE), draw((64, 4), 0, 1e3, 1)
    before = weights_in_use(wrapper)
    state = run(wrapper, x, training=True).state
    wanted = DENSE.started(before, x)["g"]
    # The output of the matrix product is off by κ roundings of its mean, its variance by as much.
    kappa = 1e3 * np.abs(before["g"]).max()
    np.testing.assert_allclose(state["g"] + state["g_start"], wanted, rtol=8 * U["float32"] * kappa)


def test_start_of_large_outputs_loses_no_digits(run):
    wrapper, x = DENSE.make(data_init=True), 2.0**20 * DENSE.x()
    wrapper.build(x.shape)
    wanted = DENSE.started(weights_in_use(wrapper), x)
    assert_close(run(wrapper, x, training=True).state["g_start"], wanted["g"])


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_start_in_half_precision_is_as_exact_as_the_output(policy, run):
    wrapper = starting(DENSE, dtype=policy)
    half = wrapper.layer.compute_dtype
    before = weights_in_use(wrapper)
    x = as_numpy(ops.cast(DENSE.x(), half))
    y = run(wrapper, ops.cast(x, half), training=True).y
    wanted = before | DENSE.started(before, x)
    exact, sizes = DENSE.expected(wanted, x, np.zeros((6, 3)))
    assert_close(y, exact.y, sizes.y.max(), half)


@pytest.mark.usefixtures("x64")
def test_start_under_a_float64_policy_is_float64(run):
    (inside,) = named("conv-2")
    wrapper, x = starting(inside, dtype="float64"), inside.x().astype("float64") * np.pi
    before = weights_in_use(wrapper)
    run(wrapper, x, training=True)
    after = weights_in_use(wrapper)
    for name, value in inside.started(before, x).items():
        size = max(np.abs(value).max(), np.abs(before[name]).max())
        assert_close(after[name], value, size, "float64")


def test_start_is_that_of_what_is_not_masked(run):
    (inside,) = named("dense-rank-3")
    wrapper, x = starting(inside), inside.x()
    mask = np.arange(15).reshape(3, 5) % 4 != 0
    before = weights_in_use(wrapper)
    wanted = inside.started(before, x[mask])
    dirty = np.where(mask[..., None], x, np.nan).astype("float32")
    run(wrapper, dirty, training=True, mask=mask)
    after = weights_in_use(wrapper)
    assert_close(after["g"], wanted["g"])
    assert_close(after["bias"], wanted["bias"])


def test_mask_that_does_not_fit_is_refused():
    (inside,) = named("dense-rank-3")
    with pytest.raises(ValueError, match=r"mask.shape=\(3, 4\), output_shape=\(3, 5, 3\)"):
        starting(inside)(inside.x(), training=True, mask=np.ones((3, 4), bool))


WAITS = {
    "inference": ({"training": False}, DENSE.x()),
    "empty": ({"training": True}, np.zeros((0, 4), "float32")),
    "nan": ({"training": True}, np.full((6, 4), np.nan, "float32")),
    "masked-out": ({"training": True, "mask": np.zeros(6, bool)}, DENSE.x()),
}


@pytest.mark.parametrize(("call", "x"), WAITS.values(), ids=WAITS)
def test_start_waits_for_the_first_batch_that_counts(call, x, run):
    wrapper = starting(DENSE)
    before = weights_by_name(wrapper)
    run(wrapper, x, **call)
    waited = weights_by_name(wrapper)
    assert all(np.array_equal(waited[name], value) for name, value in before.items())
    run(wrapper, DENSE.x(), training=True)
    assert weights_by_name(wrapper)["initialized"] == 1


def test_frozen_layer_does_not_start(run):
    wrapper = starting(DENSE)
    wrapper.trainable = False
    run(wrapper, DENSE.x(), training=True)
    assert weights_by_name(wrapper)["initialized"] == 0


def test_constant_channel_is_centered_only(run):
    wrapper = starting(DENSE)
    before = weights_in_use(wrapper)
    y = run(wrapper, np.full((6, 4), 0.1, "float32"), training=True).y
    assert_close(y, np.zeros((6, 3)), 1)
    assert_close(weights_in_use(wrapper)["g"], before["g"])


def test_rounding_of_a_constant_channel_is_not_blown_up(run):
    wrapper, x = starting(DENSE), np.full((6, 4), 0.1, "float32")
    x[::2] = np.nextafter(x[::2], 1)
    before = weights_in_use(wrapper)
    run(wrapper, x, training=True)
    assert_close(weights_in_use(wrapper)["g"], before["g"])


def test_unwrapped_layer_holds_the_start(run):
    wrapper = starting(DENSE)
    run(wrapper, DENSE.x(), training=True)
    plain, wanted = wrapper.unwrap(), weights_in_use(wrapper)
    found = weights_by_name(plain)
    assert_close(found["kernel"], DENSE.normalized(wanted)[0])
    assert_close(found["bias"], wanted["bias"])


def test_channels_first_is_started_by_channel(run):
    last, first = (
        WeightNormalization(layers.Conv1D(3, 2, data_format=order), data_init=True)
        for order in ("channels_last", "channels_first")
    )
    x = draw((3, 5, 4))
    last.build(x.shape)
    first.build((3, 4, 5))
    first.set_weights(last.get_weights())
    # TensorFlow 2.21 convolves channels first with XLA on every CPU, in a graph only on some.
    how = {"how": "compiled"} if keras.backend.backend() == "tensorflow" else {}
    wanted = run(last, x, training=True, **how)
    found = run(first, np.moveaxis(x, -1, 1).copy(), training=True, **how)
    assert_close(np.moveaxis(found.y, 1, -1), wanted.y)
