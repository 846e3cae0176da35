"""Scaling of input features."""

import functools
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.backend import standardize_dtype

from keras_bn import kernels
from keras_bn.core.affine import Affine, invert, rescale
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.core.streaming import UNKNOWN, Stored, Summary, three_parts
from keras_bn.layers.base import Normalization
from keras_bn.layers.data_sources import batches, blocks, features, is_array, numbers
from keras_bn.layers.options import checked
from keras_bn.types import Shape, Tensor


class FeatureScaling(Normalization):
    """Scale each feature of the input by statistics of a whole data set.

    With the statistics that `adapt` takes in one pass, batch by batch,

        y = (x - mean) / √variance                  mode "standard": mean 0, deviation 1
        y = (x - minimum) / (maximum - minimum)     mode "min_max": from 0 to 1
        y = (x - mean) / (maximum - minimum)        mode "mean": mean 0, range 1

    in training and inference alike. A constant feature is divided by 1, so it becomes 0. A NaN
    counts as missing and stays NaN. An infinity counts as missing too, as does a number that is
    too large for the statistics (above 1.7e38; 1e150 under a float64 policy); infinities stay
    infinite. A feature of which nothing is known, and any feature before the first `adapt`, is
    left as it is.

    Pools: the data set, as one set whatever its batches are and in whatever order they come.
    Keeps: mean, standard deviation, minimum, maximum and count of each feature, for all three
        modes. They are weights, saved with the model; none is trained. float32 alone has steps of
        64 at a mean of 1e9: what it rounds off is kept in one more weight, `offsets`.

    Args:
        mode: `"standard"`, `"min_max"` or `"mean"`.
        axis: The axis of the features, or a tuple of those that are kept; None to scale all
            elements alike.
        inverse: Whether to go back from y to x. The statistics are those of x: `adapt` to the same
            data, or take over the weights of the other layer.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: Any rank from 2, of any real dtype, the sizes of the kept axes known; with
            `axis=None` any rank. int32 and int64 are used to their last digit, and so is float64
            where the backend has it.
        mask: Goes on to the next layer. It changes nothing, as each element is scaled by itself.

    Shapes:
        Input and output the same. The statistics have the shape of the kept axes; `offsets` has
        two more axes before these, of size 2 and 5.

    Raises:
        ValueError: An option out of range; in `build`, an axis that the input lacks, or a kept
            axis of unknown size; in `adapt`, no data, or data of another shape.
        TypeError: An option of the wrong kind; in `adapt`, data that are not real numbers.

    Example:
        >>> import numpy as np, keras, keras_bn
        >>> x = np.array([[1.0, 200.0], [2.0, 400.0], [4.0, 300.0]], "float32")
        >>> layer = keras_bn.FeatureScaling("min_max")
        >>> layer.adapt(x)
        >>> expected = (x - x.min(0)) / (x.max(0) - x.min(0))
        >>> np.allclose(keras.ops.convert_to_numpy(layer(x)), expected, atol=1e-6)
        True
        >>> layer = keras_bn.FeatureScaling("standard")
        >>> layer.adapt([(x[:2], "labels"), (x[2:], "labels")])  # any iterable of batches
        >>> expected = (x - x.mean(0)) / x.std(0)
        >>> np.allclose(keras.ops.convert_to_numpy(layer(x)), expected, atol=1e-6)
        True
        >>> back = keras_bn.FeatureScaling("standard", inverse=True)
        >>> back.adapt(x)
        >>> np.allclose(keras.ops.convert_to_numpy(back(layer(x))), x, atol=1e-4)
        True

    Differences:
        To Keras' Normalization: three modes; `inverse` for `invert`; statistics are exact over any
        number of batches, and may be continued by `update_state`; NaN is missing; a constant
        feature is divided by 1, not by 1e-7; statistics that are known already are not options, but
        assigned to the weights of a built layer. To scikit-learn's StandardScaler and MinMaxScaler:
        the same numbers, on any rank, for data larger than memory, inside the model.

    References:
        LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998, section 4.3,
        http://yann.lecun.com/exdb/publis/pdf/lecun-98b.pdf.
        Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", 1979, equations 2.1a and 2.1b,
        http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf.
    """

    # Nothing is learned: no gamma, no beta.
    center = scale = False

    def __init__(
        self,
        mode: str = "standard",
        axis: int | Iterable[int] | None = -1,
        inverse: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(locals(), **kwargs)

    def build(self, input_shape: Shape) -> None:
        """Create the statistics, of which nothing is known yet."""
        super().build(input_shape)
        if not self._kept:
            self.input_spec = None
        for name, value in UNKNOWN._asdict().items():
            setattr(self, name, self._add_statistic(name, self._parameter_shape, value))
        rows = (2, len(UNKNOWN), *self._parameter_shape)
        self.offsets = self._add_statistic("offsets", rows, 0.0)

    def __call__(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the scaled input, also in a `tf.data` pipeline beside another backend."""
        if not kernels.is_foreign(inputs):
            return super().__call__(inputs, *args, **kwargs)
        shape = tuple(inputs.shape)
        self._build_for(shape)
        parts = self._affine(len(shape), standardize_dtype(self.mean.dtype))
        # Such a pipeline runs on the processor, which has float64.
        affine = Affine(*(ops.convert_to_numpy(part).astype("float64") for part in parts))
        return kernels.apply_foreign(inputs, affine, self.compute_dtype)

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the scaled input."""
        x, _ = self._prepared(inputs, None)
        affine = self._affine(len(x.shape), self._statistics_dtype(x))
        given = standardize_dtype(inputs.dtype)
        if given in ("int32", "int64"):
            # float32 holds integers up to 2^24. What it loses of a larger one, such as a time in
            # seconds, comes back after the center is subtracted.
            lost = ops.cast(inputs - ops.cast(x, given), x.dtype)
            x = (x - affine.center) + lost
            affine = affine._replace(center=ops.zeros_like(affine.center))
        return kernels.apply(x, affine, self.compute_dtype)

    def adapt(self, data: Any, batch_size: int | None = None, steps: int | None = None) -> None:
        """Take the statistics of a data set, in place of those known before.

        The memory of one batch is enough, and an error leaves the statistics as they were.

        Args:
            data: An array, a tensor of any backend, a data frame; or what yields batches, or
                single samples: a `tf.data.Dataset`, a `torch.utils.data.DataLoader`, a
                `keras.utils.PyDataset`, a generator, a list. Where the data or a batch is (x, y)
                or (x, y, weights), x is taken, and the weights do not count.
            batch_size: How many rows of an array make a step. Default 32, as in `fit`.
            steps: How many batches to take [steps], of data without end for example. Default all.
        """
        name = type(self).__name__
        batch_size = checked(name, "batch_size", batch_size)
        steps = checked(name, "steps", steps)
        rank = None if self.axis is None else len(self._broadcast) if self.built else 2
        summaries = map(self._summary, batches(name, data, rank, batch_size, steps))
        found = next(summaries, None)
        if found is None:
            raise self._invalid("data", "a data set of one batch or more", type(data).__name__)
        self._assign(functools.reduce(Summary.merge, summaries, found).stored())

    def update_state(self, data: Any) -> None:
        """Add one more batch to the statistics.

        Args:
            data: An array of the input's rank; or (x, y) or (x, y, weights), of which x is taken.
        """
        batch = features(data)
        found = self._summary(batch if is_array(batch) else numbers(type(self).__name__, batch))
        self._assign(self._known().merge(found).stored())

    def reset_state(self) -> None:
        """Forget the statistics."""
        if self.built:
            self._assign(UNKNOWN)

    @property
    def variance(self) -> Tensor:
        """The biased variance of each feature [x²]."""
        return ops.square(self.stddev)

    def _kept_axes(self, input_shape: Shape) -> tuple[int, ...]:
        return () if self.axis is None else super()._kept_axes(input_shape)

    def _add_statistic(self, name: str, shape: Shape, value: float) -> Any:
        return self.add_weight(
            shape=shape,
            name=name,
            initializer=keras.initializers.Constant(value),
            dtype=statistics_dtype(self.variable_dtype),
            trainable=False,
            autocast=False,
        )

    def _affine(self, rank: int, dtype: str) -> Affine:
        """Return the map of the mode, for an input of a rank."""
        shape = self._broadcast if self._kept else (1,) * rank

        def parts(name: str) -> list[Tensor]:
            # The second offset, below 2^-48 of the statistic, changes no output.
            both = getattr(self, name), self.offsets[0][UNKNOWN._fields.index(name)]
            return [ops.reshape(ops.cast(part, dtype), shape) for part in both]

        if self.mode == "standard":
            width = sum(parts("stddev"))
        else:
            (high, high_offset), (low, low_offset) = parts("maximum"), parts("minimum")
            width = (high - low) + (high_offset - low_offset)
        pivot, offset = parts("minimum" if self.mode == "min_max" else "mean")
        affine = rescale(pivot, offset, width)
        return invert(affine) if self.inverse else affine

    def _summary(self, batch: Any) -> Summary:
        """Return the statistics of a batch, from which the layer is built if it is not yet."""
        name, shape = type(self).__name__, tuple(batch.shape)
        # What is not numbers is refused before anything is built.
        numbers(name, batch[:0] if shape else batch)
        self._build_for(shape)
        # Half of what the weights hold, so that the range is finite too; in float64, squares must
        # be finite.
        largest = min(float(np.finfo(standardize_dtype(self.mean.dtype)).max) / 2, 1e150)
        parts = (
            Summary.of(block, self._kept_axes(block.shape), largest)
            for block in blocks(name, batch, self._kept)
        )
        return functools.reduce(Summary.merge, parts)

    def _build_for(self, shape: Shape) -> None:
        """Build the layer for data of a shape, or check that the shape is as it was built for."""
        if not self.built:
            self.build((None, *shape[1:]) if shape and 0 not in self._kept_axes(shape) else shape)
        if not self._kept:
            return
        wanted = tuple(size if a in self._kept else None for a, size in enumerate(self._broadcast))
        fits = len(shape) == len(wanted)
        if not fits or any(shape[axis] not in (None, wanted[axis]) for axis in self._kept):
            raise self._invalid("data.shape", f"{wanted}, for which the layer was built", shape)

    def _known(self) -> Summary:
        offsets = ops.convert_to_numpy(self.offsets).astype("float64").sum(0)
        highs = (ops.convert_to_numpy(getattr(self, name)) for name in UNKNOWN._fields)
        return Summary.of_stored(Stored(*(a + b for a, b in zip(highs, offsets, strict=True))))

    def _assign(self, stored: Stored) -> None:
        dtype = standardize_dtype(self.mean.dtype)
        whole = (np.broadcast_to(value, self.mean.shape) for value in stored)
        highs, *offsets = zip(*(three_parts(value, dtype) for value in whole), strict=True)
        for name, high in zip(UNKNOWN._fields, highs, strict=True):
            getattr(self, name).assign(high)
        self.offsets.assign(np.stack(offsets))
