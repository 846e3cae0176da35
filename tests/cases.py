"""The one table of the layer tests: a row added here runs through all of them.

Each row is a layer with its options and an input shape; beside the rows stand the forms of masks,
the dtype policies, and what each layer must refuse.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from keras_bn import (
    BatchNormalization,
    BatchRenormalization,
    FeatureScaling,
    FixupBias,
    FixupBranch,
    FixupInitializer,
    FixupScale,
    GroupNormalization,
    InstanceNormalization,
    LayerNormalization,
    RMSNormalization,
    WeightNormalization,
)

# Few shapes, shared by many rows: each new one costs a compilation of every operation in JAX.
TABLE, SEQUENCE, IMAGE, FIRST = (8, 6), (4, 5, 6), (3, 4, 5, 6), (3, 6, 4, 5)
NINE = (9, 6)
VIDEO = (2, 3, 2, 3, 6)


@dataclass(frozen=True)
class Case:
    """A layer with its options, and the shape of its input."""

    name: str
    layer: type[keras.layers.Layer]
    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = IMAGE

    def make(self, **more: Any) -> keras.layers.Layer:
        """Return the layer, not built."""
        return self.layer(**self.options, **more)

    def built(self, shape: tuple[int | None, ...] | None = None, **more: Any) -> keras.layers.Layer:
        """Return the layer with weights as after some training."""
        layer = self.make(**more)
        layer.build(shape or self.shape)
        return trained(layer)

    def x(self, seed: int = 0) -> np.ndarray:
        """Return an input with mean 1 and standard deviation 2: κ is below 4 in every part."""
        return draw(self.shape, seed)

    @property
    def kept(self) -> tuple[int, ...]:
        """The kept axes, counted from 0."""
        axis = self.options.get("axis", -1)
        axes = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
        return tuple(sorted(a % len(self.shape) for a in axes))

    @property
    def pooled(self) -> tuple[int, ...]:
        """The axes that are not kept."""
        return tuple(a for a in range(len(self.shape)) if a not in self.kept)

    @property
    def stock(self) -> type[keras.layers.Layer] | None:
        """The layer that Keras has for it, if that knows the options."""
        if self.options.get("momentum", 0) is None:
            return None
        stock = getattr(keras.layers, self.layer.__name__, None)
        known = () if stock is None else inspect.signature(stock).parameters
        return stock if set(self.options) <= set(known) else None


def draw(shape: tuple[int, ...], seed: int = 0, mean: float = 1.0, std: float = 2.0) -> np.ndarray:
    """Return normal float32 numbers."""
    return np.random.default_rng(seed).normal(mean, std, shape).astype("float32")


def trained(layer: keras.layers.Layer, seed: int = 0) -> keras.layers.Layer:
    """Give a built layer weights as after three steps of training; positive ones stay positive."""
    rng = np.random.default_rng(seed)
    signed = ("beta", "moving_mean", "renorm_mean", "mean")
    # A minimum below the maximum, and the rounding of statistics.
    factors = {"minimum": -1.0, "offsets": 1e-3}
    for variable in layer.weights:
        value = rng.normal(size=variable.shape) if variable.name in signed else None
        value = rng.uniform(0.5, 2.0, variable.shape) if value is None else value
        value = (value * factors.get(variable.name, 1.0)).astype("float32")
        variable.assign(np.int32(3) if variable.name == "step" else value)
    return layer


def only(options: dict[str, Any], weight: str) -> dict[str, Any]:
    """Return those of the options that speak of one weight."""
    return {key: value for key, value in options.items() if key.startswith(weight)}


PARTS = {
    "gamma_initializer": keras.initializers.Constant(1.5),
    "beta_initializer": "ones",
    "gamma_regularizer": keras.regularizers.L2(0.1),
    "beta_regularizer": keras.regularizers.L1(0.1),
    "gamma_constraint": keras.constraints.NonNeg(),
    "beta_constraint": keras.constraints.MaxNorm(1.0),
}
BATCH_PARTS = PARTS | {
    "moving_mean_initializer": keras.initializers.Constant(0.5),
    "moving_variance_initializer": keras.initializers.Constant(2.0),
}
BARE = {"center": False, "scale": False}
CLIPPING = {"rmin": 0.5, "rmax": 1.5, "dmax": 0.3}
WARM = {"rmax_steps": None, "dmax_steps": None}
GHOSTS = {"virtual_batch_size": 2}
RAMPS = {"rmax_steps": (0, 9), "dmax_steps": (2, 4)}

CASES = [
    Case("batch", BatchNormalization),
    Case("batch-rank-2", BatchNormalization, {}, TABLE),
    Case("batch-rank-3", BatchNormalization, {}, SEQUENCE),
    Case("batch-rank-5", BatchNormalization, {}, VIDEO),
    Case("batch-first", BatchNormalization, {"axis": 1}, FIRST),
    Case("batch-middle", BatchNormalization, {"axis": 2}),
    Case("batch-two-axes", BatchNormalization, {"axis": (-1, 1)}),
    Case("batch-all-space", BatchNormalization, {"axis": (1, 2, 3)}),
    Case("batch-bare", BatchNormalization, BARE),
    Case("batch-no-center", BatchNormalization, {"center": False}, TABLE),
    Case("batch-no-scale", BatchNormalization, {"scale": False}, TABLE),
    Case("batch-constants", BatchNormalization, {"momentum": 0.5, "epsilon": 1e-5}),
    Case("batch-parts", BatchNormalization, BATCH_PARTS, TABLE),
    Case("batch-synchronized", BatchNormalization, {"synchronized": True}),
    Case("batch-axis-name", BatchNormalization, {"synchronized": True, "axis_name": "batch"}),
    Case("batch-one-channel", BatchNormalization, {}, (4, 5, 1)),
    Case("renorm", BatchNormalization, {"renorm": True}),
    Case("renorm-first", BatchNormalization, {"renorm": True, "axis": 1}, FIRST),
    Case("renorm-clipped", BatchNormalization, {"renorm": True, "renorm_clipping": CLIPPING}),
    Case("renorm-partly", BatchNormalization, {"renorm": True, "renorm_clipping": {"rmax": 1.1}}),
    Case("renorm-momentum", BatchNormalization, {"renorm": True, "renorm_momentum": 0.8}),
    Case("renorm-bare", BatchNormalization, {"renorm": True, **BARE}, TABLE),
    Case("renormalization", BatchRenormalization, WARM),
    Case("renormalization-default", BatchRenormalization, {}, TABLE),
    Case(
        "renormalization-ramp", BatchRenormalization, {"rmax_steps": (0, 9), "dmax_steps": (2, 4)}
    ),
    Case("renormalization-first", BatchRenormalization, {"axis": 1, **WARM}, FIRST),
    Case("renormalization-two-axes", BatchRenormalization, {"axis": (1, 3), **WARM}),
    Case("renormalization-bare", BatchRenormalization, {**BARE, **WARM, "momentum": 0.5}, TABLE),
    Case("renormalization-parts", BatchRenormalization, {**BATCH_PARTS, "rmax": 1.5}, TABLE),
    Case("renormalization-synchronized", BatchRenormalization, {"synchronized": True, **WARM}),
    Case(
        "renormalization-axis-name",
        BatchRenormalization,
        {"synchronized": True, "axis_name": "batch", **WARM},
        TABLE,
    ),
    Case("debiased", BatchNormalization, {"debias": True}),
    Case("debiased-two-axes", BatchNormalization, {"debias": True, "axis": (-1, 1)}),
    Case("debiased-renorm", BatchNormalization, {"debias": True, "renorm": True}),
    Case("debiased-renormalization", BatchRenormalization, {"debias": True, **WARM}),
    Case("cumulative", BatchNormalization, {"momentum": None}),
    Case("cumulative-unbiased", BatchNormalization, {"momentum": None, "unbiased": True}, TABLE),
    Case("cumulative-renorm", BatchNormalization, {"momentum": None, "renorm": True}, TABLE),
    Case("cumulative-renormalization", BatchRenormalization, {"momentum": None, **WARM}),
    Case("unbiased", BatchNormalization, {"unbiased": True}),
    Case("unbiased-renorm", BatchNormalization, {"unbiased": True, "renorm": True}, TABLE),
    Case("unbiased-renormalization", BatchRenormalization, {"unbiased": True, **WARM}, TABLE),
    Case("ghost", BatchNormalization, GHOSTS),
    Case("ghost-rank-2", BatchNormalization, {"virtual_batch_size": 4}, TABLE),
    Case("ghost-rank-2-uneven", BatchNormalization, {"virtual_batch_size": 5}, NINE),
    Case("ghost-first", BatchNormalization, {"axis": 1, **GHOSTS}, FIRST),
    Case("ghost-two-axes", BatchNormalization, {"axis": (1, 3), **GHOSTS}),
    Case(
        "ghost-all-but-batch",
        BatchNormalization,
        {"axis": (1, 2), "virtual_batch_size": 5},
        (9, 5, 6),
    ),
    Case("ghost-one-sample", BatchNormalization, {"virtual_batch_size": 1}),
    Case("ghost-whole", BatchNormalization, {"virtual_batch_size": 64}, TABLE),
    Case("ghost-renorm", BatchNormalization, {**GHOSTS, "renorm": True}),
    Case("ghost-renormalization", BatchRenormalization, {**GHOSTS, **WARM}),
    Case("ghost-all", BatchNormalization, {**GHOSTS, "debias": True, "unbiased": True, **BARE}),
    Case("group", GroupNormalization, {"groups": 2}),
    Case("group-rank-2", GroupNormalization, {"groups": 2}, TABLE),
    Case("group-rank-3", GroupNormalization, {"groups": 3}, SEQUENCE),
    Case("group-rank-5", GroupNormalization, {"groups": 2}, VIDEO),
    Case("group-first", GroupNormalization, {"groups": 2, "axis": 1}, FIRST),
    Case("group-middle", GroupNormalization, {"groups": 5, "axis": 2}),
    Case("group-one", GroupNormalization, {"groups": 1}),
    Case("group-each", GroupNormalization, {"groups": 6}),
    Case("group-instance", GroupNormalization, {"groups": -1}),
    Case("group-bare", GroupNormalization, {"groups": 2, "epsilon": 1e-5, **BARE}, SEQUENCE),
    Case("group-parts", GroupNormalization, {"groups": 2, **PARTS}, SEQUENCE),
    Case("instance", InstanceNormalization),
    Case("instance-rank-3", InstanceNormalization, {"epsilon": 1e-5}, SEQUENCE),
    Case("instance-first", InstanceNormalization, {"axis": 1}, FIRST),
    Case("instance-parts", InstanceNormalization, PARTS, SEQUENCE),
    Case("layer", LayerNormalization),
    Case("layer-rank-2", LayerNormalization, {"epsilon": 1e-5}, TABLE),
    Case("layer-first", LayerNormalization, {"axis": 1}, FIRST),
    Case("layer-two-axes", LayerNormalization, {"axis": (3, 1)}),
    Case("layer-bare", LayerNormalization, BARE, SEQUENCE),
    Case("layer-no-scale", LayerNormalization, {"scale": False}, TABLE),
    Case("layer-parts", LayerNormalization, PARTS, SEQUENCE),
    Case("rms", RMSNormalization),
    Case("rms-first", RMSNormalization, {"axis": 1, "epsilon": 1e-3}, FIRST),
    Case("rms-two-axes", RMSNormalization, {"axis": (1, -1)}),
    Case("fixup-bias", FixupBias, {}, SEQUENCE),
    Case("fixup-bias-parts", FixupBias, only(PARTS, "beta"), TABLE),
    Case("fixup-scale", FixupScale, {}, SEQUENCE),
    Case("fixup-scale-parts", FixupScale, only(PARTS, "gamma"), TABLE),
    Case("scaling", FeatureScaling, {}, TABLE),
    Case("scaling-min-max", FeatureScaling, {"mode": "min_max"}, TABLE),
    Case("scaling-mean", FeatureScaling, {"mode": "mean"}, SEQUENCE),
    Case("scaling-first", FeatureScaling, {"axis": 1}, FIRST),
    Case("scaling-two-axes", FeatureScaling, {"mode": "min_max", "axis": (1, -1)}, SEQUENCE),
    Case("scaling-all-alike", FeatureScaling, {"axis": None}, SEQUENCE),
    Case("scaling-inverse", FeatureScaling, {"mode": "mean", "inverse": True}, TABLE),
]
BY_NAME = {case.name: case for case in CASES}


def named(*names: str) -> list[Case]:
    """Return the rows of these names."""
    return [BY_NAME[name] for name in names]


# One row per path through the code, for what is costly to repeat (XLA, torch.compile).
PATHS = named(
    "batch", "batch-two-axes", "renorm-clipped", "renormalization-ramp", "group", "layer", "rms"
)

# One row per path and layout, for what is run in every dtype.
LAYOUTS = [
    *PATHS,
    *named("batch-first", "batch-bare", "renormalization-first", "renormalization-bare"),
    *named("group-rank-2", "group-first", "group-instance", "instance", "layer-first"),
    *named("debiased-renorm", "cumulative", "ghost", "ghost-rank-2-uneven"),
    *named("scaling", "scaling-two-axes", "scaling-inverse"),
]

# One row per layer and set of options, whatever their values and the shape.
FILED = list({(case.layer, *sorted(case.options)): case for case in reversed(CASES)}.values())


@dataclass(frozen=True)
class MaskForm:
    """A form of mask: which of the input's axes it has, of what size, and its kind."""

    name: str
    kind: str = "bool"

    def draw(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """Return the mask as it is passed, and with one axis per axis of the input."""
        axes = tuple(range(len(case.shape) - 1)) if self.name == "keras" else case.pooled
        sizes = [case.shape[axis] for axis in axes]
        if self.name == "one-per-sample":
            sizes = [sizes[0], *(1 for _ in sizes[1:])]
        if self.name == "same-for-all":
            axes, sizes = axes[1:], sizes[1:]
        mask = np.random.default_rng(3).choice([0, 0.5, 2], sizes)
        mask.flat[:2] = 0, 2
        mask = mask if self.kind == "float32" else mask > 0
        full = np.ones(len(case.shape), int)
        full[list(axes)] = sizes
        return mask.astype(self.kind), mask.reshape(full).astype("float64")


MASKS = [
    MaskForm("each-position"),
    MaskForm("integers", "int32"),
    MaskForm("weights", "float32"),
    MaskForm("one-per-sample"),
    MaskForm("same-for-all"),
    MaskForm("keras"),
]
MASKED = [
    *((case, form) for case in named("batch", "batch-first", "group-first") for form in MASKS),
    *(
        (case, form)
        for case in named("batch-rank-3", "batch-rank-5", "batch-two-axes", "batch-one-channel")
        + named("renorm-clipped", "renormalization", "group", "group-instance")
        + named("debiased-two-axes", "cumulative", "unbiased", "ghost", "ghost-renormalization")
        + named("ghost-rank-2", "ghost-rank-2-uneven")
        for form in (MASKS[0], MASKS[2], MASKS[-1])
    ),
]

HALF = ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"]

# Unit roundoff of each dtype.
U = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def largest(array: Any) -> float:
    """Return the largest finite magnitude; 0 where there is none."""
    magnitude = np.abs(array)
    return float(np.max(magnitude, initial=0.0, where=np.isfinite(magnitude)))


def assert_close(actual: Any, wanted: Any, scale: Any = None, dtype: str = "float32") -> None:
    """Compare by the kernel contract, which bounds the error by 8·u·(1 + κ) of standardized x.

    κ is below 4 in the data of the tables. What is computed is as large as `scale` (default: as
    the largest of what is wanted), so the bound is taken of that. A result in half precision is
    rounded: a gradient as the sum of two terms, so up to three times, plus once at the end.
    """
    scale = largest(wanted) if scale is None else scale
    rounded = 4 * U[dtype] if dtype in ("float16", "bfloat16") else 0.0
    # The oracle is float64 itself: there the promise is 1e-12.
    unit = 1e-12 if dtype == "float64" else 8 * U["float32"] * (1 + 4)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=(unit + rounded) * scale)


