"""Replicas in TensorFlow: those of `tf.distribute`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_bn.core.moments import Moments, merge_replicas
from keras_bn.types import Tensor


def across(layer: str, axis_name: str | None, group: Any) -> Callable[[Moments], Moments] | None:
    """Return what merges moments over the replicas; see `keras_bn.kernels.active`."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1 or _is_inferring_shapes():
        return None

    def total(values: Tensor) -> Tensor:
        # It brings its own gradient. A copy: it refuses what a variable is read as.
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(values))

    return partial(merge_replicas, total=total)


def _is_inferring_shapes() -> bool:
    # Keras does so in a graph that never runs, within a replica too, where a model is first called
    # there. Keras 3.15.1 has no function that says so; a new scope knows the one it stands in.
    with keras.SymbolicScope() as scope:
        return scope.original_scope is not None
