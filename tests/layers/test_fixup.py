"""Fixup: its scalars, its initializer, and branches that start as the identity."""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_bn
from tests.cases import HALF, SEQUENCE, TABLE, U, assert_agrees, assert_close, draw, named, trained
from tests.oracle import expected, weights_by_name

BACKEND = keras.backend.backend()
MODES = ["eager", "graph", "compiled"] if BACKEND == "tensorflow" else ["eager", "compiled"]
every_mode = pytest.mark.parametrize("how", MODES)
every_scalar = pytest.mark.parametrize(
    "case", named("fixup-bias", "fixup-scale"), ids=lambda case: case.name
)
# 16 channels: with fewer, the backward pass of a strided 1x1 convolution writes past its memory in
# PyTorch (torch 2.13, CPU; https://github.com/uxlfoundation/oneDNN/issues/6035).
PIXELS = (2, 6, 6, 16)


def conv(filters=16, **options):
    return layers.Conv2D(filters, 3, padding="same", use_bias=False, **options)


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


# The scalars.


@every_scalar
@every_mode
def test_every_mode_gives_the_formula(case, how, run):
    layer, x, dy = case.built(), case.x(), draw(case.shape, 1, 0, 1)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    assert_agrees(run(layer, x, dy, how), wanted, dy)


@every_scalar
@pytest.mark.parametrize("policy", HALF)
def test_half_precision_rounds_once(case, policy, run):
    layer, x = case.built(dtype=policy), case.x()
    dy = ops.cast(draw(case.shape, 1, 0, 1), layer.compute_dtype)
    exact = numpy(ops.cast(dy, "float32"))
    wanted = expected(layer, weights_by_name(layer), x, exact, training=True)
    found = run(layer, x, dy)
    assert (layer.weights[0].dtype, len(layer.weights)) == (layer.variable_dtype, 1)
    assert keras.backend.standardize_dtype(layer(x).dtype) == layer.compute_dtype
    assert_agrees(found, wanted, exact, layer.compute_dtype)


@every_scalar
@pytest.mark.usefixtures("x64")
def test_float64_policy_is_float64_throughout(case, run):
    layer = case.built(dtype="float64")
    x, dy = (draw(case.shape, seed).astype("float64") * np.pi for seed in (0, 1))
    found = run(layer, x, dy)
    assert (found.y.dtype, found.dx.dtype) == ("float64", "float64")
    assert_agrees(
        found, expected(layer, weights_by_name(layer), x, dy, training=True), dy, "float64"
    )


@every_scalar
@every_mode
@pytest.mark.parametrize("shape", [(2**19, 1), (2**13, 64)], ids=str)
def test_gradient_of_half_a_million_elements_costs_no_digits(case, how, shape, run):
    layer, x, dy = case.make(), draw(shape), draw(shape, 1, 1.0, 0.1)
    layer.build(shape)
    (gradient,) = run(layer, x, dy, how).gradients.values()
    terms = dy.astype("float64") * (x if "gamma" in layer.weights[0].name else 1)
    assert abs(gradient - terms.sum()) < 8 * U["float32"] * np.abs(terms).sum()


@every_scalar
@pytest.mark.parametrize("shape", [(4,), (0, 6), PIXELS, (2, 1, 3, 1, 2)], ids=str)
def test_any_rank_will_do(case, shape, run):
    layer = case.built(shape)
    x = draw(shape)
    wanted = expected(layer, weights_by_name(layer), x, x, training=True)
    assert_close(run(layer, x, x).y, wanted.y)


@every_scalar
def test_integers_are_taken(case, run):
    layer, x = case.built(), np.arange(24, dtype="int32").reshape(4, 6)
    wanted = expected(layer, weights_by_name(layer), x, x, training=True)
    assert_close(run(layer, x).y, wanted.y)


class Probe(layers.Layer):
    """Keeps the mask that reaches it."""

    def call(self, x, mask=None):
        self.mask = mask
        return x

    def compute_mask(self, x, mask=None):
        return mask


def mask_behind(*before):
    """Return the mask that goes in, and the one that comes out."""
    x, probe = draw(SEQUENCE), Probe()
    x[1, 2:] = 0
    keras.Sequential([layers.Masking(), *before, probe])(x)
    return (x != 0).any(-1), None if probe.mask is None else numpy(probe.mask)


def test_mask_passes_through_scalars():
    wanted, found = mask_behind(keras_bn.FixupBias(), keras_bn.FixupScale())
    assert np.array_equal(found, wanted)


# The initializer.

