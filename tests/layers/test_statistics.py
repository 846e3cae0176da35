"""Moving statistics that are right: debiased, cumulative, unbiased, and where they are kept."""

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn.kernels import reference
from tests.cases import TABLE, U, assert_close, draw, named, trained
from tests.oracle import expected, weights_by_name

BACKEND = keras.backend.backend()
CHANNELS = TABLE[-1]
LAYERS = {"batch": keras_bn.BatchNormalization, "renorm": keras_bn.BatchRenormalization}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
MODES = ["eager", "graph", "compiled"] if BACKEND == "tensorflow" else ["eager", "compiled"]


def built(layer, shape=TABLE):
    layer.build(shape)
    return layer


def batches(steps, sizes=(8,), mean=5.0, std=3.0):
    """Return batches, of these sizes in turn, each with a mean of its own."""
    rng = np.random.default_rng(0)
    shapes = [(sizes[i % len(sizes)], CHANNELS) for i in range(steps)]
    return [rng.normal(mean + rng.normal(), std, shape).astype("float32") for shape in shapes]


def after(layer, data):
    """Return what the layer keeps after these batches."""
    _ = [layer(x, training=True) for x in data]
    return weights_by_name(layer)


def faded(values, momentum):
    """Return the average of the values in which each has the share `momentum` of the next."""
    return np.average(values, axis=0, weights=momentum ** np.arange(len(values))[::-1])


# Debiased.

STEPS = {"one": 1, "two": 2, "ten": 10, "a-hundred": 100}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_debiased_statistics_are_the_faded_average_of_the_batches_alone(steps):
    data = batches(steps)
    found = after(keras_bn.BatchNormalization(debias=True), data)
    exact = [reference.moments(x, (0,)) for x in data]
    assert_close(found["moving_mean"], faded([m.mean[0] for m in exact], 0.99))
    assert_close(found["moving_variance"], faded([m.variance[0] for m in exact], 0.99))


def test_debiased_renormalization_keeps_the_faded_average_of_deviations():
    data = batches(10)
    found = after(keras_bn.BatchRenormalization(debias=True), data)
    deviations = [np.sqrt(reference.moments(x, (0,)).variance[0] + 1e-3) for x in data]
    assert_close(found["moving_variance"], faded(deviations, 0.99) ** 2 - 1e-3)


INITIAL = {
    "moving_mean_initializer": keras.initializers.Constant(1e4),
    "moving_variance_initializer": keras.initializers.Constant(1e8),
}


@every_layer
def test_nothing_of_the_initial_value_is_left(layer):
    data = batches(1)
    found, wanted = (after(layer(debias=True, **more), data) for more in (INITIAL, {}))
    assert all(np.array_equal(found[name], value) for name, value in wanted.items())


@every_layer
def test_inference_after_one_debiased_step_is_that_batchs(layer, run):
    norm, (x,) = built(layer(debias=True)), batches(1)
    run(norm, x, training=True)
    assert_close(run(norm, x).y, reference.normalize(x, (0,)))


def test_debiased_statistics_become_the_plain_ones():
    data = batches(40)
    found, plain = (
        after(keras_bn.BatchNormalization(momentum=0.5, debias=debias), data)
        for debias in (True, False)
    )
    # Half of the initial value is left at each step: 2^-40 of it.
    assert_close(found["moving_variance"], plain["moving_variance"])


def test_channels_are_counted_one_by_one(run):
    layer = built(keras_bn.BatchNormalization(axis=(1, 2), debias=True), (4, 2, 2))
    x, mask = draw((4, 2, 2)), np.ones((4, 2), bool)
    mask[:, 1] = False  # in Keras' form of a mask: the second row of channels
    run(layer, x, training=True, mask=mask)
    found = run(layer, 2 * x, training=True).state
    assert found["moving_count"].ravel().tolist() == pytest.approx([1.99, 1.99, 1.0, 1.0])
    assert_close(found["moving_mean"][1], 2 * x[:, 1].astype("float64").mean(0))


@pytest.mark.parametrize("case", named("debiased", "cumulative"), ids=lambda case: case.name)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_channel_is_not_counted(case, value, run):
    layer, x = case.built(), case.x()
    x[0, 0, 0, 2] = value
    before = weights_by_name(layer)["moving_count"]
    found = run(layer, x, training=True).state["moving_count"]
    assert (found != before).tolist() == [True, True, False, True, True, True]


def test_debiased_renorm_corrects_by_its_own_momentum():
    layer = keras_bn.BatchNormalization(renorm=True, debias=True, renorm_momentum=0.5)
    data = batches(3)
    found = after(layer, data)
    means = [x.astype("float64").mean(0) for x in data]
    assert_close(found["renorm_mean"], faded(means, 0.5))
    assert_close(found["moving_mean"], faded(means, 0.99))


WARM = {"rmax_steps": None, "dmax_steps": None}
FIRST = {
    "keras": (keras_bn.BatchNormalization, {"renorm": True, "debias": True}),
    "paper": (keras_bn.BatchRenormalization, {"debias": True, **WARM}),
    "cumulative": (keras_bn.BatchRenormalization, {"momentum": None, **WARM}),
}


@pytest.mark.parametrize(("layer", "options"), FIRST.values(), ids=FIRST)
def test_first_step_is_not_corrected_towards_the_initial_value(layer, options, run):
    (x,) = batches(1)
    y = run(built(layer(**options)), x, training=True).y
    assert_close(y, reference.normalize(x, (0,)))


# Cumulative.

SIZES = {"equal": (8,), "uneven": (1, 8, 3, 30), "one-large": (2, 2, 2, 400)}