def assert_agrees(result: Any, wanted: Any, dy: np.ndarray, dtype: str = "float32") -> None:
    """Compare output, gradients and statistics; a sum over dy is as large as all its terms."""
    assert_close(result.y, wanted.y, dtype=dtype)
    assert_close(result.dx, wanted.dx, dtype=dtype)
    terms = np.abs(dy.astype("float64")).sum()
    assert result.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        scale = max(terms / max(gradient.size, 1), largest(gradient))
        assert_close(result.gradients[name], gradient, scale, dtype)
    # Statistics are kept in float32 at least, whatever the policy.
    wide = "float64" if dtype == "float64" else "float32"
    for name, value in wanted.state.items():
        assert_close(result.state[name], value, dtype=wide)


# What must be refused: the whole text, and `TypeError` for a wrong kind.


@dataclass(frozen=True)
class Wrong:
    """A layer with what it must refuse, and the text of the error after the layer's name."""

    name: str
    layer: type[keras.layers.Layer]
    options: dict[str, Any]
    text: str
    shape: tuple[int | None, ...] = TABLE
    error: type[Exception] = ValueError
    mask: tuple[int, ...] = ()

    @property
    def whole_text(self) -> str:
        """The text with the layer's name."""
        return f"{self.layer.__name__}: {self.text}"


