"""Layers on a mapped axis of JAX: their results on shards, and what is summed for them.

python tests/distributed/jax_maps.py

As a program, on virtual devices: prints the errors of each layer, way and pair of shards as JSON.
"""

import functools
import json
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tests.distributed.shards import LAYERS, PAIRS, SPACE, Shards, built, errors
from tests.oracle import Arrays

AXIS = "replicas"
SYNCHRONIZED = {"synchronized": True, "axis_name": AXIS}
REPLICAS = 2
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()
FILLED = 7  # samples per replica where shards are not equal: JAX maps equal ones


@dataclass(frozen=True)
class Way:
    """How a layer is mapped, and where its gradient is taken.

    Attributes:
        map: "shard_map", "pmap" or "vmap".
        is_inside: Whether the gradient is taken inside the mapped function.
        is_checked: `check_vma` of `shard_map`: whether JAX follows what is the same everywhere.
    """

    map: str
    is_inside: bool
    is_checked: bool = False

    @property
    def name(self) -> str:
        """The name in tables."""
        checked = " checked" if self.is_checked else ""
        return f"{self.map}{checked}, gradient {'inside' if self.is_inside else 'outside'}"

    @property
    def sums_gradients(self) -> bool:
        """Whether gamma and beta get the gradient of all replicas, not each its own."""
        return self.is_checked or not self.is_inside

    def over(self, f: Any) -> Any:
        """Map f(split, whole) -> (split, one for each replica), without an axis of replicas."""
        if self.map == "shard_map":
            out = SPLIT, WHOLE if self.is_checked else SPLIT
            mesh = Mesh(np.array(jax.devices()[:REPLICAS]), (AXIS,))
            mapped = f if self.is_checked else lambda *args: _stacked(*f(*args))
            return jax.shard_map(
                mapped, mesh=mesh, in_specs=(SPLIT, WHOLE), out_specs=out, check_vma=self.is_checked
            )
        each = getattr(jax, self.map)(f, axis_name=AXIS, in_axes=(0, None))

        def mapped(split: Any, whole: Any) -> Any:
            found, own = each(jax.tree.map(_apart, split), whole)
            return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found), own

        return mapped


VMAP = [Way("vmap", True), Way("vmap", False)]
# On devices.
WAYS = [Way("shard_map", inside, checked) for inside in (True, False) for checked in (True, False)]
WAYS += [Way("pmap", True), Way("pmap", False)]


def _apart(array: Any) -> Any:
    return array.reshape(REPLICAS, -1, *array.shape[1:])


def _stacked(split: Any, own: Any) -> Any:
    return split, jax.tree.map(lambda a: a[None], own)


def forward(layer: Any, x: Any, trainable: Any, mask: Any = None) -> Any:
    """Return the output in training and the non-trainable variables after it."""
    fixed = [v.value for v in layer.non_trainable_variables]
    return layer.stateless_call(trainable, fixed, x, training=True, mask=mask)


def values(layer: Any) -> list[Any]:
    """Return gamma and beta."""
    return [v.value for v in layer.trainable_variables]


@functools.cache
def step(way: Way, kind: str, options: tuple[tuple[str, Any], ...]) -> Any:
    """Return a jitted function of ({x, dy, mask}, trainable): (y, dx) and the gradients and state.

    Gradients and state have an axis of replicas, but where shard_map knows that all have the same.
    """
    layer = built(kind, **dict(options))

    def inside(split: Any, trainable: Any) -> Any:
        y, pull, state = _vjp(lambda x, t: forward(layer, x, t, split.get("mask")))(
            split["x"], trainable
        )
        dx, gradients = pull(split["dy"])
        return (y, dx), (gradients, state)

    def outside(split: Any, trainable: Any) -> Any:
        each = way.over(lambda part, t: forward(layer, part["x"], t, part.get("mask")))
        masks = {key: split[key] for key in ("mask",) if key in split}
        y, pull, state = _vjp(lambda x, t: each({"x": x, **masks}, t))(split["x"], trainable)
        dx, gradients = pull(split["dy"])
        return (y, dx), (gradients, state)

    return jax.jit(way.over(inside) if way.is_inside else outside)


def _vjp(f: Any) -> Any:
    return functools.partial(jax.vjp, f, has_aux=True)


