"""Batch renormalization: the warm-up, its step, and where its weights come from."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule, PiecewiseConstantDecay, PolynomialDecay

import keras_bn
from tests.cases import BY_NAME, TABLE, assert_close, draw, trained
from tests.oracle import weights_by_name

BACKEND = keras.backend.backend()
CHANNELS = TABLE[-1]
DATA = draw((24, CHANNELS)), np.zeros((24, 1), "float32")


def built(layer):
    layer.build(TABLE)
    return layer


def at_step(step, **options):
    layer = built(keras_bn.BatchRenormalization(**options))
    layer.step.assign(step)
    return layer


def model_of(layer, *more):
    return keras.Sequential([keras.Input((CHANNELS,)), layer, *more, keras.layers.Dense(1)])


def step_of(model):
    return int(weights_by_name(model.layers[0])["step"])


def fit(model, epochs=1, batch_size=8, **compiled):
    model.compile(keras.optimizers.SGD(0.01), "mse", **compiled)
    x, y = DATA
    return model.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)


# The schedule.

# rmax 3 rises from step 5000 to 40000, dmax 5 from 5000 to 25000, as in section 4 of the paper.
SCHEDULE = {
    0: (1, 0),
    5_000: (1, 0),
    15_000: (1 + 2 * 10 / 35, 2.5),
    22_500: (2, 5 * 17.5 / 20),
    25_000: (1 + 2 * 20 / 35, 5),
    40_000: (3, 5),
    1_000_000: (3, 5),
}


@pytest.mark.parametrize(("step", "limits"), SCHEDULE.items(), ids=[str(step) for step in SCHEDULE])
def test_default_limits_are_the_papers(step, limits):
    rmin, rmax, dmax = (float(ops.convert_to_numpy(v)) for v in at_step(step).limits())
    assert (rmax, dmax) == pytest.approx(limits, rel=4 * 2**-24)
    assert rmin == pytest.approx(1 / limits[0], rel=4 * 2**-24)


OPTIONS = {
    "none-is-constant": ({"rmax_steps": None, "dmax_steps": None}, (3, 5)),
    "no-length-is-a-jump-after": ({"rmax_steps": (10, 10), "dmax_steps": (9, 9)}, (1, 5)),
    "other-ends": ({"rmax": 2, "dmax": 1, "rmax_steps": (0, 20), "dmax_steps": (0, 10)}, (1.5, 1)),
    "rmax-one": ({"rmax": 1, "dmax": 0, "rmax_steps": None, "dmax_steps": None}, (1, 0)),
}


@pytest.mark.parametrize(("options", "limits"), OPTIONS.values(), ids=OPTIONS)
def test_options_shape_the_ramp(options, limits):
    _, rmax, dmax = (float(ops.convert_to_numpy(v)) for v in at_step(10, **options).limits())
    assert (rmax, dmax) == pytest.approx(limits, rel=4 * 2**-24)


def test_correction_stays_within_its_limits(run):
    layer = at_step(0, rmax=1.5, dmax=0.25, rmax_steps=None, dmax_steps=None, epsilon=0.0)
    # Standard deviation 2 and mean 1, where 1 and 0 are kept: r is cut at 1.5, d at 0.25.
    x = np.array([[-1.0], [3.0]], "float32") * np.ones((1, CHANNELS), "float32")
    assert_close(run(layer, x, training=True).y, np.sign(x) * 1.5 + 0.25)


# The step.


def test_step_counts_training_calls_only():
    layer = built(keras_bn.BatchRenormalization())
    x = draw(TABLE)
    layer(x, training=True)
    layer(x, training=False)
    layer(x)
    layer(x, training=True)
    assert int(weights_by_name(layer)["step"]) == 2


def test_frozen_layer_does_not_count():
    layer = built(keras_bn.BatchRenormalization(trainable=False))
    layer(draw(TABLE), training=True)
    assert int(weights_by_name(layer)["step"]) == 0


def test_step_is_an_integer_under_every_policy():
    layer = built(keras_bn.BatchRenormalization(dtype="bfloat16"))
    # A float would stop at 2^24 steps, a bfloat16 at 256.
    layer.step.assign(2**24)
    layer(draw(TABLE), training=True)
    assert int(ops.convert_to_numpy(layer.step)) == 2**24 + 1


@pytest.mark.parametrize("suffix", ["m.keras", "m.weights.h5"])
def test_files_hold_the_step(suffix, tmp_path):
    model = model_of(keras_bn.BatchRenormalization())
    fit(model)
    if suffix == "m.keras":
        model.save(tmp_path / suffix)
        again = keras.saving.load_model(tmp_path / suffix)
    else:
        model.save_weights(tmp_path / suffix)
        again = model_of(keras_bn.BatchRenormalization())
        again.load_weights(tmp_path / suffix)
    assert step_of(again) == step_of(model) == 3


def test_several_fits_go_on_where_the_last_ended(tmp_path):
    model = model_of(keras_bn.BatchRenormalization())
    fit(model)
    fit(model, epochs=2)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    fit(again)
    assert (step_of(model), step_of(again)) == (9, 12)


class Limits(keras.callbacks.Callback):
    """Notes r_max after each batch, as the layer itself would use it next."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        self.seen.append(float(ops.convert_to_numpy(self.model.layers[0].limits().rmax)))