POSITIVE = "a finite number, at least 0"
SHARE = "a finite number, in [0, 1]"
MOMENTUM = f"None, or {SHARE}"
SIZE = "None, or a positive integer"
AT_LEAST_1 = "a finite number, at least 1"
AXES = "an integer, or a tuple of different integers"
ONCE = " Name each axis that is kept once."
GROUPS = "a positive integer, or -1 for one group per channel"
STEPS = "None, or two integers (start, end) with 0 <= start <= end"
KEYS = "None, or a dictionary with any of the keys 'rmin', 'rmax' and 'dmax'"
FLAG = "True or False"
NAME = "None, or the name of a mapped axis"
MODES = "'standard', 'min_max' or 'mean'"

# The layer, the option, what is wrong with which value, what it must be, what to do.
B, R, G = BatchNormalization, BatchRenormalization, GroupNormalization
S = FeatureScaling
OUT_OF_RANGE = [
    *((layer, "epsilon", "negative", -1, POSITIVE) for layer in (B, R, G)),
    *((layer, "epsilon", "nan", np.nan, POSITIVE) for layer in (B, R, G)),
    (B, "epsilon", "infinite", np.inf, POSITIVE),
    *((layer, "momentum", "above-1", 1.5, MOMENTUM) for layer in (B, R)),
    *((layer, "momentum", "negative", -0.1, MOMENTUM) for layer in (B, R)),
    *((layer, "virtual_batch_size", "zero", 0, SIZE) for layer in (B, R)),
    (B, "virtual_batch_size", "negative", -8, SIZE),
    (B, "renorm_momentum", "above-1", 1.01, SHARE),
    *((layer, "axis", "twice", (1, 1), AXES, ONCE) for layer in (B, R, S)),
    *((layer, "axis", "none", (), AXES, ONCE) for layer in (B, R, S)),
    (G, "groups", "zero", 0, GROUPS),
    (G, "groups", "negative", -2, GROUPS),
    (R, "rmax", "below-1", 0.5, AT_LEAST_1),
    (R, "rmax", "infinite", np.inf, AT_LEAST_1),
    (R, "dmax", "negative", -1.0, POSITIVE),
    (R, "rmax_steps", "one", (5,), STEPS),
    (R, "rmax_steps", "reversed", (5, 2), STEPS),
    (R, "dmax_steps", "negative", (-1, 3), STEPS),
    (B, "renorm_clipping", "unknown-key", {"rMax": 1.0}, KEYS),
    (B, "renorm_clipping", "crossed", {"rmin": 2, "rmax": 1}, "a dictionary with rmin <= rmax"),
    (S, "mode", "unknown", "minmax", MODES),
]
WRONG_KIND = [
    *((layer, "epsilon", "text", "1e-3", POSITIVE) for layer in (B, R, G)),
    (B, "epsilon", "flag", True, POSITIVE),
    (B, "momentum", "text", "0.9", MOMENTUM),
    (B, "renorm_momentum", "none", None, SHARE),
    *((layer, "debias", "number", 2, FLAG) for layer in (B, R)),
    *((layer, "unbiased", "none", None, FLAG) for layer in (B, R)),
    *((layer, "virtual_batch_size", "fraction", 8.5, SIZE) for layer in (B, R)),
    (B, "virtual_batch_size", "flag", True, SIZE),
    *((layer, "center", "number", 2, FLAG) for layer in (B, R, G)),
    (B, "scale", "text", "yes", FLAG),
    (B, "scale", "none", None, FLAG),
    (B, "renorm", "text", "on", FLAG),
    *((layer, "synchronized", "text", "on", FLAG) for layer in (B, R)),
    *((layer, "axis_name", "number", 3, NAME) for layer in (B, R)),
    *((layer, "axis", "fraction", 1.5, AXES) for layer in (B, R, S)),
    (B, "axis", "text", "last", AXES),
    (B, "axis", "flag", True, AXES),
    (B, "axis", "fraction-in-tuple", (1, 2.5), AXES),
    (G, "axis", "several", (1, 2), "an integer"),
    (G, "groups", "fraction", 2.5, GROUPS),
    (G, "groups", "flag", True, GROUPS),
    (G, "groups", "none", None, GROUPS),
    (R, "rmax", "none", None, AT_LEAST_1),
    (R, "rmax_steps", "number", 5, STEPS),
    (R, "dmax_steps", "fraction", (0.5, 2), STEPS),
    (B, "renorm_clipping", "number", 3, KEYS),
    (S, "mode", "none", None, MODES),
    (S, "inverse", "text", "yes", FLAG),
]
LIMITS = [
    ("negative", "dmax", -1, ValueError),
    ("negative", "rmin", -0.5, ValueError),
    ("infinite", "rmax", np.inf, ValueError),
    ("text", "rmax", "1", TypeError),
    ("flag", "dmax", True, TypeError),
]
WRONG_OPTIONS = [
    Wrong(
        f"{layer.__name__}-{option}-{what}",
        layer,
        {option: value},
        f"`{option}` must be {expected}. Received: {option}={value!r}.{''.join(advice)}",
        error=error,
    )
    for error, table in ((ValueError, OUT_OF_RANGE), (TypeError, WRONG_KIND))
    for layer, option, what, value, expected, *advice in table
] + [
    Wrong(
        f"BatchNormalization-{key}-{what}",
        BatchNormalization,
        {"renorm": True, "renorm_clipping": {key: value}},
        f"`renorm_clipping[{key!r}]` must be {POSITIVE}. "
        f"Received: renorm_clipping[{key!r}]={value!r}.",
        error=error,
    )
    for what, key, value, error in LIMITS
]

