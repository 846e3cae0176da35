"""What batch normalization and renormalization share: statistics that are kept between steps."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_bn import kernels
from keras_bn.core import native
from keras_bn.core.affine import Affine, compose
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.core.estimators import Average, Correction, moving_average
from keras_bn.core.moments import Moments, is_known, is_static, merge
from keras_bn.core.pooling import Ghosts, Pooling, ghosts_of, reduced_axes
from keras_bn.layers.base import Normalization
from keras_bn.layers.kept import kept_variable
from keras_bn.layers.moving_count import MovingCount
from keras_bn.types import Shape, Tensor


class BatchStatistics(Normalization):
    """A layer that normalizes by the batch in training, and by moving statistics otherwise.

    Attributes:
        process_group: The processes over which `synchronized` takes statistics, a group of
            `torch.distributed`; None for all. A handle of this run: not in config or files.
    """

    process_group: Any = None

    def build(self, input_shape: Shape) -> None:
        """Create gamma, beta, moving mean and moving variance, and a count where one is needed."""
        if self.virtual_batch_size is not None and 0 in self._kept_axes(input_shape):
            raise self._invalid(
                "axis",
                "other than 0, the batch's, where `virtual_batch_size` splits it",
                self.axis,
                virtual_batch_size=self.virtual_batch_size,
                input_shape=input_shape,
            )
        super().build(input_shape)
        self.moving_mean = self._add_statistic("moving_mean", self.moving_mean_initializer)
        self.moving_variance = self._add_statistic(
            "moving_variance", self.moving_variance_initializer
        )
        is_counted = self.debias or self.momentum is None
        self.moving_count = self._add_count("moving_count", self.momentum) if is_counted else None
        self.renorm_count: MovingCount | None = None
        self.step: Any = None
        self._has_warned = False

    def call(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the normalized input; in training, update what is kept."""
        x, weights = self._prepared(inputs, mask)
        if not (training and self.trainable):
            stored = self._stored(self._statistics_dtype(x))
            return kernels.apply(x, stored, self.compute_dtype)
        axes = reduced_axes(len(x.shape), self._kept)
        ghosts, across = self._ghosts(x), self._across()
        # A size that is not known, None, may be 0.
        may_be_empty = weights is not None or not all(x.shape)
        kept = self._kept_moments(self._statistics_dtype(x)) if may_be_empty else None
        if ghosts is not None:
            y, batch = self._normalized_ghosts(x, ghosts, Pooling(axes, weights), kept)
            batch = batch if across is None else across(batch)
        else:
            y, batch = self._normalized_set(x, Pooling(axes, weights, across=across), kept)
        self._update(batch)
        return y

    def set_weights(self, weights: list[Any]) -> None:
        """Set the weights, those of a layer that counts more or less than this one too.

        A step that is missing becomes 0, a count that of settled statistics; what this layer does
        not count is left out.
        """
        optional = self._optional_weights()
        number = len(self.weights) - len(optional)
        given = weights[number:]
        if len(weights) < number or not self._are_optional(given):
            super().set_weights(weights)  # which says what is wrong
            return
        steps = iter([value for value in given if not value.shape])
        counts = iter([value for value in given if value.shape])
        filled = [next(counts if value.shape else steps, value) for value in optional]
        super().set_weights([*weights[:number], *filled])

    def _optional_weights(self) -> list[Any]:
        """Return what a step and the counts are in weights that lack them."""
        steps = [] if self.step is None else [np.int32(0)]
        counts = (self.moving_count, self.renorm_count)
        return steps + [count.settled for count in counts if count is not None]

    def _are_optional(self, weights: list[Any]) -> bool:
        """Say whether these may be a step and counts, of this layer or of another."""
        shapes = [tuple(value.shape) for value in weights]
        counts = len(shapes) - shapes.count(())
        return set(shapes) <= {(), self._parameter_shape} and shapes.count(()) < 2 and counts < 3

    def _across(self) -> Callable[[Moments], Moments] | None:
        """Return what merges moments over the replicas; None where there is nothing to merge."""
        if not self.synchronized:
            return None
        return kernels.across(type(self).__name__, self.axis_name, self.process_group)

    def _ghosts(self, x: Tensor) -> Ghosts | None:
        """Return how the batch is split; None where it is not."""
        size, samples = self.virtual_batch_size, x.shape[0]
        is_whole = size is None or (samples is not None and samples <= size)
        return None if is_whole else ghosts_of(x, size)

    def _normalized_set(
        self,
        x: Tensor,
        pooling: Pooling,
        kept: Moments | None,
        view: Any = None,
        merges: bool = False,
    ) -> tuple[Tensor, Moments]:
        """Return the corrected output and the moments of what is pooled, as `kernels.normalize`."""
        dtype = self._statistics_dtype(x)
        learned = self._learned(dtype, view)
        correct: Any = self._corrector(dtype)  # for mypy, a tuple cannot be called
        y, moments = kernels.normalize(
            x, pooling, learned, self.epsilon, self.compute_dtype, correct, kept, merges
        )
        self._warn_of_one_element(moments.count // x.shape[1] if merges else moments.count)
        return y, moments

    def _normalized_ghosts(
        self, x: Tensor, ghosts: Ghosts, pooling: Pooling, kept: Moments | None
    ) -> tuple[Tensor, Moments]:
        """Return the output, each ghost normalized on its own, and the moments of all together."""
        axes, weights = pooling.axes, pooling.weights
        if len(axes) > 1 and not (ghosts.are_full and weights is None):
            # The input is not split, which would copy it to fill up the last of the ghosts: what
            # is summed over the samples of a ghost are cells, tiny beside it.
            size = ghosts.size if ghosts.are_full else None
            pooling = Pooling(axes[1:], weights, ghosts.total, size)
            y, cells = self._normalized_set(x, pooling, kept)
            each = Moments(*(p if is_static(p) else p[: ghosts.number] for p in cells))
        else:
            x, pooling = self._split(x, ghosts, pooling)
            # Where each ghost is known to have as many elements, the kernel merges them.
            sizes = [x.shape[axis] for axis in pooling.axes]
            merges = pooling.weights is None and all(isinstance(size, int) for size in sizes)
            y, sets = self._normalized_set(
                x, pooling, kept, lambda part: kernels.for_each(part, ghosts.number), merges
            )
            each = Moments(*(p if is_static(p) else p[0] for p in sets))
            y = ghosts.join(y)
            if merges:
                return y, each
        return y, merge(each, lambda array: ops.sum(array, axis=0, keepdims=True))

    def _split(self, x: Tensor, ghosts: Ghosts, pooling: Pooling) -> tuple[Tensor, Pooling]:
        """Return an input with an axis of its own for the ghosts.

        One without space is split in any case: its cells would be as large as itself.
        """
        axes, weights = (0, *(axis + 1 for axis in pooling.axes[1:])), pooling.weights
        if weights is None and ghosts.are_full:
            return ghosts.split(x), Pooling(axes)
        if weights is None:
            weights = ops.ones((1,) * len(x.shape), self._statistics_dtype(x))
        weights = ops.broadcast_to(weights, (ghosts.samples, *ops.shape(weights)[1:]))
        return ghosts.split(x), Pooling(axes, ghosts.split(weights))

    def _corrector(self, dtype: str) -> Correction | None:
        """Return what gives r and d, by which a training batch is corrected; None for 1 and 0.

        Variables are read here, not by what is returned, which is part of a differentiable step.
        """
        return None

    def _update(self, batch: Moments) -> None:
        """Update what is kept from the moments of the batch, where these may be kept."""
        raise NotImplementedError

    def _add_statistic(self, name: str, initializer: Any) -> Any:
        dtype = statistics_dtype(self.variable_dtype)
        return self._add_kept(name, self._parameter_shape, initializer, dtype, "mean")

    def _add_count(self, name: str, momentum: float | None) -> MovingCount:
        dtype = statistics_dtype(self.variable_dtype)
        return MovingCount(name, self._parameter_shape, momentum, dtype, self.synchronized)

    def _add_step(self) -> Any:
        # No mean: it must stay a whole number.
        return self._add_kept("step", (), "zeros", "int32", "only_first_replica")

    def _add_kept(
        self, name: str, shape: Shape, initializer: Any, dtype: str, aggregation: str
    ) -> Any:
        return kept_variable(
            self, name, shape, initializer, dtype, None if self.synchronized else aggregation
        )

    def _stored(self, dtype: str) -> Affine:
        """Return the map of inference."""
        mean, variance = self._moving(dtype)
        mean = native.snapshot(mean)  # it is saved for the gradient
        affine = Affine(mean, native.reciprocal(self._stddev(variance)), None)
        center, scale, shift = compose(affine, *self._learned(dtype))
        return Affine(center, scale, ops.zeros_like(scale) if shift is None else shift)

    def _kept_moments(self, dtype: str) -> Moments:
        """Return the moving statistics as the moments of one element, to go with the input."""
        mean, variance = self._moving(dtype)
        return Moments(1, native.snapshot(mean), ops.zeros_like(mean), variance)

    def _moving(self, dtype: str) -> tuple[Tensor, Tensor]:
        """Return moving mean and moving variance, to go with the input."""
        return self._spread(self.moving_mean, dtype), self._spread(self.moving_variance, dtype)

    def _stddev(self, variance: Tensor) -> Tensor:
        return native.sqrt(variance + self.epsilon)

    def _spread_count(self, count: MovingCount | None, dtype: str) -> Tensor | None:
        return None if count is None else self._spread(count.count, dtype)

    def _variance_to_keep(self, moments: Moments) -> Tensor:
        """Return what a moving variance takes up."""
        return moments.unbiased_variance if self.unbiased else moments.variance

    def _average(self, batch: Moments, epsilon: float | None = None) -> Any:
        """Move the moving mean and variance towards those of a batch.

        Args:
            batch: Its moments.
            epsilon: As for `Average`.

        Returns:
            For each, or of all in one, whether they were known and so were moved.
        """
        momentum: Any = self.momentum
        if self.moving_count is not None:
            batch = batch.reshaped(self._parameter_shape)
            momentum = self._share(self.moving_count, momentum, batch, is_known(batch))
        average = Average(momentum, self.unbiased, epsilon)
        mean, variance = native.value_of(self.moving_mean), native.value_of(self.moving_variance)
        mean, variance, known = kernels.moved(mean, variance, batch, average)
        self.moving_mean.assign(mean)
        self.moving_variance.assign(variance)
        return known

    def _share(
        self, count: MovingCount | None, momentum: Any, batch: Moments, known: Tensor
    ) -> Any:
        """Return the share of the old statistics in the new ones, and count the batch."""
        if count is None:
            return momentum
        return count.add(batch.count * ops.ones_like(batch.pivot), known)

    def _move(self, variable: Any, new: Tensor, momentum: Any, known: Tensor) -> None:
        """Move a kept statistic towards its new value, where that is known.

        Args:
            variable: The statistic.
            new: What the batch has in its place.
            momentum: The share of the old value, one for all or in the shape of the statistic.
            known: Whether the batch's moments may be kept.
        """
        old = native.value_of(variable)
        moved = moving_average(old, native.cast(new, old.dtype), momentum)
        variable.assign(native.where(known, moved, old))

    def _count_step(self, known: Any) -> None:
        """Count a training step, unless nothing of it was known."""
        if not isinstance(known, bool):
            known = native.cast(native.reduce_any(known), "int32")
        self.step.assign(native.cast(self.step, "int32") + known)

    def _warn_of_one_element(self, count: Tensor) -> None:
        is_one = is_static(count) and count == 1
        if is_one and not self._has_warned and not kernels.is_compiling():
            self._has_warned = True
            warnings.warn(
                f"{type(self).__name__} '{self.name}' trains on one element per channel: its "
                "variance is 0 and its output is beta. Use larger batches, or GroupNormalization.",
                stacklevel=2,
            )