RAMP = {"rmax": 4.0, "rmax_steps": (1, 4), "dmax": 5.0, "dmax_steps": (1, 4)}
COMPILED = {"default": {}, "jit": {"jit_compile": True}}
# torch.compile takes long: one of its tests is enough.
FEW = {"default": {}} if BACKEND == "torch" else COMPILED


@pytest.mark.parametrize("compiled", FEW.values(), ids=FEW)
def test_limits_move_during_one_fit(compiled):
    model, limits = model_of(keras_bn.BatchRenormalization(**RAMP)), Limits()
    model.compile(keras.optimizers.SGD(0.01), "mse", **compiled)
    model.fit(*DATA, batch_size=4, shuffle=False, verbose=0, callbacks=[limits])
    assert limits.seen == pytest.approx([1, 2, 3, 4, 4, 4])


class Spread(keras.layers.Layer):
    """Passes its input on, and adds its mean over batch and channels to a weight."""

    def build(self, shape):
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False, name="seen")

    def call(self, x, training=None):
        if training:
            self.seen.assign_add(ops.mean(x))
        return x


@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
def test_moving_limits_reach_the_output_of_a_compiled_fit(compiled):
    options = {"rmax": 1.0, "dmax": 6.0, "rmax_steps": None, "dmax_steps": (0, 3), "momentum": 1.0}
    probe = Spread()
    model = model_of(keras_bn.BatchRenormalization(epsilon=0.0, center=False, **options), probe)
    model.compile(keras.optimizers.SGD(0.0), "mse", **compiled)
    # The kept mean stays 0 and the kept deviation 1, each batch's mean is 9: d is d_max.
    x = np.tile(np.array([[8.0], [10.0]], "float32"), (8, CHANNELS))
    model.fit(x, np.zeros((16, 1)), batch_size=4, shuffle=False, verbose=0)
    # d_max is 0, 2, 4, 6 in the four steps; a frozen schedule would give 0.
    assert float(ops.convert_to_numpy(probe.seen)) == pytest.approx(12)


# Weights of a plain batch normalization.

PLAIN = {"keras_bn": keras_bn.BatchNormalization, "keras": keras.layers.BatchNormalization}
every_plain = pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN)


@every_plain
def test_plain_weights_load_with_step_zero(plain):
    source, layer = trained(built(plain())), at_step(77)
    layer.set_weights(source.get_weights())
    assert int(weights_by_name(layer)["step"]) == 0
    assert_close(*(ops.convert_to_numpy(norm(draw(TABLE))) for norm in (layer, source)))