# Of Fixup, what is wrong with one option, beside others that are right.
dense, relu = keras.layers.Dense(6), keras.layers.ReLU()
AT_LEAST = "an integer, at least {}"
DRAWN, PAIR = {"depth": 2, "branch_layers": 2}, {"depth": 2, "layers": [dense, relu, dense]}
FIXUP = [
    (FixupInitializer, DRAWN, "depth", "zero", 0, AT_LEAST.format(1), ValueError),
    (FixupInitializer, DRAWN, "depth", "fraction", 2.5, AT_LEAST.format(1), TypeError),
    (FixupInitializer, DRAWN, "branch_layers", "one", 1, AT_LEAST.format(2), ValueError),
    (FixupInitializer, DRAWN, "branch_layers", "none", None, AT_LEAST.format(2), TypeError),
    (FixupBranch, PAIR, "depth", "negative", -1, AT_LEAST.format(1), ValueError),
    (FixupBranch, PAIR, "depth", "none", None, AT_LEAST.format(1), TypeError),
    (FixupBranch, PAIR, "layers", "none", [], "a list of layers", TypeError),
    (FixupBranch, PAIR, "layers", "names", ["relu"], "a list of layers", TypeError),
    (FixupBranch, PAIR, "layers", "one", dense, "a list of layers", TypeError),
    (FixupBranch, PAIR, "shortcut", "name", "dense", "None, or a layer", TypeError),
]
AFTER = "layers without an activation after the last kernel"
AFTER_ADVICE = "It would see nothing but 0, where relu has no gradient. Put it after the branch."
EACH = "layers with one kernel each, or none"
EACH_ADVICE = "Name the layers one by one; depthwise and recurrent layers cannot be used."
LAYERS = {
    "without-kernel": ([relu], "layers of which one has a kernel", "Add a Dense or a convolution."),
    "activation-last": ([dense, dense, relu], AFTER, AFTER_ADVICE),
    "activation-within": ([dense, keras.layers.Dense(6, "relu")], AFTER, AFTER_ADVICE),
    "depthwise": ([keras.layers.SeparableConv1D(6, 1)], EACH, EACH_ADVICE),
    "recurrent": ([dense, keras.layers.GRU(6), dense], EACH, EACH_ADVICE),
    "embeddings": ([keras.layers.Embedding(3, 6), dense], EACH, EACH_ADVICE),
    "wrapped": ([keras.layers.TimeDistributed(dense)], EACH, EACH_ADVICE),
    "nested": ([keras.Sequential([dense]), dense], EACH, EACH_ADVICE),
}
WRONG_OPTIONS += [
    Wrong(
        f"{layer.__name__}-{option}-{what}",
        layer,
        {**right, option: value},
        f"`{option}` must be {expected}. Received: {option}={value!r}.",
        error=error,
    )
    for layer, right, option, what, value, expected, error in FIXUP
] + [
    Wrong(
        f"FixupBranch-layers-{what}",
        FixupBranch,
        {**PAIR, "layers": layers},
        f"`layers` must be {expected}. "
        f"Received: layers={[type(layer).__name__ for layer in layers]!r}. {advice}",
    )
    for what, (layers, expected, advice) in LAYERS.items()
]

