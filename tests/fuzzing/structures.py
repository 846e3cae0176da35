"""What neighbouring seeds share, and a compiler compiles: layer, shape, dtypes, flags, mode."""

import contextlib
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

import keras_bn
from tests.fuzzing.bounds import kept_axes, pooled_axes
from tests.fuzzing.differentiate import Differentiated, differentiated

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 16, 17)
# One structure in ten, and half of the others: longer axes, which compilers sum in other ways.
LONG_SIZES = (1, 2, 3, 5, 31, 33, 64, 65, 100)
MOST_ELEMENTS = 4096

# How often each is drawn, in percent. Of the modes, seldom those that compile slowly; JAX compiles
# in any case, and operation by operation, which is slower still, when it is eager.
MODES = {
    "tensorflow": {"eager": 85, "graph": 10, "xla": 5},
    "jax": {"eager": 2, "jit": 98},
    "torch": {"eager": 98, "aot": 2},
}[keras.backend.backend()]
LAYERS = {"batch": 30, "renorm": 15, "renormalization": 25, "group": 30}
# One structure in five; `counted` are averages that count what they have seen.
OTHERS = {
    "instance": 10,
    "layer": 25,
    "rms": 10,
    "ghosts": 20,
    "renormalized ghosts": 10,
    "counted": 15,
    "renormalized counted": 10,
}
POLICIES = {
    "float32": 50,
    "float64": 15,
    "mixed_float16": 10,
    "mixed_bfloat16": 10,
    "float16": 8,
    "bfloat16": 7,
}
INPUTS = {"as the policy": 70, "float32": 12, "float64": 6, "float16": 6, "bfloat16": 6}
MASKS = {"none": 45, "bool": 20, "weights": 20, "nothing": 5, "hides": 10}

# The options by which a failure is told.
TOLD = ("axis", "groups", "renorm", "virtual_batch_size", "unbiased", "debias")
TOLD += ("epsilon", "momentum", "trainable")


def pick(rng: np.random.Generator, percent: dict[str, int]) -> str:
    return str(rng.choice(list(percent), p=np.array(list(percent.values())) / 100))


@dataclass
class Structure:
    """What neighbouring seeds share."""

    layer: Any
    shape: tuple[int, ...]
    x_dtype: str
    training: bool
    mask: str
    mask_dtype: str
    mask_shape: tuple[int, ...]
    mask_aligned: tuple[int, ...]  # with one axis per axis of the input
    mode: str

    def __post_init__(self) -> None:
        takes_training = "training" in inspect.signature(self.layer.call).parameters
        arguments = {"training": self.training} if takes_training else {}
        self.differentiated: Differentiated = differentiated(self.layer, self.mode, **arguments)

    @property
    def pooled(self) -> tuple[int, ...]:
        return pooled_axes(len(self.shape), kept_axes(self.layer, len(self.shape)))

    @property
    def is_trained(self) -> bool:
        return self.training and self.layer.trainable

    def __str__(self) -> str:
        layer, given = self.layer, [name for name in TOLD if hasattr(self.layer, name)]
        options = ", ".join(f"{name}={getattr(layer, name)}" for name in given)
        return (
            f"{type(layer).__name__}({options}, dtype={layer.dtype_policy.name}) of {self.x_dtype} "
            f"{self.shape}, training={self.training}, {self.mode}, "
            f"mask: {self.mask} {self.mask_dtype} {self.mask_shape}"
        )


@functools.lru_cache(maxsize=1)
def structure(number: int) -> Structure:
    """Draw a structure, with its layer built."""
    rng = np.random.default_rng([number, 1])
    name = pick(rng, OTHERS if number % 5 == 3 else LAYERS)
    sizes = LONG_SIZES if number % 10 in (3, 9) else SIZES
    shape = _shape(rng, sizes, least=3 if name == "instance" else 2)
    make = {
        "batch": keras_bn.BatchNormalization,
        "renorm": functools.partial(keras_bn.BatchNormalization, renorm=True),
        "renormalization": keras_bn.BatchRenormalization,
        "group": keras_bn.GroupNormalization,
        "instance": keras_bn.InstanceNormalization,
        "layer": keras_bn.LayerNormalization,
        "rms": keras_bn.RMSNormalization,
        "ghosts": keras_bn.BatchNormalization,
        "renormalized ghosts": keras_bn.BatchRenormalization,
        "counted": keras_bn.BatchNormalization,
        "renormalized counted": keras_bn.BatchRenormalization,
    }[name]
    layer = make(dtype=pick(rng, POLICIES), **_options(rng, name, shape))
    given = pick(rng, INPUTS)
    mask = pick(rng, MASKS)
    mask_shape, aligned = _mask_shape(rng, shape, kept_axes(layer, len(shape)))
    made = Structure(
        layer,
        shape,
        x_dtype=layer.compute_dtype if given == "as the policy" else given,
        training=bool(rng.random() < 0.8),
        mask="none" if aligned is None or name in ("layer", "rms") else mask,
        mask_dtype="float32" if mask == "weights" else str(rng.choice(["bool", "int32"])),
        mask_shape=mask_shape,
        mask_aligned=aligned,
        mode=pick(rng, MODES),
    )
    with wide_numbers(made):
        layer.build(shape)
    layer.trainable = bool(rng.random() < 0.9)
    return made