def filled(shards: Shards) -> dict[str, np.ndarray]:
    """Return x, dy and mask with shards of equal sizes; what fills them up is masked NaN."""
    split = {"x": shards.x, "dy": shards.dy}
    if len(set(shards.sizes)) == 1 and not shards.is_masked:
        return split
    everywhere = np.ones((sum(shards.sizes), *SPACE[:-1]), bool)
    split["mask"] = shards.mask if shards.is_masked else everywhere
    filling = {"x": np.nan, "dy": 0, "mask": False}
    return {key: _filled(shards.cut(array), filling[key]) for key, array in split.items()}


def _filled(parts: list[np.ndarray], value: Any) -> np.ndarray:
    padding = [np.full((FILLED - len(p), *p.shape[1:]), value, p.dtype) for p in parts]
    return np.concatenate([np.concatenate(pair) for pair in zip(parts, padding, strict=True)])


def found_errors(way: Way, kind: str, shards: Shards, **options: Any) -> dict[str, float]:
    """Return the errors of a layer whose batch is mapped, as `shards.errors`."""
    layer = built(kind, **options)
    split = filled(shards)
    (y, dx), (gradients, state) = step(way, kind, tuple(options.items()))(split, values(layer))
    size = len(y) // REPLICAS
    real = np.concatenate([np.arange(size) < n for n in shards.sizes])
    unmoved = _named(layer.trainable_variables, values(layer))
    states = _each(layer.non_trainable_variables, state, not way.is_checked)
    return errors(
        shards,
        kind,
        [np.asarray(y)[real]],
        [np.asarray(dx)[real]],
        _each(layer.trainable_variables, gradients, not way.sums_gradients),
        [unmoved | state for state in states],
    )


def _named(variables: Any, arrays: Any) -> Arrays:
    return {v.name: np.asarray(a) for v, a in zip(variables, arrays, strict=True)}


def _each(variables: Any, arrays: Any, is_stacked: bool) -> list[Arrays]:
    """Return the arrays by name, of each replica."""
    if not is_stacked:
        return [_named(variables, arrays)]
    return [_named(variables, [array[i] for array in arrays]) for i in range(REPLICAS)]


def cases(ways: list[Way]) -> dict[str, tuple[Way, str, Shards]]:
    """Return each way with each layer and each pair of shards.

    Renormalization has nothing of its own in the gradient of a map that is not checked.
    """
    return {
        f"{kind}, {way.name}, {pair}": (way, kind, shards)
        for way in ways
        for kind in LAYERS
        if kind == "batch" or way.is_inside or way.is_checked
        for pair, shards in PAIRS.items()
    }


def slopes(way: Way, kind: str) -> tuple[float, float]:
    """Return the slope of sum(dy·y) along one direction, in forward and in reverse mode."""
    layer, shards = built(kind, **SYNCHRONIZED), PAIRS["equal"]
    over = way.over(lambda x, trainable: forward(layer, x, trainable))

    def y(x: Any, trainable: Any) -> Any:
        return over(x, trainable)[0]

    @jax.jit
    def both(inputs: Any, dy: Any) -> Any:
        along = jax.tree.map(jax.numpy.cos, inputs)
        _, tangent = jax.jvp(y, inputs, along)
        _, pull = jax.vjp(y, *inputs)
        return jax.numpy.vdot(dy, tangent), jax.tree.map(jax.numpy.vdot, pull(dy), along)

    ahead, back = both((shards.x, values(layer)), shards.dy)
    return float(ahead), float(sum(jax.tree.leaves(back)))


def planted_errors(way: Way) -> dict[str, float]:
    """Return the errors with the sum over replicas inside a derivative by hand."""
    psum = jax.lax.psum
    total = jax.custom_vjp(lambda values: psum(values, AXIS))
    total.defvjp(
        lambda values: (psum(values, AXIS), None),
        # jax 0.10.2 refuses the sum itself, which is the same on all replicas, where values vary.
        lambda _, dy: (jax.lax.pcast(psum(dy, AXIS), AXIS, to="varying"),),
    )
    step.cache_clear()
    with mock.patch.object(jax.lax, "psum", lambda values, _: total(values)):
        found = found_errors(way, "batch", PAIRS["equal"], **SYNCHRONIZED)
    step.cache_clear()
    return found


def main() -> None:
    """Print the errors of all cases on devices, slopes, and the errors with a fault."""
    found = {name: found_errors(*case, **SYNCHRONIZED) for name, case in cases(WAYS).items()}
    slope = {way.name: slopes(way, "batch") for way in WAYS if not way.is_inside}
    planted = planted_errors(WAYS[0])
    sys.stdout.write(json.dumps({"errors": found, "slopes": slope, "planted": planted}))


if __name__ == "__main__":
    main()