# He's variance is 2 / fan_in; Fixup's is that times depth^(-1 / (branch_layers - 1)).
DRAWS = {
    "dense": ((64, 1024), 1, 2, 2 / 64),
    "deep": ((64, 1024), 16, 2, 2 / 64 / 16),
    "three-layers": ((64, 1024), 16, 3, 2 / 64 / 4),
    "five-layers": ((64, 1024), 81, 5, 2 / 64 / 3),
    "convolution": ((3, 3, 32, 256), 54, 2, 2 / (9 * 32) / 54),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "depth", "count", "variance"), DRAWS.values(), ids=DRAWS)
def test_variance_is_hes_by_depth(shape, depth, count, variance, dtype):
    kernel = keras_bn.FixupInitializer(depth, count)(shape, dtype=dtype)
    values = numpy(ops.cast(kernel, "float32")).astype("float64")
    # Standard errors: of the mean √(variance / n), of the variance at most √(2 / n) of it (the
    # truncated normal's fourth moment is below the normal's); a rounded value is off by u at most.
    n, u = values.size, U[dtype]
    assert keras.backend.standardize_dtype(kernel.dtype) == dtype
    assert abs(values.mean()) < 5 * np.sqrt(variance / n)
    assert abs((values**2).mean() / variance - 1) < 5 * np.sqrt(2 / n) + 3 * u


@pytest.mark.usefixtures("x64")
def test_initializer_draws_float64():
    values = numpy(keras_bn.FixupInitializer(4, 2)((64, 64), dtype="float64"))
    assert values.dtype == "float64"
    assert (values != values.astype("float32")).any()


