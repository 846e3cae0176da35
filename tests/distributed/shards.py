"""Batches cut into the shards of replicas, and what all shards together must give in float64."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

import keras_bn
from keras_bn.core.dtypes import UNIT_ROUNDOFF
from tests.oracle import Arrays, expected, weights_by_name

SPACE = (3, 2, 5)

LAYERS = {
    "batch": keras_bn.BatchNormalization,
    "renorm": lambda **options: keras_bn.BatchRenormalization(
        rmax_steps=None, dmax_steps=None, **options
    ),
}


@dataclass(frozen=True)
class Shards:
    """A batch and how many of its samples each replica has.

    Attributes:
        sizes: Samples of each replica; 0 for an empty one.
        mean: Of the input [x]; its standard deviation is 1.
        is_masked: Whether a mask hides some samples' positions, and all of the last replica's.
    """

    sizes: tuple[int, ...]
    mean: float = 3.0
    is_masked: bool = False

    def cut(self, array: np.ndarray) -> list[np.ndarray]:
        """Return each replica's part of an array."""
        return np.split(array, np.cumsum(self.sizes)[:-1])

    @property
    def x(self) -> np.ndarray:
        """The input of all replicas."""
        return self._draw(1, self.mean)

    @property
    def dy(self) -> np.ndarray:
        """The gradient of the output of all replicas."""
        return self._draw(2, 0.0)

    @property
    def mask(self) -> np.ndarray | None:
        """The mask of all replicas, without the channel axis; None for none."""
        if not self.is_masked:
            return None
        mask = np.random.default_rng(3).random((sum(self.sizes), *SPACE[:-1])) < 0.7
        mask[len(mask) - self.sizes[-1] :] = False
        return mask

    @property
    def tolerance(self) -> float:
        """The error that is allowed: at a large mean the kernel contract's."""
        return max(2e-5, 8 * UNIT_ROUNDOFF["float32"] * (1 + self.mean))

    def _draw(self, seed: int, mean: float) -> np.ndarray:
        shape = (sum(self.sizes), *SPACE)
        return np.random.default_rng(seed).normal(mean, 1.0, shape).astype("float32")


# For two replicas.
PAIRS = {
    "equal": Shards((4, 4)),
    "7 and 1": Shards((7, 1)),
    "7 and 0": Shards((7, 0)),
    "masked": Shards((4, 4), is_masked=True),
    "far from 0": Shards((4, 4), mean=1000.0),
}


def built(kind: str, **options: object) -> keras_bn.layers.base.Normalization:
    """Return a layer of `LAYERS` whose weights are not the initial ones."""
    layer = LAYERS[kind](**options)
    layer.build((None, *SPACE))
    draw = np.random.default_rng(4)
    layer.set_weights(
        [w if w.dtype.kind == "i" else draw.uniform(0.5, 2.0, w.shape) for w in layer.get_weights()]
    )
    return layer


def errors(
    shards: Shards,
    kind: str,
    y: Iterable[np.ndarray],
    dx: Iterable[np.ndarray],
    gradients: Iterable[Arrays],
    states: Iterable[Arrays],
) -> dict[str, float]:
    """Return the largest error of each result against a float64 run over the whole batch.

    Args:
        shards: The batch.
        kind: The layer, built by `built`.
        y: The output of each replica.
        dx: The gradient of the input of each replica.
        gradients: gamma's and beta's of each replica, by name; their sum is the whole's.
        states: The weights of each replica after the call, by name.

    Returns:
        The errors by name, relative to 1 + |true|.
    """
    layer = built(kind)
    mask = shards.mask if shards.mask is None else shards.mask[..., None]
    x, dy = shards.x, shards.dy
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True, mask=mask)
    found = {
        "y": [(np.concatenate(list(y)), wanted.y)],
        "dx": [(np.concatenate(list(dx)), wanted.dx)],
    }
    parts = list(gradients)
    for name, true in wanted.gradients.items():
        found[f"d{name}"] = [(sum(part[name] for part in parts), true)]
    for state in states:
        for name, true in wanted.state.items():
            found.setdefault(name, []).append((state[name], true))
    return {name: max(_error(*pair) for pair in pairs) for name, pairs in found.items()}


def _error(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.max(np.abs(found - true) / (1 + np.abs(true)), initial=0.0))
