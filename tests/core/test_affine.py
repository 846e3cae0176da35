"""The affine map: what standardizing and composing give."""

from typing import Any

import numpy as np
import pytest
from keras import ops

from keras_bn.core.affine import Affine, compose, invert, rescale, standardize
from keras_bn.core.moments import Moments
from tests.kernels import hard, modes

U = hard.unit_roundoff("float32")


def tensors(*values: float) -> tuple[Any, ...]:
    return tuple(modes.tensor(np.array([value], "float32")) for value in values)


def image(affine: Affine, x: float) -> float:
    """Return what the map makes of a number, in float64."""
    center, scale, shift = (float(part[0]) for part in modes.to_numpy(tuple(affine)))
    return (x - center) * scale + shift


# pivot, offset and m2 of 4 elements.
MOMENTS = {
    "near 0": (0.0, 0.25, 4.0),
    "far from 0": (1e6, 0.013, 4.0),
    "constant": (5.0, 0.0, 0.0),
    "tiny": (1e-3, 1e-12, 1e-12),
}


@pytest.mark.parametrize("values", MOMENTS.values(), ids=MOMENTS)
def test_standardize_maps_the_mean_to_0_and_a_deviation_to_1(values):
    moments = Moments(4, *tensors(*values))
    affine = standardize(moments, 1e-3)
    pivot, offset, m2 = (float(part[0]) for part in modes.to_numpy(moments[1:]))
    deviation = np.sqrt(m2 / 4 + 1e-3)
    assert image(affine, pivot + offset) == pytest.approx(0, abs=4 * U)
    assert image(affine, pivot + offset + deviation) == pytest.approx(1, abs=8 * U)


def test_standardize_centers_at_the_pivot():
    moments = Moments(4, *tensors(1e6, 0.013, 4.0))
    assert modes.to_numpy(standardize(moments, 1e-3).center).tolist() == [1e6]


# pivot, offset and width.
WIDTHS = {
    "near 0": (0.0, 0.25, 4.0),
    "far from 0": (1e6, 0.013, 4.0),
    "small": (0.0, 1e-31, 1e-30),
}


@pytest.mark.parametrize("values", WIDTHS.values(), ids=WIDTHS)
def test_rescale_maps_the_center_to_0_and_a_width_to_1(values):
    affine = rescale(*tensors(*values))
    pivot, offset, width = (float(part[0]) for part in modes.to_numpy(tensors(*values)))
    assert image(affine, pivot + offset) == pytest.approx(0, abs=4 * U * offset / width)
    assert image(affine, pivot + offset + width) == pytest.approx(1, abs=8 * U)


@pytest.mark.parametrize("width", [0.0, -1.0, 1e-45])
def test_rescale_by_no_width_only_centers(width):
    affine = rescale(*tensors(5.0, 0.0, width))
    assert (image(affine, 5.0), image(affine, 7.0)) == (0.0, 2.0)


@pytest.mark.parametrize("x", [-3.0, 0.0, 1e3])
def test_invert_leads_back(x):
    affine = Affine(*tensors(100.0, 0.25, 3.0))
    assert image(invert(affine), image(affine, x)) == x


PARAMETERS = {
    "neither": (None, None),
    "gamma": (-3.0, None),
    "beta": (None, 0.5),
    "both": (-3.0, 0.5),
    "gamma 0": (0.0, 0.5),
}


@pytest.mark.parametrize(("gamma", "beta"), PARAMETERS.values(), ids=PARAMETERS)
@pytest.mark.parametrize("x", [7.0, 9.5, -1e3])
def test_compose_scales_and_then_adds(gamma, beta, x):
    affine = Affine(*tensors(7.0, 0.25, 2.0))
    given = [None if value is None else tensors(value)[0] for value in (gamma, beta)]
    found = image(compose(affine, *given), x)
    expected = image(affine, x) * (1 if gamma is None else gamma) + (beta or 0)
    assert found == pytest.approx(expected, rel=4 * U)


def test_compose_is_associative():
    affine, (a, b, c, d) = Affine(*tensors(7.0, 0.25, 2.0)), tensors(-3.0, 0.5, 1.5, 4.0)
    twice = compose(compose(affine, a, b), c, d)
    once = compose(affine, a * c, b * c + d)
    assert image(twice, 9.5) == pytest.approx(image(once, 9.5), rel=4 * U)


def test_compose_with_none_changes_nothing():
    affine = Affine(*tensors(7.0, 0.25, 2.0))
    assert compose(affine, None, None) == affine


def test_compose_keeps_the_center():
    affine = Affine(*tensors(1e6, 0.25, 2.0))
    found = compose(affine, *tensors(-3.0, 0.5))
    assert modes.to_numpy(ops.stack([affine.center, found.center])).tolist() == [[1e6], [1e6]]
