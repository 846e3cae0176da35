"""Ghost batches: slices of a training batch that are normalized one by one."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_bn
from keras_bn.kernels import reference
from tests.cases import IMAGE, TABLE, assert_agrees, assert_close, draw, named, trained
from tests.oracle import expected, weights_by_name

BACKEND = keras.backend.backend()
CHANNELS = TABLE[-1]
MODES = ["eager", "graph", "compiled"] if BACKEND == "tensorflow" else ["eager", "compiled"]
ONE_ELEMENT = "ignore:.* trains on one element per channel"


def built(layer, shape=TABLE):
    layer.build(shape)
    return trained(layer)


def normalization(size, epsilon=1.0, **options):
    """Return a layer whose epsilon keeps κ below 4, though ghosts of few elements vary little."""
    return keras_bn.BatchNormalization(virtual_batch_size=size, epsilon=epsilon, **options)


# Samples, the size asked for, and how many ghosts that makes.
BATCHES = {
    "a-multiple": (16, 8, 2),
    "one-less": (15, 8, 2),
    "one-more": (17, 8, 3),
    "prime": (13, 4, 4),
    "one-sample-too-many": (9, 8, 2),
    "as-large-as-the-batch": (8, 8, 1),
    "larger-than-the-batch": (3, 8, 1),
}
SHAPES = {"table": (CHANNELS,), "sequence": (5, CHANNELS), "image": (2, 3, CHANNELS)}
every_batch = pytest.mark.parametrize(("samples", "size", "number"), BATCHES.values(), ids=BATCHES)
some_batches = pytest.mark.parametrize(
    ("samples", "size", "number"),
    [BATCHES[name] for name in ("one-less", "prime")],
    ids=["one-less", "prime"],
)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


# What is normalized by what.


@every_shape
@every_batch
def test_each_ghost_is_normalized_as_a_batch_of_its_own(samples, size, number, shape, run):
    x = draw((samples, *shape))
    layer = normalization(size)
    layer.build(x.shape)
    y = run(layer, x, training=True).y
    axes = tuple(range(x.ndim - 1))
    for i in range(number):
        assert_close(y[i::number], reference.normalize(x[i::number], axes, epsilon=1.0))


@every_shape
@some_batches
def test_gradient_stays_within_a_ghost(samples, size, number, shape, run):
    x, dy = draw((samples, *shape)), draw((samples, *shape), 1, 0, 1)
    dy[number - 1 :: number] = 0
    layer = built(normalization(size), x.shape)
    dx = run(layer, x, dy, training=True).dx
    assert not dx[number - 1 :: number].any()
    assert number == 1 or np.abs(dx[0]).max() > 0


@every_shape
@some_batches
def test_statistics_are_those_of_the_whole_batch(samples, size, number, shape, run):
    x = draw((samples, *shape)) + 10 * np.arange(samples).reshape(-1, *(1 for _ in shape))
    x = x.astype("float32")
    layer = built(normalization(size, momentum=0.0), x.shape)
    found, whole = run(layer, x, training=True).state, x.astype("float64").reshape(-1, CHANNELS)
    assert_close(found["moving_mean"], whole.mean(0))
    # What lies between the ghosts counts too; κ stays below 4.
    assert_close(found["moving_variance"], whole.var(0))


def test_variance_between_ghosts_counts():
    x = np.array([[0.0], [10.0], [2.0], [12.0]], "float32")
    layer = normalization(2, momentum=0.0)
    layer(x, training=True)
    found = weights_by_name(layer)
    # Each ghost has variance 1, their means lie 10 apart.
    assert (found["moving_mean"], found["moving_variance"]) == (6.0, 26.0)


@every_shape
def test_ghosts_are_exact_far_from_zero(shape, run):
    x, dy = draw((13, *shape), 0, 3e4, 3), draw((13, *shape), 1, 0, 1)
    layer = built(normalization(4), x.shape)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    assert_agrees(run(layer, x, dy, training=True), wanted, dy)


@pytest.mark.filterwarnings(ONE_ELEMENT)
def test_ghosts_of_one_sample_without_space_give_beta(run):
    layer = built(normalization(1))
    y = run(layer, draw(TABLE), training=True).y
    assert_close(y, np.broadcast_to(weights_by_name(layer)["beta"], TABLE))


def test_ghosts_of_one_sample_warn_once():
    layer = normalization(1)
    with pytest.warns(UserWarning, match="trains on one element per channel"):
        layer(draw(TABLE), training=True)


@every_shape
def test_ghosts_of_one_sample_are_instance_normalization(shape, run):
    if len(shape) == 1:
        shape = (1, *shape)
    x = draw((4, 3, *shape))
    ghosts, instance = normalization(1), keras_bn.GroupNormalization(-1, epsilon=1.0)
    _ = [layer.build(x.shape) for layer in (ghosts, instance)]
    assert_close(run(ghosts, x, training=True).y, run(instance, x).y)


def test_one_ghost_is_the_whole_batch(run):
    whole, ghost = (built(normalization(size), IMAGE) for size in (None, 3))
    x, dy = draw(IMAGE), draw(IMAGE, 1, 0, 1)
    found, wanted = (run(layer, x, dy, training=True) for layer in (ghost, whole))
    assert np.array_equal(found.y, wanted.y)
    assert np.array_equal(found.dx, wanted.dx)


@pytest.mark.parametrize("case", named("ghost", "ghost-rank-2"), ids=lambda case: case.name)
def test_inference_knows_no_ghosts(case, run):
    ghosts, whole = case.built(), built(keras_bn.BatchNormalization(), case.shape)
    # Keras 2 failed where the batch was not a multiple.
    x = draw((5, *case.shape[1:]))
    assert np.array_equal(run(ghosts, x).y, run(whole, x).y)


# Modes, unknown sizes, models.


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize(
    "case",
    named(
        "ghost", "ghost-two-axes", "ghost-rank-2", "ghost-rank-2-uneven", "ghost-renormalization"
    ),
    ids=lambda case: case.name,
)
def test_every_mode_gives_the_formula(case, how, run):
    layer, x, dy = case.built(), case.x(), draw(case.shape, 1, 0, 1)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    assert_agrees(run(layer, x, dy, how, training=True), wanted, dy)


@pytest.mark.parametrize("samples", [0, 1, 4, 7, 8, 9])
@every_shape
@pytest.mark.filterwarnings(ONE_ELEMENT)
def test_model_takes_batches_of_any_size(samples, shape):
    model = keras.Sequential([keras.Input(shape), normalization(4)])
    layer = trained(model.layers[0])
    x = draw((samples, *shape))
    wanted = expected(layer, weights_by_name(layer), x, x, training=True)
    assert_close(ops.convert_to_numpy(model(x, training=True)), wanted.y)


# torch.compile takes long: the modes above are enough.
COMPILED = {"default": {}} if BACKEND == "torch" else {"default": {}, "jit": {"jit_compile": True}}


@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("shape", [(CHANNELS,), (2, 3, CHANNELS)], ids=["table", "image"])
def test_compiled_fit_trains_on_ghosts(shape, compiled):
    # The last batch is smaller, and in TensorFlow the size of none is known when it is traced.
    model = keras.Sequential([keras.Input(shape), normalization(4, momentum=None)])
    model.compile(keras.optimizers.SGD(0.0), "mse", **compiled)
    x = draw((21, *shape))
    zeros = np.zeros_like(x)
    loss = model.fit(x, zeros, batch_size=8, shuffle=False, verbose=0).history["loss"][0]
    axes = tuple(range(x.ndim - 1))
    ghosts = [part[i::2] for part in (x[:8], x[8:16], x[16:]) for i in range(2)]
    squares = [np.square(reference.normalize(g, axes, epsilon=1.0)).sum() for g in ghosts]
    # A mean of squares, of which each is off by twice the error of y.
    assert loss == pytest.approx(sum(squares) / x.size, rel=1e-5)
    whole = x.astype("float64").reshape(-1, CHANNELS)
    assert_close(weights_by_name(model.layers[0])["moving_variance"], whole.var(0))


# Only TensorFlow traces sizes that are unknown.
UNKNOWN = ["graph", "compiled"] if BACKEND == "tensorflow" else ["eager"]


@pytest.mark.parametrize("how", UNKNOWN)
@every_shape
def test_unknown_batch_size_changes_nothing(shape, how):
    layer = built(normalization(4), (None, *shape))
    call = _traced(layer, (None, *shape), how)
    for samples in (13, 8, 3):
        weights, x = weights_by_name(layer), draw((samples, *shape))
        wanted = expected(layer, weights, x, x, training=True)
        assert_close(ops.convert_to_numpy(call(x)), wanted.y)
        found = weights_by_name(layer)["moving_variance"]
        assert_close(found, wanted.state["moving_variance"])


def _traced(layer, shape, how):
    """Return a training call, in TensorFlow one that is traced once for all sizes."""

    def call(x):
        return layer(x, training=True)

    if BACKEND != "tensorflow":
        return call
    import tensorflow as tf

    return tf.function(call, [tf.TensorSpec(shape, "float32")], jit_compile=how == "compiled")


# Masks.


@every_shape
@some_batches
@pytest.mark.filterwarnings(ONE_ELEMENT)
def test_ghosts_count_by_the_mask(samples, size, number, shape, run):
    x, dy = draw((samples, *shape)), draw((samples, *shape), 1, 0, 1)
    layer = built(normalization(size), x.shape)
    mask = np.random.default_rng(0).random(x.shape[:-1]) < 0.7
    mask[:1] = True
    full = mask[..., None]
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True, mask=full)
    assert_agrees(run(layer, x, dy, training=True, mask=mask), wanted, dy)


@every_shape
def test_ghost_that_is_masked_out_is_normalized_as_in_inference(shape, run):
    x = draw((9, *shape))
    layer = built(normalization(4), x.shape)
    inference = run(layer, x).y
    mask = np.ones(x.shape[:-1], bool)
    mask[1::3] = False
    found = run(layer, x, x, training=True, mask=mask)
    assert_close(found.y[1::3], inference[1::3])
    assert np.isfinite(found.dx).all()


@pytest.mark.parametrize("how", [*MODES, "traced"] if BACKEND == "torch" else MODES)
def test_gradients_of_a_masked_out_ghost_are_by_the_statistics_before_the_step(how, run):
    # Compiled code may read them in the backward pass, when they have moved.
    x, dy = draw((64, CHANNELS)), draw((64, CHANNELS), 1, 0, 1)
    layer, mask = built(normalization(2, momentum=0.5), x.shape), np.arange(64) % 8 > 2
    arguments = {"training": True, "mask": mask[:, None]}
    wanted = expected(layer, weights_by_name(layer), x, dy, **arguments)
    assert_agrees(run(layer, x, dy, how, **arguments | {"mask": mask}), wanted, dy)


@every_shape
def test_masked_out_ghost_leaves_the_statistics_to_the_others(shape, run):
    x = draw((9, *shape))
    layer = built(normalization(4, momentum=0.0), x.shape)
    mask = np.ones(x.shape[:-1], bool)
    mask[1::3] = False
    found, rest = run(layer, x, training=True, mask=mask).state, x[mask].astype("float64")
    assert_close(found["moving_mean"], rest.mean(0))
    assert_close(found["moving_variance"], rest.var(0))


@every_shape
def test_nan_under_a_mask_reaches_no_ghost(shape, run):
    x, mask = draw((9, *shape)), np.ones((9, *shape[:-1]), bool)
    mask[4] = False
    layer, other = (built(normalization(4), x.shape) for _ in range(2))
    wanted = run(layer, x, x * mask[..., None], training=True, mask=mask)
    bad = np.where(mask[..., None], x, np.nan).astype("float32")
    found = run(other, bad, x * mask[..., None], training=True, mask=mask)
    assert np.array_equal(found.dx, wanted.dx)
    assert np.array_equal(found.y[mask], wanted.y[mask])


@every_shape
def test_bad_sample_shows_in_its_ghost_alone(shape, run):
    x = draw((9, *shape))
    layer = built(normalization(4), x.shape)
    before = weights_by_name(layer)["moving_mean"]
    x[(4, *(0 for _ in shape))] = np.nan
    found = run(layer, x, training=True)
    bad = np.isnan(found.y)
    assert bad[1::3, ..., 0].all()
    assert bad.sum() == bad[1::3, ..., 0].size
    assert (found.state["moving_mean"] != before).tolist() == [False] + [True] * (CHANNELS - 1)


# Passes may take ghosts of eight samples in strips; sample 3 is the first of its ghost.
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_bad_first_sample_of_eight_shows_in_its_ghost_alone(value):
    x = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")
    x[3, 5] = value
    layer = keras_bn.BatchNormalization(virtual_batch_size=8)
    y = keras.ops.convert_to_numpy(layer(x, training=True))
    bad = np.zeros(x.shape, bool)
    bad[3::8, 5] = True
    assert np.array_equal(np.isnan(y), bad)
    is_kept = keras.ops.convert_to_numpy(layer.moving_variance) == 1
    assert np.flatnonzero(is_kept).tolist() == [5]


def test_empty_batch_changes_nothing():
    layer = built(normalization(4))
    before = layer.get_weights()
    y = layer(np.zeros((0, CHANNELS), "float32"), training=True)
    assert tuple(y.shape) == (0, CHANNELS)
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))


# Together with renormalization.

WARM = {"rmax_steps": None, "dmax_steps": None}
ONE = {"epsilon": 1.0}  # as in `normalization`
RENORM = {
    "keras": (
        keras_bn.BatchNormalization,
        {"renorm": True, "renorm_clipping": {"rmax": 1.2}, **ONE},
    ),
    "paper": (keras_bn.BatchRenormalization, {"rmax": 1.2, "dmax": 0.5, **WARM, **ONE}),
}
every_renorm = pytest.mark.parametrize(("layer", "options"), RENORM.values(), ids=RENORM)


@every_renorm
@every_shape
def test_each_ghost_is_corrected_by_its_own_r_and_d(layer, options, shape, run):
    x, dy = draw((9, *shape)), draw((9, *shape), 1, 0, 1)
    norm, alone = layer(virtual_batch_size=4, **options), layer(**options)
    weights = weights_by_name(built(norm, x.shape))
    found = run(norm, x, dy, training=True)
    for ghost in (np.s_[i::3] for i in range(3)):
        wanted = expected(alone, weights, x[ghost], dy[ghost], training=True)
        assert_close(found.y[ghost], wanted.y)
        assert_close(found.dx[ghost], wanted.dx)


@every_renorm
def test_full_correction_makes_ghosts_one(layer, options, run):
    free = {"renorm": True} if "renorm" in options else {"rmax": 1e6, "dmax": 1e6, **WARM}

    x = draw((9, 5, CHANNELS))
    ghosts, whole = (built(layer(virtual_batch_size=n, **free, **ONE), x.shape) for n in (4, None))
    assert_close(run(ghosts, x, training=True).y, run(whole, x, training=True).y)


# Options.


def test_config_of_keras_2_splits_the_batch_as_keras_2_did(run):
    layer = keras_bn.BatchNormalization.from_config({"axis": [1], "virtual_batch_size": 4})
    layer.build(TABLE)
    x = draw(TABLE)
    # Keras 2: reshape to (virtual_batch_size, -1, ...), moments over the first axis.
    split = x.reshape(4, 2, CHANNELS)
    wanted = reference.normalize(split, (0,)).reshape(TABLE)
    assert_close(run(layer, x, training=True).y, wanted)


def test_keras_file_holds_the_size(tmp_path):
    model = keras.Sequential([keras.Input((CHANNELS,)), normalization(4)])
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.layers[0].virtual_batch_size == 4
