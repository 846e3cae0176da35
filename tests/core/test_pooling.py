"""Which axes, masks and groups belong together."""

import numpy as np
import pytest
from keras import ops

from keras_bn.core.pooling import (
    Ghosts,
    ghosts_of,
    group_total,
    join_groups,
    kept_shape,
    mask_weights,
    reduced_axes,
    split_groups,
)
from tests.kernels import modes

AXES = {
    "channels last": ((8, 5, 6, 3), (3,), (0, 1, 2), (1, 1, 1, 3)),
    "channels first": ((8, 3, 5, 6), (1,), (0, 2, 3), (1, 3, 1, 1)),
    "two are kept": ((8, 5, 3), (0, 2), (1,), (8, 1, 3)),
    "all are kept": ((8, 3), (0, 1), (), (8, 3)),
    "none is kept": ((8, 3), (), (0, 1), (1, 1)),
    "unknown batch": ((None, 5, 3), (2,), (0, 1), (1, 1, 3)),
}


@pytest.mark.parametrize(("shape", "kept", "reduced", "broadcast"), AXES.values(), ids=AXES)
def test_an_axis_is_kept_or_reduced(shape, kept, reduced, broadcast):
    assert reduced_axes(len(shape), kept) == reduced
    assert kept_shape(shape, kept) == broadcast


# The mask's shape, the input's, the kept axes, and the shape that broadcasts against the input.
MASKS = {
    "one per element but channels": ((4, 5, 6), (4, 5, 6, 3), (3,), (4, 5, 6, 1)),
    "one per sample": ((4, 1, 1), (4, 5, 6, 3), (3,), (4, 1, 1, 1)),
    "one per position": ((5, 6), (4, 5, 6, 3), (3,), (1, 5, 6, 1)),
    "one per column": ((6,), (4, 5, 6, 3), (3,), (1, 1, 6, 1)),
    "one for all": ((), (4, 5, 3), (2,), (1, 1, 1)),
    "sequence": ((4, 5), (4, 5, 3), (2,), (4, 5, 1)),
    "rows": ((4,), (4, 3), (1,), (4, 1)),
    "channels first": ((4, 5, 6), (4, 3, 5, 6), (1,), (4, 1, 5, 6)),
    "channels first, per position": ((5, 6), (4, 3, 5, 6), (1,), (1, 1, 5, 6)),
    "channels in the middle": ((4, 6), (4, 3, 6), (1,), (4, 1, 6)),
    "channels first in all": ((4, 5), (3, 4, 5), (0,), (1, 4, 5)),
    "two are kept": ((5,), (4, 5, 3), (0, 2), (1, 5, 1)),
    "one channel": ((4, 5), (4, 5, 1), (2,), (4, 5, 1)),
    "Keras' form, channels first": ((4, 3, 5), (4, 3, 5, 6), (1,), (4, 3, 5, 1)),
    "Keras' form, sequence, channels first": ((4, 3), (4, 3, 6), (1,), (4, 3, 1)),
    "Keras' form, two are kept": ((4, 5), (4, 5, 3), (1, 2), (4, 5, 1)),
    "both forms: the first counts": ((4, 5), (4, 5, 5), (1,), (4, 1, 5)),
    "unknown batch": ((4, 5), (None, 5, 3), (2,), (4, 5, 1)),
    "empty batch": ((0, 5), (0, 5, 3), (2,), (0, 5, 1)),
}

MISFITS = {
    "another length": ((4, 6), (4, 5, 3), (2,)),
    "the input's own shape": ((4, 5, 3), (4, 5, 3), (2,)),
    "samples without their axes": ((4,), (4, 5, 3), (2,)),
    "neither form": ((4, 6), (4, 3, 5), (1,)),
    "more axes than the input": ((1, 4, 5, 3), (4, 5, 3), (2,)),
    "channels": ((3,), (4, 5, 3), (2,)),
}


@pytest.mark.parametrize(("mask", "shape", "kept", "expected"), MASKS.values(), ids=MASKS)
def test_a_mask_is_reshaped_to_broadcast_against_the_input(mask, shape, kept, expected):
    values = np.arange(np.prod(mask, dtype=int), dtype="float32").reshape(mask)
    found = mask_weights(modes.tensor(values), shape, kept)
    assert tuple(found.shape) == expected
    assert np.array_equal(modes.to_numpy(found).ravel(), values.ravel())


@pytest.mark.parametrize(("mask", "shape", "kept"), MISFITS.values(), ids=MISFITS)
def test_a_mask_that_does_not_fit_gives_none(mask, shape, kept):
    assert mask_weights(ops.ones(mask), shape, kept) is None


