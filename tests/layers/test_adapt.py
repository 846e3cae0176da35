"""`FeatureScaling.adapt`: one set of statistics, however the data come."""

import itertools
import re
import weakref

import h5py
import keras
import numpy as np
import pytest
from keras import ops

from keras_bn import FeatureScaling
from tests.cases import PRESENT, SEQUENCE, assert_close, draw
from tests.layers.scaling import (
    X,
    adapted,
    assert_keeps,
    call,
    each_mode,
    exact,
    formula,
    tf_data,
)

# Whatever the data come as. Each source gives X, in one batch or several.

CUTS = [0, 1, 40, 40, 77, 103]
PARTS = [X[i:j] for i, j in itertools.pairwise(CUTS)]
LABELS = [part[:, 0] for part in PARTS]


class Pairs(keras.utils.PyDataset):
    """A data set of Keras with the parts of X and labels."""

    def __len__(self):
        return len(PARTS)

    def __getitem__(self, index):
        return PARTS[index], LABELS[index]


def torch_loader(*arrays, **options):
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(array) for array in arrays]
    data = torch.utils.data.TensorDataset(*tensors) if len(arrays) > 1 else tensors[0]
    return torch.utils.data.DataLoader(data, batch_size=10, **options)


SOURCES = {
    "array": lambda: X,
    "array-in-float64": lambda: X.astype("float64"),
    "array-with-strides": lambda: np.asfortranarray(np.repeat(X, 2, 0))[::2],
    "tensor": lambda: ops.convert_to_tensor(X),
    "pair": lambda: (X, X[:, 0]),
    "triple": lambda: (X, X[:, 0], X[:, 1]),
    "list-of-batches": lambda: PARTS,
    "list-of-tensors": lambda: [ops.convert_to_tensor(part) for part in PARTS],
    "list-of-rows": lambda: list(X),
    "list-of-numbers": X.tolist,
    "tuples-of-numbers": lambda: tuple(map(tuple, X.tolist())),
    "generator": lambda: (part for part in PARTS),
    "generator-of-pairs": lambda: zip(PARTS, LABELS, strict=True),
    "generator-of-triples": lambda: zip(PARTS, LABELS, LABELS, strict=True),
    "generator-of-rows-and-labels": lambda: ((row, 1) for row in X),
    "py-dataset": Pairs,
    "tf-data": lambda: tf_data(X),
    "tf-data-pairs": lambda: tf_data(X, X[:, 0]),
    "tf-data-triples": lambda: tf_data(X, X[:, 0], X[:, 1]),
    "tf-data-rows": lambda: tf_data(X, batch_size=None),
    "tf-tensor": lambda: pytest.importorskip("tensorflow").constant(X),
    "torch-loader": lambda: torch_loader(X),
    "torch-loader-pairs": lambda: torch_loader(X, X[:, 0]),
    "torch-loader-shuffled": lambda: torch_loader(X, X[:, 0], shuffle=True),
    "torch-tensor": lambda: pytest.importorskip("torch").from_numpy(X),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_statistics_are_those_of_the_whole(source):
    assert_keeps(adapted(source()), exact(X))


def test_hdf5_file_is_read_in_parts(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = X
        assert_keeps(adapted(file["x"]), exact(X))


@pytest.mark.parametrize("order", list(itertools.permutations(range(5))), ids=str)
def test_order_of_batches_does_not_matter(order):
    assert_keeps(adapted([PARTS[i] for i in order]), exact(X))


@pytest.mark.parametrize("size", [1, 7, 50, 103, 200])
def test_size_of_batches_does_not_matter(size):
    x = draw((103, 6), 0, 1e4, 1.0)
    assert_keeps(adapted(x[i : i + size] for i in range(0, 103, size)), exact(x))


def test_array_is_taken_in_parts_that_fit_together():
    x = draw((700, 1000), 0, 1e3, 1.0)  # six blocks, the last one smaller
    assert_keeps(adapted(x), exact(x))


class Batch(np.ndarray):
    """An array that can be referred to weakly."""


def test_only_one_batch_is_held_at_a_time():
    made, alive = [], []

    def data():
        for part in PARTS:
            batch = part.copy().view(Batch)
            made.append(weakref.ref(batch))
            alive.append(sum(ref() is not None for ref in made))
            yield batch

    adapted(data())
    # The next one is made while the last one has a name still.
    assert max(alive) <= 2


def test_samples_without_axis_are_numbers():
    assert_keeps(adapted(X[:, 0].tolist(), axis=None), exact(X[:, 0]))


def test_samples_of_a_built_layer_lack_the_batch_axis():
    x, layer = draw(SEQUENCE), FeatureScaling()
    layer.build((None, *SEQUENCE[1:]))
    layer.adapt(list(x))
    assert_keeps(layer, exact(x, (0, 1)))


def test_steps_count_batches():
    layer = FeatureScaling()
    layer.adapt(itertools.cycle(PARTS), steps=5)
    assert_keeps(layer, exact(X))


@pytest.mark.parametrize(("batch_size", "rows"), [(None, 64), (10, 20), (100, 103)])
def test_steps_of_an_array_have_the_batch_size(batch_size, rows):
    layer = FeatureScaling()
    layer.adapt(X, batch_size=batch_size, steps=2)
    assert_keeps(layer, exact(X[:rows]))


def test_batch_size_alone_changes_nothing():
    layer = FeatureScaling()
    layer.adapt(X, batch_size=10)
    assert_keeps(layer, exact(X))


# In time.


def test_adapt_starts_anew():
    layer = adapted(X + 100)
    layer.adapt(X)
    assert_keeps(layer, exact(X))


def test_update_adds_to_what_is_known():
    layer = adapted(PARTS[0])
    layer.update_state(PARTS[1])
    layer.update_state((PARTS[3], LABELS[3]))
    layer.update_state(PARTS[4].tolist())
    assert_keeps(layer, exact(X))


def test_update_alone_is_enough():
    layer = FeatureScaling()
    _ = [layer.update_state(part) for part in PARTS]
    assert_keeps(layer, exact(X))


def test_constant_stays_constant_over_updates():
    x, layer = np.full((10, 1), 0.1), FeatureScaling()
    _ = [layer.update_state(x) for _ in range(3)]
    assert np.array_equal(np.array(layer.stddev), [0.0])
    # A width of the rounding of 0.1 would make 1e8 of it.
    assert_close(call(layer, x.astype("float32")), [[0.0]] * 10, scale=0.1)


def test_many_small_updates_cost_no_digits():
    x, layer = draw((400, 2), 0, 1e3, 1.0), FeatureScaling("standard")
    _ = [layer.update_state(row[np.newaxis]) for row in x]
    assert_close(call(layer, x), formula("standard", x, exact(x)))


@each_mode
def test_reset_forgets(mode):
    layer = adapted(X, mode)
    layer.reset_state()
    assert np.array_equal(call(layer, X), X)
    layer.update_state(X)
    assert_keeps(layer, exact(X))


def test_reset_before_data_does_nothing():
    layer = FeatureScaling()
    layer.reset_state()
    assert not layer.built


def test_error_leaves_the_statistics():
    layer = adapted(X)
    with pytest.raises(ValueError, match="for which the layer was built"):
        layer.adapt([X + 100, X[:, :3]])
    assert_keeps(layer, exact(X))


# What is refused.

KIND = (
    "`data` must be an array of real numbers, or an iterable of batches of them. Received: "
    "data={!r}, dtype={!r}. From batches of another form, map out the array first."
)
SHAPE = "`data.shape` must be (None, 6), for which the layer was built. Received: data.shape={}."
WRONG_DATA = {
    "none": (None, TypeError, KIND.format("NoneType", None)),
    "text": ("x.csv", TypeError, KIND.format("str", None)),
    "dictionary": ({"a": X}, TypeError, KIND.format("dict", None)),
    "dictionaries": ([{"a": X}], TypeError, KIND.format("dict", None)),
    "words": (np.array([["a"], ["b"]]), TypeError, KIND.format("ndarray", "str32")),
    "complex": (np.array([[1j]]), TypeError, KIND.format("ndarray", "complex128")),
    "objects": (np.array([[None]]), TypeError, KIND.format("ndarray", "object")),
    "times": (
        np.array([["2020-01-01"]], "datetime64[s]"),
        TypeError,
        KIND.format("ndarray", "datetime64[s]"),
    ),
    "nothing": (
        [],
        ValueError,
        "`data` must be a data set of one batch or more. Received: data='list'.",
    ),
    "a-vector": (
        X[:, 0],
        ValueError,
        f"`axis` must be {PRESENT}. Received: axis=-1, input_shape=(103,).",
    ),
    "other-features": (
        [X, X[:, :3]],
        ValueError,
        SHAPE.format((103, 3)),
    ),
    "other-rank": (
        [X, X[None, None]],
        ValueError,
        SHAPE.format((1, 1, 103, 6)),
    ),
}


@pytest.mark.parametrize(("data", "error", "text"), WRONG_DATA.values(), ids=WRONG_DATA)
def test_data_are_refused(data, error, text):
    with pytest.raises(error, match=f"^{re.escape('FeatureScaling: ' + text)}$"):
        FeatureScaling().adapt(data)


@pytest.mark.parametrize("name", ["dictionaries", "words", "nothing", "a-vector"])
def test_layer_is_not_built_after_an_error(name):
    data, error, _ = WRONG_DATA[name]
    layer = FeatureScaling()
    with pytest.raises(error, match="must be"):
        layer.adapt(data)
    assert (layer.built, layer.weights) == (False, [])


COUNT = "`{0}` must be None, or a positive integer. Received: {0}={1!r}."
WRONG_COUNTS = {
    "no-steps": ({"steps": 0}, ValueError, COUNT.format("steps", 0)),
    "half-a-step": ({"steps": 0.5}, TypeError, COUNT.format("steps", 0.5)),
    "negative-batch": ({"batch_size": -1}, ValueError, COUNT.format("batch_size", -1)),
    "batch-of-batches": (
        {"batch_size": 8},
        ValueError,
        "`batch_size` must be None for data that come in batches. Received: batch_size=8.",
    ),
}


@pytest.mark.parametrize(("options", "error", "text"), WRONG_COUNTS.values(), ids=WRONG_COUNTS)
def test_counts_are_refused(options, error, text):
    with pytest.raises(error, match=f"^{re.escape('FeatureScaling: ' + text)}$"):
        FeatureScaling().adapt(PARTS, **options)
