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
    replicas = _size(axis_name)
    if replicas is None:
        _require_no_map(layer, axis_name)
        return None

    def total(values: Tensor) -> Tensor:
        # Never inside a derivative by hand: shard_map would count it twice.
        return jax.lax.psum(values, axis_name)

    if replicas == 1:
        # As they are. The sum, of one, is for shard_map (check_vma=True): after it what is kept
        # counts as the same on all replicas. (jax 0.10.2: what needs it is nowhere to be read.)
        return lambda own: Moments(*map(total, own))
    return partial(merge_replicas, total=total)


def _size(axis_name: str | None) -> int | None:
    """Return the number of replicas along a mapped axis; None where it is not mapped."""
    if axis_name is None:
        return None
    try:
        return int(jax.lax.axis_size(axis_name))
    except NameError:
        return None


def _require_no_map(layer: str, axis_name: str | None) -> None:
    """Refuse to go on with the statistics of one shard alone."""
    # jax 0.10.2: of shard_map and pmap; what vmap maps is known by its name only.
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    if mapped:
        raise invalid(
            layer,
            "axis_name",
            "the name of a mapped axis",
            axis_name,
            "Give the layer the name that shard_map or pmap has for the axis of replicas.",
            mapped_axes=mapped,
        )