def test_a_mask_may_be_boolean():
    found = mask_weights(ops.convert_to_tensor([[True, False]]), (1, 2, 3), (2,))
    assert ops.convert_to_numpy(found).tolist() == [[[True], [False]]]


GROUPS = {
    "last": ((2, 5, 6), 2, 3),
    "first": ((6, 5), 0, 2),
    "middle": ((2, 6, 5), 1, 3),
    "one group": ((2, 6), 1, 1),
    "one channel each": ((2, 6), 1, 6),
}


@pytest.mark.parametrize(("shape", "axis", "groups"), GROUPS.values(), ids=GROUPS)
def test_each_channel_gets_the_sum_of_its_group(shape, axis, groups):
    array = np.random.default_rng(0).integers(0, 99, shape).astype("float32")
    member = np.arange(shape[axis]) // (shape[axis] // groups)
    same = (member[:, None] == member).astype("float32")
    expected = np.moveaxis(np.moveaxis(array, axis, -1) @ same, -1, axis)
    found = group_total(axis, shape[axis], groups)(modes.tensor(array))
    assert np.array_equal(modes.to_numpy(found), expected)


@pytest.mark.parametrize(("shape", "axis", "groups"), GROUPS.values(), ids=GROUPS)
def test_split_groups_are_neighbouring_channels_and_join_again(shape, axis, groups):
    array = np.random.default_rng(0).normal(size=shape).astype("float32")
    split = split_groups(modes.tensor(array), axis, groups)
    expected = np.stack(np.split(array, groups, axis), axis)
    assert np.array_equal(modes.to_numpy(split), expected)
    assert np.array_equal(modes.to_numpy(join_groups(split, axis, shape[axis])), array)


def test_an_axis_of_size_1_is_split_into_one_group():
    assert tuple(split_groups(ops.ones((4, 1, 5)), 1, 3).shape) == (4, 1, 1, 5)


def test_what_a_group_has_once_is_given_to_each_of_its_channels():
    found = join_groups(ops.convert_to_tensor([[[1.0], [2.0]]]), 1, 6)
    assert modes.to_numpy(found).tolist() == [[1, 1, 1, 2, 2, 2]]


# Samples, the size asked for, and the ghosts that sample 0, 1, 2, ... belong to.
GHOSTS = {
    "a multiple": (6, 3, [0, 1, 0, 1, 0, 1]),
    "one less": (5, 3, [0, 1, 0, 1, 0]),
    "one more": (7, 3, [0, 1, 2, 0, 1, 2, 0]),
    "all alike": (10, 8, [0, 1] * 5),
    "fewer than asked for": (2, 3, [0, 0]),
    "one each": (3, 1, [0, 1, 2]),
    "no sample": (0, 3, []),
}
every_batch = pytest.mark.parametrize(("samples", "size", "belongs"), GHOSTS.values(), ids=GHOSTS)


def ghosts_and_array(samples, size):
    array = np.random.default_rng(0).normal(size=(samples, 2)).astype("float32")
    tensor = modes.tensor(array)
    return ghosts_of(tensor, size), array, tensor


@every_batch
def test_sample_belongs_to_the_ghost_of_its_number(samples, size, belongs):
    ghosts, array, tensor = ghosts_and_array(samples, size)
    belongs = np.array(belongs, int)
    wanted = [array[belongs == i].astype("float64").sum(0) for i in belongs]
    found = modes.to_numpy(ghosts.total(tensor))
    np.testing.assert_allclose(found, np.reshape(wanted, (samples, 2)), rtol=0, atol=1e-6)


@every_batch
def test_ghosts_are_as_large_as_asked_for_and_all_but_equal(samples, size, belongs):
    ghosts, _, _ = ghosts_and_array(samples, size)
    sizes = np.bincount(belongs) if belongs else np.array([0])
    assert (ghosts.number, ghosts.size) == (len(sizes), sizes.max())
    assert sizes.max() <= size
    assert sizes.max() - sizes.min() <= 1


@every_batch
def test_split_batch_is_joined_again(samples, size, belongs):
    ghosts, array, tensor = ghosts_and_array(samples, size)
    split = ghosts.split(tensor)
    assert tuple(split.shape) == (ghosts.size, ghosts.number, 2)
    assert np.array_equal(ops.convert_to_numpy(ghosts.join(split)), array)


def test_split_fills_up_with_zeros():
    split = Ghosts(3, 2, 2).split(modes.tensor(np.ones((3, 1), "float32")))
    assert ops.convert_to_numpy(split)[..., 0].tolist() == [[1, 1], [1, 0]]