def test_seed_decides_what_is_drawn():
    first, same, other = (
        numpy(keras_bn.FixupInitializer(4, 2, seed)((8, 8))) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_initializers_without_a_seed_differ():
    first, other = (numpy(keras_bn.FixupInitializer(4, 2)((8, 8))) for _ in range(2))
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("seed", [None, 7], ids=["none", "seven"])
def test_initializer_survives_json(seed):
    config = keras.initializers.serialize(keras_bn.FixupInitializer(54, 3, seed))
    again = keras.initializers.get(json.loads(json.dumps(config)))
    assert config["config"] == {"depth": 54, "branch_layers": 3, "seed": seed}
    assert (type(again), again.get_config()) == (keras_bn.FixupInitializer, config["config"])


# The branch.


def names_of(branch):
    return [type(layer).__name__.removeprefix("Fixup") for layer in branch.branch]


LAYERS = {
    "one-kernel": ([conv()], "Bias Conv2D Scale Bias"),
    "two-kernels": (
        [conv(5), layers.ReLU(), conv()],
        "Bias Conv2D Bias ReLU Bias Conv2D Scale Bias",
    ),
    "activation-within": (
        [conv(5, activation="relu"), conv()],
        "Bias Conv2D Bias Activation Bias Conv2D Scale Bias",
    ),
    "pre-activation": (
        [layers.LeakyReLU(), layers.Dense(16)],
        "Bias LeakyReLU Bias Dense Scale Bias",
    ),
    "others": (
        [layers.ZeroPadding2D(), layers.Conv2D(16, 3), layers.Dropout(0.1)],
        "Bias ZeroPadding2D Bias Conv2D Dropout Scale Bias",
    ),
}
every_branch = pytest.mark.parametrize(
    "parts", [parts for parts, _ in LAYERS.values()], ids=list(LAYERS)
)


@pytest.mark.parametrize(("parts", "names"), LAYERS.values(), ids=LAYERS)
def test_bias_stands_before_each_kernel_and_activation(parts, names):
    assert names_of(keras_bn.FixupBranch(parts, 4)) == names.split()


@every_branch
@pytest.mark.parametrize("depth", [1, 54])
def test_network_starts_as_the_identity(parts, depth):
    x = draw(PIXELS)
    network = keras.Sequential([keras_bn.FixupBranch(parts, depth) for _ in range(3)])
    assert np.array_equal(numpy(network(x, training=True)), x)


def test_last_kernel_and_bias_start_at_zero_whatever_was_asked():
    last = layers.Dense(16, kernel_initializer="ones", bias_initializer="ones")
    branch = keras_bn.FixupBranch([layers.Dense(16), last], 4)
    branch.build(PIXELS)
    assert all((w == 0).all() for w in branch.layers[-1].get_weights())


@pytest.mark.parametrize(("count", "variance"), [(2, 1 / 16), (3, 1 / 4)])
def test_other_kernels_are_drawn_by_the_initializer(count, variance):
    branch = keras_bn.FixupBranch([layers.Dense(256)] * count, 16)
    branch.build((None, 256))
    *drawn, last = (layer.get_weights()[0] for layer in branch.layers)
    # As for the initializer: five standard errors of a variance.
    error = 5 * np.sqrt(2 / 256**2)
    assert [(w**2).mean() * 256 / 2 for w in drawn] == pytest.approx(
        [variance] * (count - 1), error
    )
    assert (len({w.sum() for w in drawn}), np.abs(last).max()) == (count - 1, 0)


def test_list_of_layers_serves_again():
    parts = [layers.Dense(5, activation="relu"), layers.Dense(6)]
    one, other = (keras_bn.FixupBranch(parts, 4) for _ in range(2))
    _ = [branch.build(TABLE) for branch in (one, other)]
    assert not {id(v) for v in one.weights} & {id(v) for v in other.weights}
    assert not any(part.built for part in parts)


def test_built_layer_is_refused():
    dense = layers.Dense(6)
    dense.build(TABLE)
    text = (
        r"^FixupBranch: `layers` must be layers that are not built. Received: layers=\['Dense'\]. "
        "The branch initializes new weights.$"
    )
    with pytest.raises(ValueError, match=text):
        keras_bn.FixupBranch([dense], 4)


def branch_of_two(**options):
    """Return a branch of two dense layers, all of whose weights are drawn."""
    parts = [layers.Dense(5, activation="relu"), layers.Dense(6, use_bias=False)]
    branch = keras_bn.FixupBranch(parts, 4, **options)
    branch.build(TABLE)
    return trained(branch)


def scalars(branch):
    return [part for part in branch.branch if isinstance(part, keras_bn.layers.fixup.Scalar)]


def formula(branch, x, dy):
    """Return y, dx, and for each scalar the terms whose sum is its gradient, in float64."""
    w1, b1, w2 = (w.astype("float64") for part in branch.layers for w in part.get_weights())
    beta_1, beta_2, beta_3, gamma, beta = (
        part.get_weights()[0].astype("float64") for part in scalars(branch)
    )
    hidden = (x + beta_1) @ w1 + b1 + beta_2
    last = (np.maximum(hidden, 0) + beta_3) @ w2
    d_inner = gamma * dy @ w2.T
    d_hidden = d_inner * (hidden > 0)
    d_first = d_hidden @ w1.T
    return x + gamma * last + beta, dy + d_first, [d_first, d_hidden, d_inner, dy * last, dy]


def test_branch_gives_the_formula(run):
    branch, x, dy = branch_of_two(), draw(TABLE), draw(TABLE, 1, 0, 1)
    y, dx, _ = formula(branch, x.astype("float64"), dy.astype("float64"))
    found = run(branch, x, dy)
    assert_close(found.y, y)
    assert_close(found.dx, dx)


@pytest.mark.parametrize("index", range(5), ids=["first", "relu", "second", "factor", "end"])
def test_gradient_of_each_scalar_is_the_sum_of_its_terms(index, run):
    branch, x, dy = branch_of_two(), draw(TABLE), draw(TABLE, 1, 0, 1)
    terms = formula(branch, x.astype("float64"), dy.astype("float64"))[2][index]
    for part in branch.branch:
        part.trainable = part is scalars(branch)[index]
    (gradient,) = run(branch, x, dy).gradients.values()
    assert_close(gradient, terms.sum(), np.abs(terms).sum())


def first_step(depth, width=32, rate=1e-3):
    """Return how far a step of SGD on the kernels moves the output of a deep network."""
    parts = [layers.Dense(width, "relu", use_bias=False), layers.Dense(width, use_bias=False)]
    network = keras.Sequential([keras_bn.FixupBranch(parts, depth) for _ in range(depth)])
    x, y = draw((16, width), 0, 0, 1), draw((16, width), 1, 0, 1)
    network(x)
    for branch in network.layers:
        for part in scalars(branch):
            part.trainable = False
    network.compile(keras.optimizers.SGD(rate), "mse", run_eagerly=BACKEND != "jax")
    network.train_on_batch(x, y)
    return np.linalg.norm(numpy(network(x)) - x)


def test_first_step_moves_the_output_as_far_at_any_depth():
    shallow, deep = first_step(2), first_step(32)
    # Both are a mean over branches of sums over 32 units, so within about 1 / √64 of another;
    # without the factor in the initializer the second would be 16 times the first.
    assert deep == pytest.approx(shallow, rel=3 / 8)


# Branches in models.


def strided(filters=5):
    parts = [conv(filters, strides=2, activation="relu"), conv(filters)]
    shortcut = layers.Conv2D(filters, 1, strides=2, use_bias=False)
    return keras_bn.FixupBranch(parts, 4, shortcut=shortcut)


def plain():
    return keras_bn.FixupBranch([conv(16, activation="relu"), layers.Dropout(0.5), conv(16)], 4)


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = plain(), strided()

    def call(self, x):
        return self.second(self.first(x))


def functional():
    inputs = keras.Input(PIXELS[1:])
    return keras.Model(inputs, strided()(plain()(inputs)))


MODELS = {
    "sequential": lambda: keras.Sequential([keras.Input(PIXELS[1:]), plain(), strided()]),
    "functional": functional,
    "subclassed": Subclassed,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def built(make):
    model = make()
    model(draw(PIXELS))
    return trained(model)


def test_shortcut_sees_the_first_bias(run):
    branch, x = strided(), draw(PIXELS)
    branch.build(PIXELS)
    scalars(branch)[0].beta.assign(0.5)
    # The branch itself is 0 at the start; every other pixel is left.
    wanted = (x[:, ::2, ::2] + 0.5) @ branch.shortcut.get_weights()[0][0, 0].astype("float64")
    assert_close(run(branch, x).y, wanted)


def test_strided_branch_knows_its_shape():
    unknown = strided()(keras.KerasTensor((None, None, 6, 3)))
    assert tuple(unknown.shape) == (None, None, 3, 5)
    assert strided().compute_output_shape((None, 6, 6, 3)) == (None, 3, 3, 5)


@every_model
def test_every_weight_moves_in_a_few_steps(make):
    model, x = make(), draw(PIXELS)
    model(x)
    before = [numpy(variable) for variable in model.trainable_variables]
    model.compile(keras.optimizers.SGD(0.01), "mse")
    # In the first step the last kernel leaves 0, in the second the kernels before it move too.
    model.fit(x, draw((2, 3, 3, 5)), batch_size=2, epochs=3, verbose=0)
    pairs = zip(before, model.trainable_variables, strict=True)
    assert [v.path for old, v in pairs if np.array_equal(old, numpy(v))] == []


@every_model
def test_weights_file_holds_the_weights(make, tmp_path):
    model, again = built(make), make()
    again(draw(PIXELS))
    model.save_weights(tmp_path / "m.weights.h5")
    again.load_weights(tmp_path / "m.weights.h5")
    assert np.array_equal(*(numpy(m(draw(PIXELS))) for m in (model, again)))


@pytest.mark.parametrize("name", ["sequential", "functional"])
def test_keras_file_holds_the_branches(name, tmp_path):
    model = built(MODELS[name])
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    configs = [[part.get_config() for part in m.layers[-2:]] for m in (model, again)]
    assert configs[0] == configs[1]
    assert np.array_equal(*(numpy(m(draw(PIXELS))) for m in (model, again)))


@pytest.mark.parametrize("name", ["sequential", "functional"])
def test_clone_has_its_own_weights(name):
    model = built(MODELS[name])
    clone = keras.models.clone_model(model)
    assert not {id(v) for v in clone.weights} & {id(v) for v in model.weights}
    clone.set_weights(model.get_weights())
    assert np.array_equal(*(numpy(m(draw(PIXELS))) for m in (model, clone)))


@pytest.mark.parametrize("make", [plain, strided])
def test_config_survives_json_and_building(make):
    branch = make()
    config = branch.get_config()
    branch.build(PIXELS)
    again = keras_bn.FixupBranch.from_config(json.loads(json.dumps(config)))
    assert (branch.get_config(), again.get_config()) == (config, config)
    assert names_of(again) == names_of(branch)


def test_dropout_in_a_branch_follows_training():
    branch, x = plain(), draw(PIXELS)
    branch.build(PIXELS)
    branch.layers[-1].set_weights([draw((3, 3, 16, 16))])
    still, again, drops = (numpy(branch(x, training=mode)) for mode in (False, False, True))
    assert np.array_equal(still, again)
    assert not np.array_equal(still, drops)


def test_mask_passes_through_a_branch():
    wanted, found = mask_behind(keras_bn.FixupBranch([layers.Dense(6)], 1))
    assert np.array_equal(found, wanted)


def test_mask_follows_the_shortcut():
    keeps = keras_bn.FixupBranch([layers.Dense(7)], 1, shortcut=layers.Dense(7))
    wanted, found = mask_behind(keeps)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("policy", HALF)
def test_branch_computes_in_the_policys_dtype(policy):
    keras.config.set_dtype_policy(policy)
    branch, x = branch_of_two(), draw(TABLE)
    wanted = formula(branch, x.astype("float64"), np.ones(TABLE))[0]
    y = branch(x)
    dtype = branch.compute_dtype
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    # Seven layers round in half precision, one after the other.
    found = numpy(ops.cast(y, "float32"))
    assert np.abs(found - wanted).max() < 7 * 4 * U[dtype] * np.abs(wanted).max()
