"""Identities that tie the layers of the family to each other, and to Keras' LayerNormalization."""

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn.kernels import reference
from tests.cases import IMAGE, TABLE, assert_close, draw, trained
from tests.oracle import weights_by_name

NEVER = {"rmax": 1.0, "dmax": 0.0}
X, DY = draw(IMAGE), draw(IMAGE, 1, 0, 1)
CHANNELS = IMAGE[-1]


def built(layer, shape=IMAGE):
    layer.build(shape)
    return trained(layer)


def with_weights_of(other, layer, shape=IMAGE):
    """Return the layer with those weights of another that it has too."""
    layer.build(shape)
    values = {variable.name: variable for variable in other.weights}
    _ = [v.assign(values[v.name]) for v in layer.weights if v.name in values]
    return layer


def assert_same(found, wanted):
    assert_close(found.y, wanted.y)
    assert_close(found.dx, wanted.dx)
    names = found.gradients.keys() & wanted.gradients.keys()
    assert names == wanted.gradients.keys()
    # Sums of as many terms as there are elements in a channel.
    terms = np.abs(DY).sum((0, 1, 2)).max()
    assert all(np.abs(found.gradients[k] - wanted.gradients[k]).max() < 3e-6 * terms for k in names)


def test_as_many_groups_as_channels_is_instance_normalization(run):
    instance = built(keras_bn.GroupNormalization(-1))
    groups = with_weights_of(instance, keras_bn.GroupNormalization(CHANNELS))
    assert_same(run(groups, X, DY), run(instance, X, DY))


@pytest.mark.parametrize("sample", range(IMAGE[0]))
def test_batch_of_one_sample_is_instance_normalization(sample, run):
    instance = built(keras_bn.GroupNormalization(-1))
    batch = with_weights_of(instance, keras_bn.BatchNormalization())
    x, dy = X[sample : sample + 1], DY[sample : sample + 1]
    assert_same(run(batch, x, dy, training=True), run(instance, x, dy))


RENORM = {
    "paper": lambda **options: keras_bn.BatchRenormalization(**NEVER, **options),
    "before-the-ramp": keras_bn.BatchRenormalization,
    "keras": lambda **options: keras_bn.BatchNormalization(
        renorm=True, renorm_clipping={"rmin": 1, "rmax": 1, "dmax": 0}, **options
    ),
}


@pytest.mark.parametrize("make", RENORM.values(), ids=RENORM)
def test_renormalization_without_correction_is_batch_normalization(make, run):
    renorm = built(make())
    batch = with_weights_of(renorm, keras_bn.BatchNormalization())
    found, wanted = run(renorm, X, DY, training=True), run(batch, X, DY, training=True)
    assert_same(found, wanted)
    assert np.array_equal(found.state["moving_mean"], wanted.state["moving_mean"])


@pytest.mark.parametrize("make", RENORM.values(), ids=RENORM)
def test_renormalization_at_inference_is_batch_normalization(make, run):
    renorm = built(make())
    batch = with_weights_of(renorm, keras_bn.BatchNormalization())
    assert np.array_equal(run(renorm, X).y, run(batch, X).y)


def test_fully_corrected_batch_is_inference(run):
    layer = built(
        keras_bn.BatchRenormalization(rmax=1e6, dmax=1e6, rmax_steps=None, dmax_steps=None)
    )
    inference = run(layer, X).y
    assert_close(run(layer, X, training=True).y, inference)


def test_frozen_batch_normalization_is_its_affine_map(run):
    layer = built(keras_bn.BatchNormalization(trainable=False))
    w = weights_by_name(layer)
    scale = w["gamma"] / np.sqrt(w["moving_variance"] + layer.epsilon)
    assert_close(run(layer, X, training=True).y, (X - w["moving_mean"]) * scale + w["beta"])


def test_one_group_of_a_table_is_layer_normalization(run):
    group = built(keras_bn.GroupNormalization(1), TABLE)
    layer = with_weights_of(group, keras.layers.LayerNormalization(), TABLE)
    x, w = draw(TABLE), weights_by_name(group)
    wanted = reference.normalize(x, (1,), gamma=w["gamma"], beta=w["beta"])
    assert_close(run(group, x).y, wanted)
    # Keras computes in float32 too: twice the bound apart at most.
    assert_close(run(layer, x).y, wanted)


AXES = {"last-two": (2, 3), "outer": (1, -1), "all-but-batch": (1, 2, 3)}


