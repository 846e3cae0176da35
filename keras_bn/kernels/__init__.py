"""The operations on the big tensor: one contract, one file for each backend.

    moments(x, axes, weights) -> Moments    apply(x, affine, dtype) -> y
    normalize(x, pooling, ...) -> y, Moments: both, and the algebra between them
    normalized(x, pooling, ...) -> y: the same for who needs no moments
    harmless(x, weights) -> x with 0 for what weighs 0 and is too large, or NaN, to become 0 by it
    length(v, kept) -> |v|    with_length(v, g, kept) -> g·v / |v|: the same for a layer's kernel

`moments` sums over `axes` and keeps them with size 1. It sums in float32 at least, never below
the dtype of `x`, and m2 is never negative. `weights` (None, or non-negative and broadcastable to
`x`, in the dtype of the sums) are the elements' counts; what lies under a 0 does not matter.
`normalize` takes what lies there into its products, so it must be `harmless`.
The pivot is a constant for gradients; weights carry none.

`apply` returns (x - center)·scale + shift, computed in the dtype of the affine map and cast to
`dtype`. The map's parts broadcast against `x`; scale and shift have one shape, and so has a
center that is to have a gradient.

With u the unit roundoff of the statistics' dtype and κ = |mean| / standard deviation:
|variance / true - 1| <= 8·u·(1 + κ²·u), however many elements there are, and the error of
standardized x is at most 8·u·(1 + κ). For the gradient only `x` in its own dtype, the weights,
and arrays of the pooled size are kept. Neither communicates: what merges moments over replicas
(`across`) goes between.
"""

from keras_bn.kernels.active import (
    across,
    apply,
    apply_foreign,
    for_each,
    harmless,
    is_compiling,
    is_foreign,
    known_number,
    moments,
    moved,
    normalize,
    normalized,
)
from keras_bn.kernels.lengths import length, with_length

__all__ = [
    "across",
    "apply",
    "apply_foreign",
    "for_each",
    "harmless",
    "is_compiling",
    "is_foreign",
    "known_number",
    "length",
    "moments",
    "moved",
    "normalize",
    "normalized",
    "with_length",
]
