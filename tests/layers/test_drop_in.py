"""Side by side with `keras.layers` of the installed Keras: the same, or a difference with a name.

Every row of `tests/cases.py` that Keras can express runs in both libraries. Where a situation and
a row are listed in `DIFFERENCES`, Keras must be wrong and ours right; everywhere else both agree.
"""

import inspect
import json
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import keras_bn
from tests.cases import (
    BY_NAME,
    CASES,
    FILED,
    MASKS,
    Case,
    assert_agrees,
    assert_close,
    draw,
    trained,
)
from tests.oracle import expected, weights_by_name

BACKEND = keras.backend.backend()
BOTH = [
    keras_bn.BatchNormalization,
    keras_bn.GroupNormalization,
    keras_bn.LayerNormalization,
    keras_bn.RMSNormalization,
]
each_layer = pytest.mark.parametrize("layer", BOTH, ids=lambda layer: layer.__name__)


def stock_of(layer):
    return getattr(keras.layers, layer.__name__)


# What Keras accepts of the table: it keeps one axis (normalizes the last ones, in the layers that
# pool features), and synchronizes in TensorFlow only.
FEATURES = (keras_bn.LayerNormalization, keras_bn.RMSNormalization)
SHARED = [
    case
    for case in CASES
    if case.stock is not None
    and not isinstance(case.options.get("axis"), tuple)
    and not (case.layer in FEATURES and "axis" in case.options)
    and (BACKEND == "tensorflow" or not case.options.get("synchronized"))
]
every_case = pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
every_filed = pytest.mark.parametrize(
    "case", [case for case in SHARED if case in FILED], ids=lambda case: case.name
)


# Signature, config, weights.


