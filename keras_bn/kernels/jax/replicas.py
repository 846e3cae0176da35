"""Replicas in JAX: those along a mapped axis.

Under `keras.distribution` arrays are whole, whatever device holds their parts: a sum is over all
replicas already, and there is nothing to merge.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from keras_bn.core.moments import Moments, merge_replicas
from keras_bn.errors import invalid
from keras_bn.types import Tensor


def across(layer: str, axis_name: str | None, group: Any) -> Callable[[Moments], Moments] | None:
    """Return what merges moments over the replicas; see `keras_bn.kernels.active`."""
    if not _is_mapped(axis_name):
        mapped = jax.sharding.get_abstract_mesh().manual_axes
        if mapped:
            raise invalid(layer, "axis_name", f"among the mapped axes {mapped}", axis_name)
        return None

    def total(values: Tensor) -> Tensor:
        # Never inside a derivative by hand: shard_map would count it twice.
        return jax.lax.psum(values, axis_name)

    return partial(merge_replicas, total=total)


def _is_mapped(axis_name: str | None) -> bool:
    if axis_name is None:
        return False
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        return False
    return True