@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
def test_several_kept_axes_are_one_merged_axis(axis, run):
    kept = [a % 4 for a in axis]
    order = [a for a in range(4) if a not in kept] + kept
    sizes = [IMAGE[a] for a in order]
    merged = (*sizes[: -len(kept)], int(np.prod(sizes[-len(kept) :])))

    layer = built(keras_bn.BatchNormalization(axis=axis))
    flat = keras_bn.BatchNormalization()
    flat.build(merged)
    flat.set_weights([w.ravel() for w in layer.get_weights()])

    y = run(layer, X, training=True).y
    wanted = run(flat, np.transpose(X, order).reshape(merged), training=True).y
    assert_close(np.transpose(y, order).reshape(merged), wanted)


HALVES = {"batch": np.s_[:1], "rows": np.s_[:, :2], "columns": np.s_[:, :, 1::2]}


@pytest.mark.parametrize("part", HALVES.values(), ids=HALVES)
def test_merged_halves_are_the_whole(part):
    halves = np.zeros(IMAGE, bool)
    halves[part] = True
    parts = [reference.moments(X, (0, 1, 2), half) for half in (halves, ~halves)]
    whole = reference.merge(parts)
    layer = keras_bn.BatchNormalization(momentum=0.0)
    layer(X, training=True)
    found = weights_by_name(layer)
    assert_close(found["moving_mean"], whole.mean.ravel())
    assert_close(found["moving_variance"], whole.variance.ravel())


@pytest.mark.parametrize("part", HALVES.values(), ids=HALVES)
def test_mask_of_a_part_gives_the_part(part, run):
    mask = np.zeros(IMAGE[:-1], bool)
    mask[part] = True
    layer, alone = (built(keras_bn.BatchNormalization(momentum=0.0)) for _ in range(2))
    masked = run(layer, X, training=True, mask=mask).y[part]
    assert_close(masked, run(alone, X[part], training=True).y)


LAYERS = {
    "batch": keras_bn.BatchNormalization,
    "renorm": lambda **options: keras_bn.BatchNormalization(renorm=True, **options),
    "renormalization": lambda **options: keras_bn.BatchRenormalization(
        rmax_steps=None, dmax_steps=None, **options
    ),
    "group": lambda **options: keras_bn.GroupNormalization(2, **options),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@every_layer
def test_channels_first_is_the_transpose_of_channels_last(make, run):
    last = built(make())
    first = with_weights_of(last, make(axis=1), (3, 6, 4, 5))
    wanted = run(last, X, DY, training=True)
    found = run(first, *(np.moveaxis(a, -1, 1).copy() for a in (X, DY)), training=True)
    assert_close(np.moveaxis(found.y, 1, -1), wanted.y)
    assert_close(np.moveaxis(found.dx, 1, -1), wanted.dx)


@every_layer
def test_mask_of_ones_is_no_mask(make, run):
    layer, masked = built(make()), built(make())
    mask = np.ones(IMAGE[:-1], "float32")
    found = run(masked, X, DY, training=True, mask=mask)
    assert_same(found, run(layer, X, DY, training=True))


@every_layer
def test_scaled_weights_change_nothing(make, run):
    layer, masked = built(make()), built(make())
    mask = np.random.default_rng(0).uniform(0.5, 2, IMAGE[:-1]).astype("float32")
    found = run(masked, X, DY, training=True, mask=8 * mask)
    assert_same(found, run(layer, X, DY, training=True, mask=mask))


@every_layer
def test_weight_two_counts_a_sample_twice(make, run):
    layer, doubled = built(make()), built(make())
    weights = np.array([2, 1, 1], "float32").reshape(3, 1, 1)
    twice = np.concatenate([X, X[:1]])
    wanted = run(doubled, twice, training=True).y[:3]
    assert_close(run(layer, X, training=True, mask=weights).y, wanted)


@pytest.mark.parametrize("name", ["batch", "group"])
def test_shifted_and_scaled_input_gives_the_same_output(name, run):
    layer, moved = (built(LAYERS[name](epsilon=0.0)) for _ in range(2))
    grid = np.round(8 * X) / 8  # so that 4x + 64 is exact
    wanted = run(layer, grid, training=True).y
    # κ is below 16 there, instead of 4.
    assert_close(run(moved, 4 * grid + 64, training=True).y, wanted, 4 * np.abs(wanted).max())


def test_permuted_batch_gives_the_permuted_output(run):
    layer, permuted = (built(keras_bn.BatchNormalization()) for _ in range(2))
    order = [2, 0, 1]
    found = run(permuted, X[order], training=True)
    wanted = run(layer, X, training=True)
    assert_close(found.y, wanted.y[order])
    assert_close(found.state["moving_variance"], wanted.state["moving_variance"])
