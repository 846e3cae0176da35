"""Statistics that survive: what stock layers get wrong, one test for each promise."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_bn
from tests.cases import (
    BY_NAME,
    CASES,
    HALF,
    IMAGE,
    SEQUENCE,
    TABLE,
    assert_agrees,
    assert_close,
    draw,
    named,
    trained,
)
from tests.oracle import expected, weights_by_name

KEEPERS = (keras_bn.BatchNormalization, keras_bn.BatchRenormalization)
KEPT = [case for case in CASES if case.layer in KEEPERS and case.shape == IMAGE]
BATCH = named(
    "batch", "batch-two-axes", "renorm-clipped", "renormalization", "renormalization-ramp"
)
every_kept = pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
every_batch = pytest.mark.parametrize("case", BATCH, ids=lambda case: case.name)
every_limit = pytest.mark.parametrize(
    "case", [*BATCH, *named("group", "group-instance")], ids=lambda case: case.name
)
ONE_ELEMENT = "trains on one element per channel"


def call(layer, x, **options):
    return ops.convert_to_numpy(ops.cast(layer(x, **options), "float32"))


def unchanged(before, layer):
    after = weights_by_name(layer)
    return all(np.array_equal(after[name], value) for name, value in before.items())


# float32 statistics, whatever the policy.


STALLS = [
    *((keras_bn.BatchNormalization, policy) for policy in HALF),
    (keras_bn.BatchRenormalization, "bfloat16"),
]


@pytest.mark.parametrize(("layer", "policy"), STALLS)
def test_moving_mean_arrives_under_every_policy(layer, policy):
    norm = layer(dtype=policy)
    x = ops.full((4, 1), 2.97, norm.compute_dtype)
    exact = float(ops.convert_to_numpy(ops.cast(x[0, 0], "float32")))
    _ = [norm(x, training=True) for _ in range(300)]
    # A bfloat16 average stalls at 2.20, short of 2.82: it loses updates below half a unit.
    wanted = exact * (1 - 0.99**300)
    # Each step rounds once; what came before fades, so 1 / (1 - momentum) roundings remain.
    assert weights_by_name(norm)["moving_mean"] == pytest.approx(wanted, rel=100 * 2**-24)


@every_limit
def test_values_above_the_largest_float16_are_normalized(case, run):
    layer, x = case.built(dtype="mixed_float16"), draw(case.shape, 0, 2e5, 1e5)
    wanted = expected(layer, weights_by_name(layer), x, x, training=True)
    found = run(layer, x, training=True)
    assert x.max() > 65504
    assert_close(found.y, wanted.y, dtype="float16")
    assert_close(found.state.get("moving_mean", 0), wanted.state.get("moving_mean", 0))


@every_limit
def test_sums_above_the_largest_float16_are_exact(case, run):
    layer = case.built(dtype="float16")
    x = np.round(draw(case.shape, 0, 3e4, 1e4)).astype("float16")
    wanted = expected(layer, weights_by_name(layer), x, x, training=True)
    assert_close(run(layer, x, training=True).y, wanted.y, dtype="float16")


# A count of zero.


@every_kept
def test_empty_batch_changes_nothing(case):
    layer = case.built()
    before = weights_by_name(layer)
    y = call(layer, np.zeros((0, *case.shape[1:]), "float32"), training=True)
    assert (y.shape, unchanged(before, layer)) == ((0, *case.shape[1:]), True)


@every_kept
def test_masked_out_batch_is_normalized_as_in_inference(case):
    layer, x = case.built(), case.x()
    before, wanted = weights_by_name(layer), call(layer, x)
    mask = np.zeros([case.shape[axis] for axis in case.pooled], bool)
    y = call(layer, x, training=True, mask=mask)
    assert unchanged(before, layer)
    assert_close(y, wanted)


@every_batch
def test_masked_out_batch_has_finite_gradients(case, run):
    layer, x = case.built(), case.x()
    mask = np.zeros([case.shape[axis] for axis in case.pooled], bool)
    found = run(layer, x, draw(case.shape, 1), training=True, mask=mask)
    assert np.isfinite(found.dx).all()
    assert all(np.isfinite(gradient).all() for gradient in found.gradients.values())


def test_masked_out_sample_of_group_normalization_is_finite(run):
    layer, mask = BY_NAME["group"].built(), np.ones(IMAGE[:-1], bool)
    mask[0] = False
    found = run(layer, draw(IMAGE), draw(IMAGE, 1), mask=mask)
    assert np.isfinite(found.y).all()
    assert np.isfinite(found.dx).all()


def test_channel_without_elements_keeps_its_statistics(run):
    case = BY_NAME["batch-two-axes"]
    layer, mask = case.built(), np.ones(IMAGE[:-1], bool)
    mask[:, 2] = False  # the third row, one of the kept elements, in Keras' form of a mask
    x, dy = case.x(), draw(IMAGE, 1)
    before = weights_by_name(layer)
    found = run(layer, x, dy, training=True, mask=mask)
    assert np.array_equal(found.state["moving_mean"][2], before["moving_mean"][2])
    assert not np.isclose(found.state["moving_mean"][:2], before["moving_mean"][:2]).any()
    inference = call(trained(layer), x)[:, 2]
    assert_close(found.y[:, 2], inference)


# NaN and infinity.


@every_batch
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_value_shows_in_the_output_and_not_in_the_statistics(case, value):
    layer, x, where = case.built(), case.x(), (0, 1, 2, 3)
    x[where] = value
    before = weights_by_name(layer)
    y = call(layer, x, training=True)
    after = weights_by_name(layer)
    assert np.isnan(y[where])
    assert all(np.isfinite(array).all() for array in after.values())
    bad = tuple(where[axis] for axis in case.kept)
    assert after["moving_mean"][bad] == before["moving_mean"][bad]


@every_batch
def test_bad_batch_of_all_channels_does_not_count_as_a_step(case):
    layer = case.built()
    before = weights_by_name(layer)
    y = call(layer, np.full(case.shape, np.nan, "float32"), training=True)
    assert np.isnan(y).all()
    assert unchanged(before, layer)


@every_batch
def test_training_goes_on_after_a_bad_batch(case):
    layer, other = case.built(), case.built()
    call(layer, np.full(case.shape, np.nan, "float32"), training=True)
    assert_close(call(layer, case.x(), training=True), call(other, case.x(), training=True))
    assert all(
        np.array_equal(a, b) for a, b in zip(layer.get_weights(), other.get_weights(), strict=True)
    )


# One element, one channel.


@every_batch
def test_one_element_has_variance_zero_and_the_output_beta(case):
    layer = case.make()
    shape = tuple(n if axis in case.kept else 1 for axis, n in enumerate(case.shape))
    with pytest.warns(UserWarning, match=ONE_ELEMENT):
        y = call(layer, draw(shape), training=True)
    plain = not getattr(layer, "renorm", False) and "Re" not in type(layer).__name__
    assert np.isfinite(y).all()
    assert not plain or np.array_equal(y, np.zeros(shape))


@every_batch
def test_one_element_warns_once_per_layer(case):
    shape = tuple(n if axis in case.kept else 1 for axis, n in enumerate(case.shape))
    layer, other = case.make(name="first"), case.make(name="second")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _ = [norm(draw(shape), training=True) for norm in (layer, layer, other, layer)]
    named_first = [w for w in caught if "'first' " + ONE_ELEMENT in str(w.message)]
    named_second = [w for w in caught if "'second' " + ONE_ELEMENT in str(w.message)]
    assert (len(named_first), len(named_second)) == (1, 1)


def test_one_element_at_inference_does_not_warn():
    case = BY_NAME["batch-rank-2"]
    y = call(case.built(), draw((1, 6)))
    assert np.isfinite(y).all()


LIMIT_MASKS = {
    "one-channel": ({}, (4, 5, 1), (4, 5)),
    "one-channel-rank-2": ({}, (8, 1), (8,)),
    "channels-first": ({"axis": 1}, (3, 6, 4, 5), (3, 4, 5)),
    "rank-5": ({}, (2, 3, 2, 3, 6), (2, 3, 2, 3)),
    "rank-5-channels-first": ({"axis": 1}, (2, 6, 3, 2, 3), (2, 3, 2, 3)),
}


@pytest.mark.parametrize("layer", [keras_bn.BatchNormalization, keras_bn.BatchRenormalization])
@pytest.mark.parametrize(("options", "shape", "sizes"), LIMIT_MASKS.values(), ids=LIMIT_MASKS)
def test_mask_serves_every_layout(layer, options, shape, sizes, run):
    norm = layer(**options)
    norm.build(shape)
    x, dy = draw(shape), draw(shape, 1, 0, 1)
    mask = np.random.default_rng(0).random(sizes) < 0.7
    full = np.expand_dims(mask, 1 if options else -1)
    wanted = expected(norm, weights_by_name(norm), x, dy, training=True, mask=full)
    assert_agrees(run(norm, x, dy, training=True, mask=mask), wanted, dy)


def test_masked_mean_is_divided_by_its_count_alone():
    layer = keras_bn.BatchNormalization(momentum=0.0)
    weights = np.array([[1e-6], [1e-6]], "float32")
    # Keras divides by the count + 1e-7: 5 % off here.
    layer(np.array([[[1.0]], [[3.0]]], "float32"), training=True, mask=weights)
    found = weights_by_name(layer)
    assert_close(found["moving_mean"], [2.0])
    assert_close(found["moving_variance"], [1.0])


# What lies under a mask.

UNDER = {"nan": np.nan, "infinity": np.inf, "huge": 3e38, "large": 1e18}


HIDDEN = [
    *((case, "nan") for case in [*BATCH, *named("group", "group-instance")]),
    *((case, under) for case in named("batch", "group") for under in ("infinity", "huge", "large")),
]


@pytest.mark.parametrize(("case", "under"), HIDDEN, ids=lambda item: getattr(item, "name", item))
def test_what_lies_under_a_mask_never_matters(case, under, run):
    mask = np.random.default_rng(0).random([case.shape[a] for a in case.pooled]) < 0.6
    here = np.broadcast_to(np.expand_dims(mask, case.kept), case.shape)

    def result(fill):
        x = np.where(here, case.x(), fill).astype("float32")
        return run(case.built(), x, draw(case.shape, 1) * here, training=True, mask=mask)

    clean, dirty = result(0), result(UNDER[under])
    assert np.array_equal(dirty.y[here], clean.y[here])
    assert np.array_equal(dirty.dx, clean.dx)
    assert all(np.array_equal(dirty.gradients[k], v) for k, v in clean.gradients.items())
    assert all(np.array_equal(dirty.state[k], v) for k, v in clean.state.items())


@every_batch
def test_output_under_a_mask_is_normalized_like_the_rest(case, run):
    layer, x = case.built(), case.x()
    mask = np.ones([case.shape[a] for a in case.pooled], bool)
    mask[0] = False
    full = np.expand_dims(mask, case.kept)
    wanted = expected(layer, weights_by_name(layer), x, x, training=True, mask=full)
    assert_close(run(layer, x, training=True, mask=mask).y[0], wanted.y[0])


# Data far from zero, constant or tiny.


@every_limit
@pytest.mark.parametrize("mean", [0.0, 1e5], ids=["zero", "far"])
def test_constant_input_gives_a_finite_output_and_gradient(case, mean, run):
    layer, x = case.built(), np.full(case.shape, mean, "float32")
    wanted = expected(layer, weights_by_name(layer), x, draw(case.shape, 1), training=True)
    found = run(layer, x, draw(case.shape, 1), training=True)
    assert_close(found.y, wanted.y)
    assert np.isfinite(found.dx).all()


@every_batch
def test_variance_is_right_at_a_large_mean(case, run):
    layer, x = case.built(), draw(case.shape, 0, 1e4, 1.0)
    wanted = expected(layer, weights_by_name(layer), x, x, training=True)
    found = run(layer, x, training=True)
    # κ = 1e4: E[x²] - E[x]² would be off by 6 times the variance.
    assert_close(found.state["moving_variance"], wanted.state["moving_variance"])


@every_limit
def test_tiny_values_are_not_lost(case, run):
    layer, x = case.make(epsilon=0.0), draw(case.shape, 0, 0, 1e-15)
    layer.build(case.shape)
    wanted = expected(layer, weights_by_name(layer), x, x, training=True)
    assert_close(run(layer, x, training=True).y, wanted.y)


def test_half_a_million_elements_cost_no_digits():
    x = draw((2**19, 1), 0, 1.0, 2.0)
    layer = keras_bn.BatchNormalization(momentum=0.0)
    layer(x, training=True)
    found = weights_by_name(layer)
    assert_close(found["moving_mean"], [x.mean(dtype="float64")])
    assert_close(found["moving_variance"], [x.astype("float64").var()])


def test_moving_average_stays_where_it_is():
    layer = keras_bn.BatchNormalization()
    x = draw(TABLE)
    layer.build(TABLE)
    layer.set_weights([*layer.get_weights()[:2], x.mean(0), x.var(0)])
    before = weights_by_name(layer)
    _ = [layer(x, training=True) for _ in range(300)]
    # At most 1 / (1 - momentum) roundings of half a unit in the last place remain.
    after = weights_by_name(layer)
    assert after["moving_mean"] == pytest.approx(before["moving_mean"], rel=100 * 2**-24)


def test_mask_of_a_sequence_model_may_be_all_padding():
    layer = keras_bn.BatchNormalization()
    model = keras.Sequential([keras.Input(SEQUENCE[1:]), keras.layers.Masking(), layer])
    y = call(model, np.zeros(SEQUENCE, "float32"), training=True)
    assert np.isfinite(y).all()
    assert unchanged({"moving_mean": np.zeros(6), "moving_variance": np.ones(6)}, layer)
