"""What the tests of FeatureScaling share: data, formulas in float64, and what a layer keeps."""

import numpy as np
import pytest
from keras import ops

from keras_bn import FeatureScaling
from tests.cases import U, draw

MODES = ["standard", "min_max", "mean"]
# 16 roundings, for NumPy's sums and ours.
UNIT = 16 * U["float64"]
NAMES = ("mean", "stddev", "minimum", "maximum", "count")
each_mode = pytest.mark.parametrize("mode", MODES)

X = draw((103, 6), 0, 3.0, 2.0)
DATES = 1_700_000_000 + np.random.default_rng(0).integers(-500, 500, (103, 6))


def exact(x, axes=(0,)):
    """Return the statistics in float64, by name; NaN and infinity are missing."""
    x = np.asarray(x, "float64")
    x = np.where(np.isfinite(x), x, np.nan)
    how = {"axis": axes, "keepdims": True}
    minimum, maximum = np.nanmin(x, **how), np.nanmax(x, **how)
    # Far from 0 the rounding of the mean, squared, would be in the deviation.
    stddev = np.nanstd(x - minimum, **how)
    values = np.nanmean(x, **how), stddev, minimum, maximum, np.isfinite(x).sum(**how)
    return dict(zip(NAMES, values, strict=True))


def formula(mode, z, statistics):
    """Return the scaled z by the formula of the mode, in float64."""
    mean, stddev, minimum, maximum, _ = statistics.values()
    center = minimum if mode == "min_max" else mean
    width = stddev if mode == "standard" else maximum - minimum
    return (np.asarray(z, "float64") - center) / np.where(maximum > minimum, width, 1)


def kept(layer):
    """Return the statistics that a layer keeps, by name, in float64."""
    *values, offsets = (np.array(value, "float64") for value in layer.get_weights())
    return dict(zip(NAMES, values + offsets.sum(0), strict=True))


def assert_keeps(layer, wanted, resumed=False):
    """Compare in float64, whatever the dtype of the weights.

    Where statistics were taken up again from the weights, the rounding of the mean is in the
    deviation.
    """
    for name, value in kept(layer).items():
        scale = np.abs(wanted["mean" if resumed and name == "stddev" else name]).max()
        np.testing.assert_allclose(value, wanted[name].reshape(value.shape), 0, UNIT * scale)


def adapted(data, *args, **options):
    layer = FeatureScaling(*args, **options)
    layer.adapt(data)
    return layer


def call(layer, x):
    return ops.convert_to_numpy(layer(x))


def tf_data(*arrays, batch_size=10):
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0])
    return data.batch(batch_size) if batch_size else data
