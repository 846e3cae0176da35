"""Replicas in TensorFlow: those of `tf.distribute`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf

from keras_bn.core.moments import Moments, merge_replicas
from keras_bn.types import Tensor


def across(layer: str, axis_name: str | None, group: Any) -> Callable[[Moments], Moments] | None:
    """Return what merges moments over the replicas; see `keras_bn.kernels.active`."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None

    def total(values: Tensor) -> Tensor:
        # It brings its own gradient. A copy: it refuses what a variable is read as.
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(values))

    return partial(merge_replicas, total=total)
