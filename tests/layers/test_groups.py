"""Group normalization of images whose channels come first: what native kernels get wrong."""

import keras
import numpy as np
import pytest

import keras_bn
from tests.kernels import hard
from tests.layers.half import check_rounded_once
from tests.oracle import expected, weights_by_name

U = hard.unit_roundoff("float32")
# κ of the groups; "some" are far from 0 among others that are not.
GROUPS = {"near 0": 0.5, "far": 1e4, "some": np.array([0.0, 1e4, 3.0, 1e2]).repeat(3)}
SHAPES = {"images": (3, 12, 8, 9), "sequences": (3, 12, 65), "long": (2, 12, 70, 70)}
KINDS = {
    "group": lambda **options: keras_bn.GroupNormalization(4, axis=1, **options),
    "instance": lambda **options: keras_bn.InstanceNormalization(axis=1, **options),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def drawn(mean, shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) + np.reshape(mean, (-1,) + (1,) * (len(shape) - 2))
    return x.astype("float32"), rng.standard_normal(shape).astype("float32")


def built(kind, shape, **options):
    layer = kind(**options)
    layer.build(shape)
    draw = np.random.default_rng(1)
    layer.set_weights([draw.uniform(0.5, 2.0, w.shape) for w in layer.get_weights()])
    return layer


@every_kind
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mean", GROUPS.values(), ids=GROUPS)
def test_groups_are_right_however_far_from_0(mean, shape, kind, run):
    x, dy = drawn(mean, shape)
    layer = built(kind, shape)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    found = run(layer, x, dy)
    kappa = 1 + np.abs(np.reshape(mean, (-1,) + (1,) * (len(shape) - 2)))
    assert hard.share(found.y - wanted.y, 8 * U * (1 + np.abs(wanted.y) + 8 * kappa * U)) <= 1
    assert hard.share(found.dx - wanted.dx, 64 * U * (1 + np.abs(wanted.dx))) <= 1
    axes = (0, *range(2, x.ndim))
    for name, factor in (("gamma", 1 + np.abs(wanted.y)), ("beta", 1.0)):
        bound = (8 * U * np.abs(dy) * factor).sum(axes)
        assert hard.share(found.gradients[name] - wanted.gradients[name], bound) <= 1


@every_kind
@pytest.mark.parametrize("options", [{"center": False}, {"scale": False}], ids=str)
def test_groups_without_gamma_or_beta(options, kind, run):
    x, dy = drawn(0.5, SHAPES["images"])
    layer = built(kind, x.shape, **options)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    found = run(layer, x, dy)
    assert hard.share(found.dx - wanted.dx, 64 * U * (1 + np.abs(wanted.dx))) <= 1
    assert set(found.gradients) == set(wanted.gradients)


@every_kind
@pytest.mark.parametrize("value", [0.1, 1 / 3], ids=["a tenth", "a third"])
# PyTorch's kernel, which takes channels of up to 4096, adds every eighth element one by one.
@pytest.mark.parametrize(("size", "units"), [(100, 32), (1024, 32), (4096, 128), (5000, 32)])
def test_equal_gradients_of_a_group_leave_nothing(size, units, value, kind, run):
    x = np.random.default_rng(0).standard_normal((40, 4, size)).astype("float32")
    layer = kind()
    layer.build(x.shape)
    dy = np.full_like(x, value)
    found = run(layer, x, dy)
    assert hard.share(found.dx, units * U * value * (1 + np.abs(x))) <= 1
    terms = 40 * size * float(dy.flat[0])
    assert hard.share(found.gradients["beta"] - terms, 8 * U * terms) <= 1


@every_kind
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_groups_of_half_precision_are_rounded_once(dtype, kind, run):
    x, dy = drawn(0.5, SHAPES["images"])
    layer = built(kind, x.shape, dtype=f"mixed_{dtype}")
    check_rounded_once(layer, x, dy, (0, 2, 3), dtype, run)


@every_kind
def test_an_outlier_does_not_hide_the_rest_of_its_group(kind, run):
    x, _ = drawn(0.0, SHAPES["long"])
    x[:, :, 35, 35] = 1e4
    layer = kind(epsilon=0.0)
    layer.build(x.shape)
    wanted = expected(layer, weights_by_name(layer), x, np.zeros_like(x), training=True)
    found = run(layer, x)
    assert hard.share(found.y - wanted.y, 16 * U * (0.1 + np.abs(wanted.y))) <= 1


@every_kind
def test_images_may_be_a_view(kind, run):
    x, dy = drawn(0.5, SHAPES["images"])
    layer = built(kind, x.shape)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    last = keras.ops.convert_to_tensor(np.moveaxis(x, 1, -1).copy())
    found = run(layer, keras.ops.moveaxis(last, -1, 1), dy)
    assert hard.share(found.y - wanted.y, 8 * U * (1 + np.abs(wanted.y))) <= 1
    assert hard.share(found.dx - wanted.dx, 64 * U * (1 + np.abs(wanted.dx))) <= 1
