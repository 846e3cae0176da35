"""How much moving statistics stand for, where that is counted."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bn.core import native
from keras_bn.core.estimators import counted_momentum, settled_count
from keras_bn.layers.kept import kept_variable
from keras_bn.types import Shape, Tensor


class MovingCount(keras.layers.Layer):
    """The sum of the weights in a moving average, one for each channel.

    It is a part with a place of its own in files, so that those of a layer that counts serve one
    that does not, of this package or of Keras, and the other way round.

    Args:
        name: Name of the part and of its weight.
        shape: Shape of the statistics.
        momentum: By which the count fades at each step; None for a cumulative average.
        dtype: Dtype of the statistics.
        synchronized: Whether all replicas have the same count.
    """

    def __init__(
        self, name: str, shape: Shape, momentum: float | None, dtype: str, synchronized: bool
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.momentum = momentum
        # Elements add up; weights that fade are as many on one replica as on another.
        aggregation = "sum" if momentum is None else "mean"
        aggregated = None if synchronized else aggregation
        self.count = kept_variable(self, name, shape, "zeros", dtype, aggregated)
        self.built = True

    @property
    def settled(self) -> Any:
        """What the count is for statistics that came without one."""
        return np.full(self.count.shape, settled_count(self.momentum), self.count.dtype)

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Load from a file; one without a count is from a layer that does not count."""
        super().load_own_variables(store if len(store.keys()) else {"0": self.settled})

    def add(self, new: Tensor, known: Tensor) -> Tensor:
        """Count a batch where it is known.

        Args:
            new: Its number of elements, in the shape of the statistics; a moving average with
                momentum counts it as 1.
            known: Whether its moments may be kept.

        Returns:
            The share of the old statistics in the new ones.
        """
        old = ops.convert_to_tensor(self.count)
        new = ops.ones_like(old) if self.momentum is not None else ops.cast(new, old.dtype)
        total, momentum = counted_momentum(old, new, self.momentum)
        self.count.assign(native.where(known, total, old))
        return momentum
