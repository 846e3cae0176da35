"""The count behind moving statistics in files and lists of weights, with one and without."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import keras_bn
from tests.cases import IMAGE, TABLE, assert_close, draw, trained
from tests.oracle import weights_by_name

CHANNELS = TABLE[-1]


def built(layer, shape=TABLE):
    layer.build(shape)
    return layer


def model_of(**options):
    layer = keras_bn.BatchNormalization(name="norm", **options)
    return keras.Sequential([keras.Input((CHANNELS,)), layer])


def train(model, seed=0):
    """Train on some batches that lie far from the initial statistics."""
    _ = [model(draw(TABLE, seed + i, 5, 3), training=True) for i in range(3)]


COUNTED = {"debiased": {"debias": True}, "cumulative": {"momentum": None}}
every_counted = pytest.mark.parametrize("options", COUNTED.values(), ids=COUNTED)
WAYS = ["m.keras", "m.weights.h5", "list"]
every_way = pytest.mark.parametrize("way", WAYS)


def cross(source, target, way, folder):
    """Carry the weights of a model of one layer to another."""
    if way == "list":
        target.layers[0].set_weights(source.layers[0].get_weights())
        return
    save = source.save if way == "m.keras" else source.save_weights
    save(folder / way)
    target.load_weights(folder / way)


def assert_same_inference(model, other):
    x = draw(TABLE)
    assert np.array_equal(*(ops.convert_to_numpy(m(x, training=False)) for m in (model, other)))


@every_counted
@every_way
def test_count_is_saved(options, way, tmp_path, run):
    source, target = model_of(**options), model_of(**options)
    train(source)
    cross(source, target, way, tmp_path)
    found, wanted = (run(m.layers[0], draw(TABLE), training=True).state for m in (target, source))
    assert all(np.array_equal(found[name], value) for name, value in wanted.items())


@every_counted
def test_keras_file_goes_on_counting(options, tmp_path):
    model = model_of(**options)
    train(model)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    _ = [train(m, 3) for m in (model, again)]
    pairs = zip(model.layers[0].get_weights(), again.layers[0].get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@every_counted
@every_way
def test_weights_with_a_count_serve_a_plain_layer(options, way, tmp_path):
    source, target = model_of(**options), model_of()
    train(source)
    cross(source, target, way, tmp_path)
    assert_same_inference(target, source)


@every_counted
@every_way
def test_plain_weights_serve_a_layer_that_counts(options, way, tmp_path):
    source, target = model_of(), model_of(**options)
    trained(source.layers[0])
    train(target)
    cross(source, target, way, tmp_path)
    assert_same_inference(target, source)


def stock_model():
    return keras.Sequential(
        [keras.Input((CHANNELS,)), keras.layers.BatchNormalization(name="norm")]
    )


@every_counted
@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("back", [False, True], ids=["to-keras", "from-keras"])
def test_files_cross_to_the_layer_of_keras_and_back(options, way, back, tmp_path):
    ours, stock = model_of(**options), stock_model()
    _ = [trained(m.layers[0], i) for i, m in enumerate((ours, stock))]
    cross(*((stock, ours) if back else (ours, stock)), way, tmp_path)
    y, wanted = (ops.convert_to_numpy(m(draw(TABLE), training=False)) for m in (ours, stock))
    assert_close(y, wanted)


@every_way
def test_plain_statistics_count_as_settled_in_a_debiased_layer(way, tmp_path, run):
    plain, debiased = model_of(), model_of(debias=True)
    trained(plain.layers[0])
    cross(plain, debiased, way, tmp_path)
    x = draw(TABLE)
    found, wanted = (run(m.layers[0], x, training=True).state for m in (debiased, plain))
    # As in the plain layer, the batch has a hundredth of the weight, not all of it.
    assert_close(found["moving_mean"], wanted["moving_mean"])
    assert_close(found["moving_variance"], wanted["moving_variance"])


@every_way
def test_plain_statistics_serve_until_the_first_cumulative_step(way, tmp_path, run):
    plain, cumulative = model_of(), model_of(momentum=None)
    trained(plain.layers[0])
    cross(plain, cumulative, way, tmp_path)
    assert_same_inference(cumulative, plain)
    found = run(cumulative.layers[0], draw(TABLE), training=True).state
    assert_close(found["moving_mean"], draw(TABLE).astype("float64").mean(0))


def test_statistics_at_momentum_one_stay_in_a_debiased_layer(run):
    layer = built(keras_bn.BatchNormalization(momentum=1.0, debias=True))
    plain = trained(built(keras_bn.BatchNormalization()))
    layer.set_weights(plain.get_weights())
    found = run(layer, draw(TABLE), training=True).state
    assert_close(found["moving_mean"], weights_by_name(plain)["moving_mean"])


FAMILY = {
    "plain": keras_bn.BatchNormalization,
    "debiased": functools.partial(keras_bn.BatchNormalization, debias=True),
    "renormalization": keras_bn.BatchRenormalization,
    "debiased-renormalization": functools.partial(keras_bn.BatchRenormalization, debias=True),
}


@pytest.mark.parametrize("source", FAMILY.values(), ids=[f"from-{name}" for name in FAMILY])
@pytest.mark.parametrize("target", FAMILY.values(), ids=[f"to-{name}" for name in FAMILY])
def test_weight_lists_cross_within_the_family(source, target):
    source, target = trained(built(source())), built(target())
    target.set_weights(source.get_weights())
    found, wanted = weights_by_name(target), weights_by_name(source)
    shared = found.keys() & wanted.keys()
    assert shared >= {"gamma", "beta", "moving_mean", "moving_variance"}
    assert all(np.array_equal(found[name], wanted[name]) for name in shared)


MISFITS = {
    "too-few": (slice(0, 3), (), 3),
    "another-shape": (slice(0, 4), (2,), 5),
    "too-many-counts": (slice(0, 4), (CHANNELS, CHANNELS, CHANNELS), 7),
    "too-many-steps": (slice(0, 4), (None, None), 6),
}


@pytest.mark.parametrize(("part", "more", "number"), MISFITS.values(), ids=MISFITS)
def test_weights_that_do_not_fit_are_refused(part, more, number):
    layer = built(keras_bn.BatchNormalization())
    surplus = [np.zeros(() if size is None else size, "float32") for size in more]
    with pytest.raises(ValueError, match=f"weight list of length {number}"):
        layer.set_weights([*layer.get_weights()[part], *surplus])


def test_count_comes_last_and_learns_nothing():
    layer = built(keras_bn.BatchNormalization(debias=True, renorm=True), IMAGE)
    names = [v.name for v in layer.weights]
    assert names[-2:] == ["moving_count", "renorm_count"]
    assert [v.name for v in layer.trainable_variables] == ["gamma", "beta"]