@pytest.mark.filterwarnings("ignore:.* trains on one element per channel")
@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_cumulative_statistics_are_those_of_all_the_data(sizes, unbiased):
    data = batches(12, sizes)
    found = after(keras_bn.BatchNormalization(momentum=None, unbiased=unbiased), data)
    whole = np.concatenate(data).astype("float64")
    assert_close(found["moving_mean"], whole.mean(0))
    assert_close(found["moving_variance"], whole.var(0, ddof=int(unbiased)))


def test_cumulative_statistics_count_by_the_mask(run):
    layer, data = (
        built(keras_bn.BatchNormalization(momentum=None), (None, 5, 6)),
        draw((3, 4, 5, 6)),
    )
    masks = np.random.default_rng(0).random((3, 4, 5)) < 0.7
    for x, mask in zip(data, masks, strict=True):
        found = run(layer, x, training=True, mask=mask).state
    assert_close(found["moving_mean"], data[masks].astype("float64").mean(0))
    assert_close(found["moving_variance"], data[masks].astype("float64").var(0))
    assert found["moving_count"].tolist() == [masks.sum()] * 6


def test_cumulative_variance_is_right_far_from_zero():
    data = batches(12, (2, 8, 3, 30), mean=3e4)
    found = after(keras_bn.BatchNormalization(momentum=None), data)
    whole = np.concatenate(data).astype("float64")
    # The mean is kept in float32: each step rounds it by u·κ deviations, here 1e4 u.
    error = found["moving_variance"] / whole.var(0) - 1
    assert np.abs(error).max() <= 2 * len(data) * U["float32"] * 1e4


def test_cumulative_average_of_renormalization_counts_by_elements():
    data = batches(6, (2, 20))
    found = after(keras_bn.BatchRenormalization(momentum=None), data)
    deviations = [np.sqrt(x.astype("float64").var(0) + 1e-3) for x in data]
    wanted = np.average(deviations, axis=0, weights=[len(x) for x in data])
    assert_close(found["moving_variance"], wanted**2 - 1e-3)
    assert_close(found["moving_mean"], np.concatenate(data).astype("float64").mean(0))


# Unbiased.


def test_unbiased_variance_is_that_of_the_population():
    (x,) = batches(1)
    found = after(keras_bn.BatchNormalization(momentum=0.0, unbiased=True), [x])
    assert_close(found["moving_variance"], x.astype("float64").var(0, ddof=1))


def test_unbiased_is_what_is_kept_not_what_normalizes(run):
    (x,) = batches(1)
    y = run(built(keras_bn.BatchNormalization(unbiased=True)), x, training=True).y
    assert_close(y, reference.normalize(x, (0,)))


@pytest.mark.filterwarnings("ignore:.* trains on one element per channel")
@pytest.mark.parametrize("momentum", [0.0, None], ids=["moving", "cumulative"])
def test_unbiased_variance_of_one_element_is_zero(momentum):
    layer = keras_bn.BatchNormalization(momentum=momentum, unbiased=True)
    found = after(layer, batches(1, (1,)))
    assert found["moving_variance"].tolist() == [0.0] * CHANNELS


def test_unbiased_variance_of_one_element_left_by_a_mask_is_zero(run):
    layer, (x,) = built(keras_bn.BatchNormalization(momentum=0.0, unbiased=True)), batches(1)
    found = run(layer, x, training=True, mask=np.arange(8) == 3).state
    assert found["moving_variance"].tolist() == [0.0] * CHANNELS


# Compiled, and over several fits.

OPTIONS = {
    "debiased": {"debias": True},
    "cumulative": {"momentum": None},
    "unbiased": {"unbiased": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize(
    "case",
    named("debiased-renorm", "debiased-renormalization", "cumulative-unbiased"),
    ids=lambda case: case.name,
)
def test_every_mode_keeps_the_formula(case, how, run):
    layer, x = case.built(), case.x()
    wanted = expected(layer, weights_by_name(layer), x, x, training=True).state
    found = run(layer, x, how=how, training=True).state
    _ = [assert_close(found[name], value) for name, value in wanted.items()]


def model_of(**options):
    layer = keras_bn.BatchNormalization(name="norm", **options)
    return keras.Sequential([keras.Input((CHANNELS,)), layer])


def fit(model, x, **compiled):
    model.compile(keras.optimizers.SGD(0.0), "mse", **compiled)
    model.fit(x, x, batch_size=8, shuffle=False, verbose=0)


# torch.compile takes long: other tests of the layer are enough.
COMPILED = {"default": {}} if BACKEND == "torch" else {"default": {}, "jit": {"jit_compile": True}}


@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
def test_count_goes_on_in_compiled_fits(compiled):
    model, x = model_of(debias=True), draw((20, CHANNELS))
    _ = [fit(model, x, **compiled) for _ in range(2)]
    parts = [x[:8], x[8:16], x[16:]] * 2
    wanted = faded([part.astype("float64").mean(0) for part in parts], 0.99)
    found = weights_by_name(model.layers[0])
    assert_close(found["moving_mean"], wanted)
    assert_close(found["moving_count"], [(1 - 0.99**6) / (1 - 0.99)] * CHANNELS)


@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
def test_cumulative_statistics_of_a_compiled_fit_are_the_datas(compiled):
    model, x = model_of(momentum=None), draw((20, CHANNELS))
    fit(model, x, **compiled)
    found = weights_by_name(model.layers[0])
    assert_close(found["moving_variance"], x.astype("float64").var(0))


@every_option
def test_frozen_layer_keeps_its_statistics(options):
    layer = trained(built(keras_bn.BatchNormalization(trainable=False, **options)))
    before = layer.get_weights()
    layer(draw(TABLE), training=True)
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))