DENSE = keras.layers.Dense(2, use_bias=False, name="d")
LOOKUP = keras.layers.Embedding(3, 2, name="e")
PARTLY = keras.layers.EinsumDense("abc,cde->abde", (None, 3, 2), bias_axes="e", name="s")
INSIDE = (
    "one of Conv1D, Conv1DTranspose, Conv2D, Conv2DTranspose, Conv3D, Conv3DTranspose, Dense, "
    "DepthwiseConv1D, DepthwiseConv2D, EinsumDense, Embedding, SeparableConv1D, SeparableConv2D, "
    "or of a class derived from one"
)
PLAIN = "without quantization and LoRA"
UNWRAP = "Use them after `unwrap()`."
BIASED = "one with a bias for each output channel, which `data_init` sets"
LEAVE = "data_init=True. Give it a bias, or leave `data_init` out."

# The option, what is wrong with which layer and other options, what it must be, what follows.
WRONG_OPTIONS += [
    Wrong(
        f"WeightNormalization-{option}-{what}",
        WeightNormalization,
        {"layer": layer, **more},
        f"`{option}` must be {expected}. "
        f"Received: {option}={ {'layer': layer, **more}[option]!r}{facts}",
        error=error,
    )
    for option, what, layer, more, error, expected, facts in (
        ("layer", "number", 3, {}, TypeError, "a Keras layer", "."),
        ("layer", "class", keras.layers.Dense, {}, TypeError, "a Keras layer", "."),
        ("layer", "no-kernel", keras.layers.ReLU(name="r"), {}, ValueError, INSIDE, "."),
        ("layer", "recurrent", keras.layers.LSTM(2, name="l"), {}, ValueError, INSIDE, "."),
        (
            "layer",
            "lora",
            keras.layers.Dense(2, lora_rank=1, name="d"),
            {},
            ValueError,
            PLAIN,
            f", quantization_mode=None, lora_rank=1. {UNWRAP}",
        ),
        (
            "layer",
            "quantized",
            keras.layers.Dense(2, dtype="int8_from_float32", name="d"),
            {},
            ValueError,
            PLAIN,
            f", quantization_mode='int8', lora_rank=None. {UNWRAP}",
        ),
        *(
            ("layer", what, layer, {"data_init": True}, ValueError, BIASED, f", {LEAVE}")
            for what, layer in (("bias", DENSE), ("embedding", LOOKUP), ("few-biases", PARTLY))
        ),
        ("data_init", "text", DENSE, {"data_init": "yes"}, TypeError, FLAG, "."),
        (
            "dtype",
            "given",
            DENSE,
            {"dtype": "float16"},
            ValueError,
            "left out",
            ". Give it to the layer inside.",
        ),
    )
]

