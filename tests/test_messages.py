"""Every error of the package: its type, its whole text, and that it leaves nothing half done."""

import ast
import re
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn import BatchNormalization
from keras_bn.errors import invalid
from tests.cases import SEQUENCE, WRONG_MASKS, WRONG_OPTIONS, WRONG_SHAPES, draw

wrong_options = pytest.mark.parametrize("row", WRONG_OPTIONS, ids=lambda row: row.name)
wrong_shapes = pytest.mark.parametrize("row", WRONG_SHAPES, ids=lambda row: row.name)
wrong_masks = pytest.mark.parametrize("row", WRONG_MASKS, ids=lambda row: row.name)


def raises(row, *, alone=True):
    """Expect the row's error; Keras adds words of its own around the text of an error in a call."""
    text = re.escape(row.whole_text)
    return pytest.raises(row.error, match=f"^{text}$" if alone else text)


# Options, in `__init__`.


@wrong_options
def test_option_is_refused_at_once(row):
    with raises(row):
        row.layer(**row.options)


@wrong_options
def test_option_of_a_config_is_refused(row):
    with raises(row):
        row.layer.from_config(row.options)


def test_unknown_option_is_refused():
    with pytest.raises(ValueError, match=r"Unrecognized keyword arguments .*momentun"):
        BatchNormalization(momentun=0.9)


LEGACY = {
    "adjustment": ("f", "(None,)"),
    "fused": ("yes", "(None, True, False)"),
}


@pytest.mark.parametrize(
    ("name", "value", "values"), [(k, *v) for k, v in LEGACY.items()], ids=LEGACY
)
def test_option_of_keras_2_is_refused_where_it_would_be_lost(name, value, values):
    text = f"BatchNormalization: `{name}` must be one of {values}. Received: {name}={value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        BatchNormalization.from_config({name: value})


# Shapes, in `build`.


@wrong_shapes
def test_shape_is_refused_when_built(row):
    with raises(row):
        row.layer(**row.options).build(row.shape)


@wrong_shapes
def test_shape_is_refused_in_a_model(row):
    layer = row.layer(**row.options)
    with raises(row, alone=False):
        layer(keras.KerasTensor(row.shape))


@wrong_shapes
def test_layer_is_not_built_after_an_error(row):
    layer = row.layer(**row.options)
    before = layer.get_config()
    with raises(row, alone=False):
        layer(keras.KerasTensor(row.shape))
    assert (layer.built, layer.weights, layer.get_config()) == (False, [], before)


AGAIN = {
    "axis": (BatchNormalization, {"axis": 3}, (8, 6), (2, 3, 4, 5)),
    "channels": (keras_bn.GroupNormalization, {"groups": 4}, (8, 6), (8, 12)),
    "unknown": (keras_bn.BatchRenormalization, {}, (8, None), (8, 6)),
}


@pytest.mark.parametrize(("layer", "options", "wrong", "right"), AGAIN.values(), ids=AGAIN)
def test_layer_can_be_built_after_an_error(layer, options, wrong, right):
    norm, other = layer(**options), layer(**options)
    with pytest.raises(ValueError, match="must be"):
        norm.build(wrong)
    y, wanted = (keras.ops.convert_to_numpy(n(draw(right))) for n in (norm, other))
    assert np.array_equal(y, wanted)
    assert [v.name for v in norm.weights] == [v.name for v in other.weights]


@pytest.mark.parametrize("axis", [2, -3])
def test_output_shape_of_a_missing_axis_is_refused(axis):
    text = f"`axis` must be different axes of an input of rank 2 or more. Received: axis={axis}, "
    with pytest.raises(ValueError, match=re.escape(text)):
        BatchNormalization(axis=axis).compute_output_shape((8, 6))


def test_other_rank_than_built_for_is_refused():
    layer = BatchNormalization()
    layer.build((8, 6))
    with pytest.raises(ValueError, match="expected ndim=2, found ndim=3"):
        layer(draw(SEQUENCE))


def test_other_channels_than_built_for_are_refused():
    layer = BatchNormalization()
    layer.build((8, 6))
    with pytest.raises(ValueError, match="of input shape to have value 6"):
        layer(draw((8, 5)))


# Masks, in the call.


@wrong_masks
def test_mask_that_does_not_fit_is_refused(row):
    layer = row.layer(**row.options)
    with raises(row, alone=False):
        layer(draw(row.shape), mask=np.ones(row.mask, bool))


@wrong_masks
def test_wrong_mask_changes_no_weight(row):
    layer = row.layer(**row.options)
    layer.build(row.shape)
    before = layer.get_weights()
    with raises(row, alone=False):
        layer(draw(row.shape), mask=np.ones(row.mask, bool), **training(layer))
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))


def training(layer):
    return {} if isinstance(layer, keras_bn.GroupNormalization) else {"training": True}


# The form of all of them.

FORMS = {
    "plain": (invalid("L", "a", "b", 1), "L: `a` must be b. Received: a=1."),
    "advice": (invalid("L", "a", "b", "x", "Do c."), "L: `a` must be b. Received: a='x'. Do c."),
    "facts": (invalid("L", "a", "b", 1, d=2), "L: `a` must be b. Received: a=1, d=2."),
}


@pytest.mark.parametrize(("error", "text"), FORMS.values(), ids=FORMS)
def test_error_names_layer_expectation_and_value(error, text):
    assert (type(error), str(error)) == (ValueError, text)


SOURCES = sorted(Path(keras_bn.__file__).parent.rglob("*.py"))
RAISES = [
    pytest.param(node, id=f"{path.stem}-{node.lineno}")
    for path in SOURCES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Raise)
]


@pytest.mark.parametrize("node", RAISES)
def test_every_error_is_worded_in_one_place(node):
    text = ast.unparse(node)
    assert re.match(r"raise (self\._)?invalid\(|raise NotImplementedError$", text), text