def wide_numbers(made: Structure) -> Any:
    """Let JAX compute in float64 where the structure does; the other backends always can."""
    wide = "float64" in (made.x_dtype, made.layer.compute_dtype)
    if not wide or keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)


def _shape(rng: np.random.Generator, sizes: tuple[int, ...], least: int) -> tuple[int, ...]:
    rank = int(rng.integers(least, 6))
    shape = [MOST_ELEMENTS] * rank
    while np.prod(shape) > MOST_ELEMENTS:
        shape = [int(size) for size in rng.choice(sizes, rank)]
    if rng.random() < 0.04:
        shape[0] = 0
    return tuple(shape)


def _options(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    is_split = name in ("group", "instance", "ghosts", "renormalized ghosts")
    first = 1 if is_split or shape[0] == 0 else 0
    rank = len(shape)
    axes = [int(a) for a in rng.permutation(np.arange(first, rank))]
    axes = [a - rank if rng.random() < 0.5 else a for a in axes]
    several = name not in ("group", "instance") and rng.random() < 0.3
    options: dict[str, Any] = {
        "axis": tuple(axes[: rng.integers(1, len(axes) + 1)]) if several else axes[0],
        "epsilon": float(rng.choice([1e-3, 1e-3, 1e-5, 1e-2, 1.0])),
    }
    if name == "rms":
        return options
    options |= {"center": bool(rng.random() < 0.8), "scale": bool(rng.random() < 0.8)}
    if name == "group":
        channels = shape[axes[0]]
        divisors = [n for n in range(1, channels + 1) if channels % n == 0]
        return options | {"groups": int(rng.choice([-1, *divisors]))}
    if name in ("instance", "layer"):
        return options
    options["momentum"] = float(rng.choice([0.99, 0.9, 0.5, 0.0, 1.0]))
    if name in OTHERS:
        options["unbiased"] = bool(rng.random() < 0.3)
    if "ghosts" in name:
        options["virtual_batch_size"] = int(rng.integers(1, max(shape[0], 1) + 1))
    if "counted" in name:
        options |= {"debias": True} if rng.random() < 0.6 else {"momentum": None}
    if name == "renorm":
        limits = {"rmin": 0.5, "rmax": 2.0, "dmax": 0.5}
        options["renorm_clipping"] = {k: v for k, v in limits.items() if rng.random() < 0.7} or None
        options["renorm_momentum"] = float(rng.choice([0.99, 0.5]))
    if "renormal" in name:
        options["rmax_steps"] = [None, (0, 10), (5, 5)][rng.integers(3)]
        options["dmax_steps"] = [None, (2, 8)][rng.integers(2)]
    return options


def _mask_shape(
    rng: np.random.Generator, shape: tuple[int, ...], kept: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Draw a mask's shape; return it also with one axis per axis of the input."""

    def drawn(axes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        sizes = {axis: 1 if rng.random() < 0.15 else shape[axis] for axis in axes}
        return tuple(sizes.values()), tuple(sizes.get(axis, 1) for axis in range(len(shape)))

    pooled = pooled_axes(len(shape), kept)
    if rng.random() < 0.3:
        sizes, aligned = drawn(tuple(range(len(shape) - 1)))
        # Where both readings fit, a mask is taken to lack the kept axis, not the last one.
        fits = zip(reversed(sizes), (shape[axis] for axis in reversed(pooled)), strict=False)
        if len(sizes) > len(pooled) or any(size not in (1, whole) for size, whole in fits):
            return sizes, aligned
    if not pooled:
        return (), None
    return drawn(pooled[rng.integers(len(pooled)) if rng.random() < 0.2 else 0 :])