def options_of(layer):
    """Return the names and defaults of the arguments that have a position."""
    parameters = inspect.signature(layer).parameters.values()
    positional = [p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    return [(p.name, p.default) for p in positional]


@each_layer
def test_positional_arguments_are_keras(layer):
    wanted = options_of(stock_of(layer))
    # A Keras before 3.15 lacks `renorm` and its kin.
    known = [name for name, _ in wanted]
    assert [item for item in options_of(layer) if item[0] in known] == wanted


@each_layer
def test_what_is_more_than_keras_is_keyword_only(layer):
    newer = {"renorm", "renorm_clipping", "renorm_momentum"}
    more = dict(options_of(layer)).keys() - dict(options_of(stock_of(layer))).keys()
    assert more <= newer


@each_layer
def test_call_takes_the_arguments_of_keras(layer):
    wanted = list(inspect.signature(stock_of(layer).call).parameters.values())
    found = list(inspect.signature(layer.call).parameters.values())
    assert [(p.name, p.default) for p in found[: len(wanted)]] == [
        (p.name, p.default) for p in wanted
    ]


def test_options_work_by_position():
    assert keras_bn.GroupNormalization(16, 1, 1e-5).get_config()["groups"] == 16
    layer = keras_bn.BatchNormalization(1, 0.9, 1e-5, False)
    assert (layer.axis, layer.momentum, layer.epsilon, layer.center) == (1, 0.9, 1e-5, False)


# What Keras before 3.15 lacks, and cannot read in a config.
NEWER = {"renorm": False, "renorm_clipping": None, "renorm_momentum": 0.99}
HAS_RENORM = "renorm" in dict(options_of(keras.layers.BatchNormalization))


def readable(config):
    """Return the config without what the installed Keras does not know."""
    return {k: v for k, v in config.items() if HAS_RENORM or k not in NEWER}


@every_case
def test_config_is_keras(case):
    wanted = case.stock(name="n", **case.options).get_config()
    wanted.pop("rms_scaling", None)  # deprecated
    if case.layer is keras_bn.BatchNormalization:
        wanted = NEWER | wanted
    if case.options.get("renorm"):
        # A difference: an option stays as it was given, where Keras turns None into {}.
        wanted["renorm_clipping"] = wanted["renorm_clipping"] or None
    assert case.make(name="n").get_config() == wanted


@every_case
def test_config_makes_the_layer_of_the_other_library(case):
    ours, stock = case.make(name="n"), case.stock(name="n", **case.options)
    there = case.stock.from_config(readable(ours.get_config()))
    here = case.layer.from_config(stock.get_config())
    wanted = stock.get_config()
    assert there.get_config() == wanted
    wanted.pop("rms_scaling", None)  # deprecated
    assert here.get_config() == {**ours.get_config(), **wanted}


def test_instance_normalization_stays_minus_one_in_the_config():
    ours, stock = (
        layer(groups=-1) for layer in (keras_bn.GroupNormalization, keras.layers.GroupNormalization)
    )
    _ = [layer.build((None, 6)) for layer in (ours, stock)]
    # A difference: Keras' config cannot be used for another number of channels.
    assert (ours.get_config()["groups"], stock.get_config()["groups"]) == (-1, 6)


@every_case
def test_weights_are_keras(case):
    ours, stock = pair(case)
    facts = [
        [(v.name, tuple(v.shape), v.dtype, v.trainable) for v in layer.weights]
        for layer in (ours, stock)
    ]
    assert facts[0] == facts[1]


def test_renorm_has_seven_weights():
    assert len(BY_NAME["renorm"].built().weights) == 7


# Results.


@dataclass(frozen=True)
class Situation:
    """How a row is called: what its input holds, the mode, the mask, the dtypes."""

    name: str
    training: bool = True
    trainable: bool = True
    policy: str = "float32"
    mask: str = ""
    data: str = "normal"

    def x(self, case: Case) -> np.ndarray:
        shape = (0, *case.shape[1:]) if self.data == "empty" else case.shape
        mean, std = {"offset": (3e4, 3.0), "above-65504": (2e5, 1e5)}.get(self.data, (1.0, 2.0))
        x = draw(shape, 0, mean, std)
        if self.data == "nan":
            x[(0,) * x.ndim] = np.nan
        return x

    def weights(self, case: Case) -> tuple[Any, Any]:
        """Return the mask as passed, and with an axis for each of the input's."""
        if not self.mask:
            return None, None
        form = {"positions": "each-position"}.get(self.mask, "keras")
        mask, full = next(m for m in MASKS if m.name == form).draw(case)
        return (mask & False, full * 0) if self.mask == "all" else (mask, full)


SITUATIONS = [
    Situation("training"),
    Situation("inference", training=False),
    Situation("frozen", trainable=False),
    Situation("offset", data="offset"),
    Situation("masked", mask="keras"),
    Situation("masked-positions", mask="positions"),
    Situation("all-masked", mask="all"),
    Situation("empty-batch", data="empty"),
    Situation("nan", data="nan"),
    Situation("above-65504", policy="mixed_float16", data="above-65504"),
    Situation("mixed_float16", policy="mixed_float16"),
    Situation("mixed_bfloat16", policy="mixed_bfloat16"),
    Situation("float16", policy="float16"),
    Situation("bfloat16", policy="bfloat16"),
    Situation("float64", policy="float64"),
]
SOME = ("batch", "batch-rank-3", "batch-first", "batch-one-channel", "renorm-clipped", "group")
FEW = ("batch", "renorm-clipped", "group")


def rows(situation):
    """Return the patterns of the rows that a situation is tried with."""
    if situation.name == "training":
        return ("*",)
    return SOME if situation.policy == "float32" else FEW


PAIRS = [
    pytest.param(situation, case, id=f"{situation.name}-{case.name}")
    for situation in SITUATIONS
    for case in SHARED
    if any(fnmatch(case.name, row) for row in rows(situation))
]


@dataclass(frozen=True)
class Difference:
    """Rows (patterns of names) that Keras gets wrong in a situation, where, and how."""

    situation: str
    rows: tuple[str, ...]
    reason: str
    backends: tuple[str, ...] = ("tensorflow", "jax", "torch")


BATCH = ("batch*", "renorm*")
DIFFERENCES = [
    Difference("offset", ("*",), "statistics lose κ² units: E[x²] - E[x]²", ("torch",)),
    Difference("offset", ("*",), "y = x·scale - mean·scale loses κ units", ("jax", "tensorflow")),
    Difference("masked", ("group*",), "the mask is ignored"),
    Difference("masked", ("batch-one-channel",), "statistics lose their axis", ("jax", "torch")),
    Difference("masked-positions", ("batch-first",), "the mask must lack the last axis"),
    Difference("masked-positions", ("group*",), "the mask is ignored"),
    Difference("masked-positions", ("batch-one*",), "statistics lose their axis", ("jax", "torch")),
    Difference("all-masked", ("*",), "the moving statistics are pulled to 0, or an error"),
    Difference("empty-batch", BATCH, "the moving statistics become NaN for ever"),
    Difference("nan", BATCH, "the moving statistics become NaN for ever"),
    Difference("above-65504", BATCH, "the input is cast to float16 first: infinite"),
    Difference("bfloat16", BATCH, "the moving statistics are bfloat16 and stall"),
    Difference("float16", BATCH, "the moving statistics are float16 and stall"),
    Difference("float64", ("*",), "computed in float32", ("jax", "torch")),
]
if keras.layers.GroupNormalization().autocast:  # until Keras 3.12 at least
    DIFFERENCES.append(Difference("above-65504", ("group",), "the input is cast to float16 first"))


def reason_to_differ(situation, case):
    return next(
        (
            difference.reason
            for difference in DIFFERENCES
            if difference.situation == situation.name
            and BACKEND in difference.backends
            and any(fnmatch(case.name, row) for row in difference.rows)
        ),
        None,
    )


def pair(case, **more):
    """Return our layer and Keras', with the same weights."""
    ours, stock = case.make(**more), case.stock(**case.options, **more)
    ours.build(case.shape)
    stock.build(case.shape)
    return trained(ours), trained(stock)


@pytest.mark.parametrize(("situation", "case"), PAIRS)
def test_results_are_keras_unless_named(situation, case, run, request):
    if situation.policy == "float64":
        request.getfixturevalue("x64")
    ours, stock = pair(case, dtype=situation.policy, trainable=situation.trainable)
    x, (mask, full) = situation.x(case), situation.weights(case)
    dtype = ours.compute_dtype
    # As a layer gets it within a model; float32 where float16 would be infinite.
    x = ops.cast(x, "float32" if situation.data == "above-65504" else dtype)
    dy = ops.cast(draw(tuple(x.shape), 1, 0, 1), dtype)
    call = {"training": situation.training} | ({} if mask is None else {"mask": mask})
    reason = reason_to_differ(situation, case)
    if reason is None:
        found, wanted = run(ours, x, dy, **call), run(stock, x, dy, **call)
        assert_agrees(found, wanted, in_float64(dy), dtype)
        return
    training = situation.training and situation.trainable
    exact = (in_float64(x), in_float64(dy))
    wanted = expected(ours, weights_by_name(ours), *exact, training=training, mask=full)
    assert_agrees(run(ours, x, dy, **call), wanted, exact[1], dtype)
    assert fails(lambda: assert_agrees(run(stock, x, dy, **call), wanted, exact[1], dtype)), (
        f"Keras has mended: {reason}"
    )


@pytest.mark.parametrize("layer", FEATURES, ids=lambda layer: layer.__name__)
def test_features_need_not_be_last(layer, run):
    x, dy = draw((3, 4, 5)), draw((3, 4, 5), 1, 0, 1)
    ours, stock = (trained_in(make, (3, 4, 5)) for make in (layer, stock_of(layer)))
    wanted = expected(ours, weights_by_name(ours), x, dy, training=False)
    assert_agrees(run(ours, x, dy), wanted, dy)
    # Keras' own is right for LayerNormalization outside PyTorch.
    is_right = BACKEND != "torch" and layer is keras_bn.LayerNormalization
    assert fails(lambda: assert_agrees(run(stock, x, dy), wanted, dy)) != is_right


def trained_in(make, shape):
    layer = make(axis=1)
    layer.build(shape)
    return trained(layer)


def in_float64(tensor):
    """Return the values as NumPy float64 numbers; NumPy itself knows no bfloat16."""
    half = keras.backend.standardize_dtype(tensor.dtype) == "bfloat16"
    return ops.convert_to_numpy(ops.cast(tensor, "float32") if half else tensor).astype("float64")


def fails(action):
    """Say whether Keras is wrong, in one way or another."""
    try:
        action()
    except Exception:
        return True
    return False


# Files and weights, both ways.


def models(case):
    """Return a model of our layer and one of Keras', with different weights."""
    ours, stock = (
        keras.Sequential([keras.Input(case.shape[1:]), layer])
        for layer in (case.make(name="n"), case.stock(name="n", **case.options))
    )
    trained(ours.layers[0], 1)
    trained(stock.layers[0], 2)
    return ours, stock


def assert_same_inference(model, other, case):
    """Compare weights, which must be equal, and outputs, by twice the bound."""
    pairs = zip(model.get_weights(), other.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    y, wanted = (ops.convert_to_numpy(m(case.x(), training=False)) for m in (model, other))
    assert_close(y, wanted)


both_ways = pytest.mark.parametrize("way", [1, -1], ids=["ours-to-keras", "keras-to-ours"])


@every_filed
@both_ways
def test_weights_file_crosses(case, way, tmp_path):
    source, target = models(case)[::way]
    source.save_weights(tmp_path / "m.weights.h5")
    target.load_weights(tmp_path / "m.weights.h5")
    assert_same_inference(target, source, case)


@every_filed
@both_ways
def test_weight_lists_cross(case, way):
    source, target = models(case)[::way]
    target.set_weights(source.get_weights())
    assert_same_inference(target, source, case)


@every_filed
@both_ways
def test_weights_load_from_the_keras_file_of_the_other(case, way, tmp_path):
    source, target = models(case)[::way]
    source.save(tmp_path / "m.keras")
    target.load_weights(tmp_path / "m.keras")
    assert_same_inference(target, source, case)


@pytest.mark.skipif(not HAS_RENORM, reason="Keras before 3.15 does not know all our options")
@every_filed
def test_keras_file_of_ours_loads_as_keras_layers(case, tmp_path, monkeypatch):
    ours, _ = models(case)
    ours.save(tmp_path / "m.keras")
    name = f"keras_bn>{case.layer.__name__}"
    # As in a process that has not imported keras_bn.
    monkeypatch.delitem(keras.saving.get_custom_objects(), name)
    there = keras.saving.load_model(tmp_path / "m.keras", custom_objects={name: case.stock})
    assert type(there.layers[0]) is case.stock
    assert_same_inference(there, ours, case)


@every_filed
def test_keras_file_of_keras_loads_as_ours(case, tmp_path):
    _, stock = models(case)
    stock.save(tmp_path / "m.keras")
    # Keras looks its own classes up before any custom object, so the file must name ours.
    name = f"keras_bn>{case.layer.__name__}"
    edit_layer(tmp_path / "m.keras", module="keras_bn.layers", registered_name=name)
    here = keras.saving.load_model(tmp_path / "m.keras")
    assert type(here.layers[0]) is case.layer
    assert_same_inference(here, stock, case)


@every_filed
def test_clone_function_replaces_the_layers_of_keras(case):
    _, stock = models(case)

    def replaced(layer):
        ours = type(layer) is case.stock
        return case.layer.from_config(layer.get_config()) if ours else layer

    here = keras.models.clone_model(stock, clone_function=replaced)
    here.set_weights(stock.get_weights())
    assert type(here.layers[0]) is case.layer
    assert_same_inference(here, stock, case)


def edit_layer(path, **changes):
    """Change what a `.keras` file says about its first layer after the input."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    config = json.loads(parts["config.json"])
    config["config"]["layers"][1].update(changes)
    parts["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as file:
        _ = [file.writestr(name, part) for name, part in parts.items()]


# Files of Keras 2.

# As tf.keras 2.15 wrote it; `renorm` was an option there, with other weights.
KERAS_2 = {
    "name": "bn",
    "trainable": True,
    "dtype": "float32",
    "axis": [2],
    "momentum": 0.9,
    "epsilon": 0.01,
    "center": True,
    "scale": True,
    "beta_initializer": {"class_name": "Zeros", "config": {}},
    "gamma_initializer": {"class_name": "Ones", "config": {}},
    "moving_mean_initializer": {"class_name": "Zeros", "config": {}},
    "moving_variance_initializer": {"class_name": "Ones", "config": {}},
    "beta_regularizer": None,
    "gamma_regularizer": None,
    "beta_constraint": None,
    "gamma_constraint": None,
}
KERAS_2_MORE = {
    "plain": {},
    "fused": {"fused": True},
    "not-fused": {"fused": False},
    "adjustment": {"adjustment": None},
    "virtual-batch-size": {"virtual_batch_size": None},
    "all": {"fused": None, "adjustment": None, "virtual_batch_size": None, "renorm": False},
}
every_old_config = pytest.mark.parametrize("more", KERAS_2_MORE.values(), ids=KERAS_2_MORE)


@every_old_config
def test_config_of_keras_2_loads(more):
    layer = keras_bn.BatchNormalization.from_config(KERAS_2 | more)
    assert (layer.name, layer.axis, layer.momentum, layer.epsilon) == ("bn", 2, 0.9, 0.01)
    assert isinstance(layer.gamma_initializer, keras.initializers.Ones)


@every_old_config
def test_class_name_of_keras_2_loads_through_custom_objects(more):
    config = {"class_name": "BatchNormalization", "config": KERAS_2 | more}
    objects = {"BatchNormalization": keras_bn.BatchNormalization}
    layer = keras.saving.deserialize_keras_object(config, custom_objects=objects)
    assert type(layer) is keras_bn.BatchNormalization
    assert layer.axis == 2


@every_old_config
def test_keras_file_with_a_config_of_keras_2_loads(more, tmp_path):
    case = BY_NAME["batch-rank-3"]
    ours, _ = models(case)
    ours.save(tmp_path / "m.keras")
    edit_layer(tmp_path / "m.keras", config=KERAS_2 | more | {"epsilon": 1e-3})
    assert_same_inference(keras.saving.load_model(tmp_path / "m.keras"), ours, case)


def test_config_of_keras_2_with_ghost_batches_loads():
    layer = keras_bn.BatchNormalization.from_config(KERAS_2 | {"virtual_batch_size": 8})
    assert layer.virtual_batch_size == 8


def test_several_axes_of_keras_2_are_several_axes():
    layer = keras_bn.BatchNormalization.from_config(KERAS_2 | {"axis": [1, 3]})
    assert layer.axis == (1, 3)


# What Keras refuses, named too.


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras synchronizes there")
def test_synchronized_is_stored_where_keras_refuses_it():
    with pytest.raises(ValueError, match="only supported with the TensorFlow backend"):
        keras.layers.BatchNormalization(synchronized=True)
    assert keras_bn.BatchNormalization(synchronized=True).get_config()["synchronized"]


def test_keras_keeps_one_axis_only():
    with pytest.raises(TypeError):
        keras.layers.BatchNormalization(axis=(1, 2))