PRESENT = "different axes of an input of rank 2 or more"
WRONG_SHAPES = [
    *(
        Wrong(
            f"{layer.__name__}-axis-{axis}",
            layer,
            {"axis": axis},
            f"`axis` must be {PRESENT}. Received: axis={axis}, input_shape=(None, 4, 6).",
            (None, 4, 6),
        )
        for layer in (B, R, G, S)
        for axis in (3, -4)
    ),
    Wrong(
        "one-axis-of-two",
        B,
        {"axis": (1, 5)},
        f"`axis` must be {PRESENT}. Received: axis=(1, 5), input_shape=(8, 6).",
    ),
    Wrong(
        "same-axis-twice",
        B,
        {"axis": (1, -1)},
        f"`axis` must be {PRESENT}. Received: axis=(1, -1), input_shape=(8, 6).",
    ),
    *(
        Wrong(
            f"{layer.__name__}-rank-1",
            layer,
            {},
            f"`axis` must be {PRESENT}. Received: axis=-1, input_shape=(6,).",
            (6,),
        )
        for layer in (B, R, G, S)
    ),
    *(
        Wrong(
            f"{layer.__name__}-unknown-size",
            layer,
            {},
            "`input_shape` must be known along `axis`. Received: input_shape=(None, 4, None). "
            "Give that size to `Input`.",
            (None, 4, None),
        )
        for layer in (B, R, G, S)
    ),
    Wrong(
        "batch-axis",
        G,
        {"groups": 2, "axis": 0},
        "`axis` must be an axis other than 0, the batch's. Received: axis=0, input_shape=(8, 6).",
    ),
    *(
        Wrong(
            f"{layer.__name__}-ghosts-{axis}",
            layer,
            {"axis": axis, "virtual_batch_size": 4},
            "`axis` must be other than 0, the batch's, where `virtual_batch_size` splits it. "
            f"Received: axis={axis}, virtual_batch_size=4, input_shape=(8, 6).",
        )
        for layer, axis in ((B, 0), (B, -2), (B, (0, 1)), (R, 0))
    ),
    *(
        Wrong(
            f"{groups}-groups-of-6",
            G,
            {"groups": groups},
            f"`groups` must be a divisor of the number of channels. Received: groups={groups}, "
            "channels=6. Choose another number, or -1 for one group per channel.",
        )
        for groups in (4, 12, 32)
    ),
    *(
        Wrong(
            f"branch-to-{'x'.join(map(str, output[1:]))}",
            FixupBranch,
            {"depth": 2, "layers": layers},
            "`layers` must be layers whose output has the shape of the shortcut. "
            f"Received: layers={names!r}, output_shape={output!r}, shortcut_shape=(None, 4, 6). "
            "Give `shortcut` a layer with that output.",
            (None, 4, 6),
        )
        for layers, names, output in (
            ([dense, keras.layers.Dense(5)], ["Dense", "Dense"], (None, 4, 5)),
            ([dense, keras.layers.Flatten()], ["Dense", "Flatten"], (None, 24)),
        )
    ),
]

FITTING = "broadcastable to the input without its kept axes, or to all its axes but the last"
WRONG_MASKS = [
    Wrong(
        f"{layer.__name__}-{'x'.join(map(str, sizes))}",
        layer,
        options,
        f"`mask.shape` must be {FITTING}. "
        f"Received: mask.shape={sizes!r}, inputs_shape=(4, 5, 6), axis=-1.",
        SEQUENCE,
        mask=sizes,
    )
    for layer, options in ((B, {}), (R, {}), (G, {"groups": 2}))
    for sizes in ((3, 5), (4, 3), (4, 5, 6), (7,))
]