class Block(keras.layers.Layer):
    """Holds the layer as an attribute: its path in a file is the attribute's name."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def call(self, x, training=None):
        return self.norm(x, training=training)


@every_plain
def test_plain_weights_file_loads_with_step_zero(plain, tmp_path):
    source, model = (model_of(Block(n)) for n in (plain(), keras_bn.BatchRenormalization()))
    norm = model.layers[0].norm
    norm.step.assign(77)
    trained(source.layers[0].norm)
    source.save_weights(tmp_path / "m.weights.h5")
    model.load_weights(tmp_path / "m.weights.h5")
    assert int(weights_by_name(norm)["step"]) == 0
    assert_close(*(ops.convert_to_numpy(m(draw(TABLE))) for m in (model, source)))


@every_plain
def test_plain_weights_file_is_refused_where_paths_are_class_names(plain, tmp_path):
    # Keras 3.15 files the layers of a Sequential or functional model under their class' name.
    source, model = model_of(plain()), model_of(keras_bn.BatchRenormalization())
    source.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match="expected 5 variables, but received 0"):
        model.load_weights(tmp_path / "m.weights.h5")


BARE = {"no-scale": {"scale": False}, "neither": {"scale": False, "center": False}}


@every_plain
@pytest.mark.parametrize("options", BARE.values(), ids=BARE)
def test_plain_weights_load_without_gamma_or_beta(plain, options):
    layer = at_step(77, **options)
    layer.set_weights(trained(built(plain(**options))).get_weights())
    assert int(weights_by_name(layer)["step"]) == 0


def test_a_wrong_number_of_weights_is_still_refused():
    layer = at_step(77)
    with pytest.raises(ValueError, match="weight list of length 3"):
        layer.set_weights(layer.get_weights()[:3])
    assert int(weights_by_name(layer)["step"]) == 77


def test_training_goes_on_from_plain_weights():
    model = model_of(keras_bn.BatchRenormalization())
    plain = model_of(keras_bn.BatchNormalization())
    fit(plain)
    model.set_weights([*plain.layers[0].get_weights(), np.int32(0), *plain.layers[1].get_weights()])
    assert np.isfinite(fit(model).history["loss"]).all()
    assert step_of(model) == 3


# Gradients.


@pytest.mark.parametrize("case", ["renormalization", "renorm-clipped"])
def test_correction_carries_no_gradient(case, run):
    layer = BY_NAME[case].built(epsilon=0.0, scale=False, center=False)
    x, dy = BY_NAME[case].x(), np.ones(BY_NAME[case].shape, "float32")
    # Σ y = Σ (z·r + d) = n·d. If d were not a constant, dx would be 1/σ; so it is 0.
    found = run(layer, x, dy, training=True)
    # dx = (g - Σg/n - ...) / s with g = r·dy: the rounding of a few terms of size r / s.
    assert np.abs(found.dx).max() < 16 * 2**-24 * 2 / x.std((0, 1, 2)).min()


# Schedules as limits of Keras' renorm.

CLIPPING = {
    "rmax": PiecewiseConstantDecay([0, 1], [1.0, 2.0, 3.0]),
    "rmin": 0.5,
    "dmax": PolynomialDecay(0.0, 4, 2.0),
}


def renorm_layer(**options):
    return keras_bn.BatchNormalization(renorm=True, renorm_clipping=CLIPPING, **options)


def test_schedules_count_the_steps_of_the_layer():
    layer = built(renorm_layer())
    layer(draw(TABLE), training=True)
    layer(draw(TABLE))
    assert [v.name for v in layer.weights][-1] == "step"
    assert (len(layer.weights), int(weights_by_name(layer)["step"])) == (8, 1)


@pytest.mark.parametrize("compiled", FEW.values(), ids=FEW)
def test_schedules_move_during_one_fit(compiled):
    clipping = {"rmin": 1.0, "rmax": 1.0, "dmax": PolynomialDecay(0.0, 3, 6.0)}
    probe = Spread()
    layer = keras_bn.BatchNormalization(
        renorm=True, renorm_clipping=clipping, renorm_momentum=1.0, epsilon=0.0, center=False
    )
    model = model_of(layer, probe)
    model.compile(keras.optimizers.SGD(0.0), "mse", **compiled)
    x = np.tile(np.array([[8.0], [10.0]], "float32"), (8, CHANNELS))
    model.fit(x, np.zeros((16, 1)), batch_size=4, shuffle=False, verbose=0)
    # d is d_max: 0, 2, 4, 6.
    assert float(ops.convert_to_numpy(probe.seen)) == pytest.approx(12)


def test_schedules_survive_a_config_round_trip():
    config = renorm_layer(name="n").get_config()
    again = keras_bn.BatchNormalization.from_config(config)
    assert isinstance(again.renorm_clipping["rmax"], LearningRateSchedule)
    assert again.renorm_clipping["rmin"] == 0.5
    assert again.get_config() == config


def test_schedules_survive_a_keras_file(tmp_path):
    model = model_of(renorm_layer())
    fit(model)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.layers[0].get_config() == model.layers[0].get_config()
    assert step_of(again) == 3


def test_constant_schedule_is_the_constant(run):
    constant = {"rmin": 0.8, "rmax": 1.2, "dmax": 0.3}
    schedules = {key: PolynomialDecay(value, 1, value) for key, value in constant.items()}
    layer, scheduled = (
        trained(built(keras_bn.BatchNormalization(renorm=True, renorm_clipping=clipping)))
        for clipping in (constant, schedules)
    )
    x, dy = draw(TABLE), draw(TABLE, 1)
    wanted, found = (run(norm, x, dy, training=True) for norm in (layer, scheduled))
    assert_close(found.y, wanted.y)
    assert_close(found.dx, wanted.dx)
    assert_close(found.state["moving_variance"], wanted.state["moving_variance"])
