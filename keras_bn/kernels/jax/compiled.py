"""The compiled passes as operations of JAX.

Each is a primitive that says what it is in plain JAX: that is what other devices, exports, `vmap`
and second derivatives get. On the CPU, XLA gets a custom call.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_bn.core.affine import Learned
from keras_bn.core.moments import Moments
from keras_bn.core.pooling import Pooling
from keras_bn.kernels.compiled import TYPES, dims, library, strides
from keras_bn.kernels.normalization import Plan, varies
from keras_bn.types import Shape, Tensor

Axes = tuple[int, ...]

# The passes' strides have room for so many axes.
_RANK = 7


class How(NamedTuple):
    """What a call does, beside its tensors.

    Attributes:
        axes: Summed over.
        dtype: Dtype of the output.
        epsilon: Added to the variance.
        together: How many neighbouring cells make a set.
        is_centered: Whether moments are about the mean.
        varies: Whether gamma varies within a set.
        is_training: Whether so many tensors are at work that no cache holds the result.
    """

    axes: Axes
    dtype: str = "float32"
    epsilon: float = 0.0
    together: int = 1
    is_centered: bool = True
    varies: bool = False
    is_training: bool = False


@functools.cache
def _types() -> dict[str, int]:
    """Return the numbers of the dtypes that the passes take; none where there is no library."""
    found = library()
    if found is None:
        return {}
    for name in ("moments", "normalize", "gradients"):
        target = jax.ffi.pycapsule(getattr(found, f"keras_bn_xla_{name}"))
        jax.ffi.register_ffi_target(f"keras_bn_{name}", target, platform="cpu")
    return {name: TYPES[name] for name in TYPES if name != "float16" or found.keras_bn_reads_half()}


def serves(x: Tensor, dtype: str | None = None) -> bool:
    """Say whether the passes take an array, of a known shape, where there is one CPU."""
    is_known = all(isinstance(size, int) for size in x.shape)
    return (
        jax.default_backend() == "cpu"
        and jax.device_count() == 1
        and {str(x.dtype), dtype or str(x.dtype)} <= set(_types())
        and is_known
        and x.ndim <= _RANK
        and x.size > 0
    )


def moments(plain: Callable[..., Tensor], x: Tensor, axes: Axes, *counted: Tensor) -> Tensor:
    """Return pivot, offset and m2 over the axes.

    Args:
        plain: The same of x and what is counted, over axes.
        x: The input.
        axes: Summed over.
        *counted: The weights and their sums, if there are any.
    """
    (found,) = _moments.bind(x, *counted, plain=plain, how=How(axes))
    return found


def normalize(
    plain: Callable[..., Any], x: Tensor, learned: Learned, plan: Plan
) -> tuple[Tensor, Moments] | None:
    """Return y and the moments; None where the passes do not take what there is.

    Args:
        plain: The same in plain JAX.
        x: The input.
        learned: gamma and beta.
        plan: What to do, in one pass.
    """
    parts = _filled(learned)
    how = How(
        plan.pooling.axes,
        plan.dtype,
        plan.epsilon,
        plan.pooling.together or 1,
        plan.pooling.is_centered,
        varies(learned, plan.pooling.axes),
    )
    sums = _sums(how, x)
    if not serves(x, plan.dtype) or not all(_is_in_turn(part, sums, how) for part in parts):
        return None
    y, affine, rest = _normalized((plain, how), x, *parts)
    count = x.size // math.prod(sums) * how.together
    affine, rest = jax.lax.stop_gradient((affine, rest))
    return y, Moments(count, affine[0], rest[0], rest[1])


def _filled(learned: Learned) -> list[Tensor]:
    """Return gamma and beta, both or neither."""
    if learned.is_nothing:
        return []
    gamma, beta = learned
    gamma = jnp.ones_like(beta) if gamma is None else gamma
    return [gamma, jnp.zeros_like(gamma) if beta is None else beta]


def _is_in_turn(part: Tensor, sums: Shape, how: How) -> bool:
    """Say whether the columns of cells one after the other are the same again and again."""
    first = next((axis for axis, size in enumerate(part.shape) if size > 1), part.ndim)
    return part.dtype == jnp.float32 and (how.varies or part.shape[first:] == sums[first:])


# The derivative is linear in the movements of x, gamma and beta, and is an operation of its own:
# its transpose is the pass of the gradients.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalized(what: tuple[Any, How], x: Tensor, *learned: Tensor) -> Any:
    plain, how = what
    return _normalize.bind(x, *learned, plain=plain, how=how)


@_normalized.defjvp
def _normalized_jvp(what: tuple[Any, How], primals: Any, tangents: Any) -> Any:
    plain, how = what
    how = how._replace(is_training=True)
    y, affine, rest = _normalized((plain, how), *primals)
    (dy,) = _movement.bind(*primals, affine, *tangents, plain=plain, how=how)
    return (y, affine, rest), (dy, jnp.zeros_like(affine), jnp.zeros_like(rest))


def _plain_y(plain: Any, how: How, x: Tensor, *learned: Tensor) -> Tensor:
    return plain(how, x, *learned)[0]


def _plain_moments(plain: Any, how: How, *inputs: Tensor) -> Any:
    return (plain(how.axes, *inputs),)


def _plain_normalize(plain: Any, how: How, *inputs: Tensor) -> Any:
    return plain(how, *inputs)


def _plain_movement(plain: Any, how: How, *inputs: Tensor) -> Any:
    half = len(inputs) // 2
    primals, tangents = inputs[:half], inputs[half + 1 :]
    return (jax.jvp(functools.partial(_plain_y, plain, how), primals, tangents)[1],)


def _plain_gradients(plain: Any, how: How, *inputs: Tensor) -> Any:
    *primals, _, dy = inputs
    _, pull = jax.vjp(functools.partial(_plain_y, plain, how), *primals)
    dx, *others = pull(dy)
    columns = others[::-1] or [jnp.zeros((1,) * dx.ndim)] * 2
    return dx, jnp.stack(columns)


def _operation(
    name: str, plain: Callable[..., Any], results: Callable[..., Any], lower: Any = None
) -> Primitive:
    """Return a primitive.

    Args:
        name: Its name.
        plain: Gives its results in plain JAX.
        results: Gives shapes and dtypes of the results.
        lower: Gives operands and attributes of the custom call on the CPU; None for none.
    """
    operation = Primitive(f"keras_bn_{name}")
    operation.multiple_results = True

    def of(params: Any) -> Callable[..., Any]:
        return functools.partial(plain, params["plain"], params["how"])

    @functools.lru_cache(maxsize=4096)
    def jitted(**params: Any) -> Callable[..., Any]:
        return jax.jit(functools.partial(operation.bind, **params))

    def abstract(*inputs: Any, how: How, **_: Any) -> Any:
        return [jax.core.ShapedArray(*found) for found in results(how, *inputs)]

    def differentiated(primals: Any, tangents: Any, **params: Any) -> Any:
        return jax.jvp(of(params), primals, tuple(map(ad.instantiate_zeros, tangents)))

    def batched(inputs: Any, axes: Any, **params: Any) -> Any:
        found = jax.vmap(of(params), axes)(*inputs)
        return found, [0] * len(found)

    def in_plain(*inputs: Tensor, **params: Any) -> Any:
        return of(params)(*inputs)

    plainly = mlir.lower_fun(in_plain, multiple_results=True)

    def called(context: Any, *operands: Any, plain: Any, how: How) -> Any:
        if context.module_context.lowering_parameters.for_export:
            return plainly(context, *operands, plain=plain, how=how)
        call = jax.ffi.ffi_lowering(f"keras_bn_{name}")
        return call(context, *operands, **lower(how, *context.avals_in))

    operation.def_impl(lambda *inputs, **params: jitted(**params)(*inputs))
    operation.def_abstract_eval(abstract)
    ad.primitive_jvps[operation] = differentiated
    batching.primitive_batchers[operation] = batched
    mlir.register_lowering(operation, plainly)
    if lower is not None:
        mlir.register_lowering(operation, called, platform="cpu")
    return operation


def _sums(how: How, x: Any) -> Shape:
    return tuple(1 if axis in how.axes else size for axis, size in enumerate(x.shape))


def _columns(x: Any, learned: Any) -> Shape:
    return learned[0].shape if learned else (1,) * x.ndim


def _attributes(
    how: How, x: Any, columns: Shape, nest: Any, is_given: bool, dtype: str
) -> dict[str, Any]:
    """Return what xla_calls.c reads."""
    cells = math.prod(_sums(how, x))
    numbers = [
        x.ndim,
        TYPES[str(x.dtype)],
        TYPES[dtype],
        cells,
        math.prod(columns),
        how.together,
        how.is_centered,
        how.varies,
        is_given,
        how.is_training,
        os.cpu_count() or 1,
    ]
    return {
        "dims": np.array(nest, np.int64),
        "numbers": np.array(numbers, np.int64),
        "reals": np.array([x.size / cells, how.epsilon]),
    }


def _call_moments(how: How, x: Any, *counted: Any) -> dict[str, Any]:
    weights = counted[0].shape if counted else None
    nest = dims(x.shape, strides(x.shape), None, None, weights, _sums(how, x))
    return _attributes(how, x, (), nest, bool(counted), "float32")


def _call_normalize(how: How, x: Any, *learned: Any) -> dict[str, Any]:
    columns, step = _columns(x, learned), strides(x.shape)
    nest = dims(x.shape, step, None, step, None, _sums(how, x), columns)
    return _attributes(how, x, columns, nest, bool(learned), how.dtype)


def _call_gradients(how: How, x: Any, *others: Any) -> dict[str, Any]:
    *learned, _, dy = others
    columns, step = _columns(x, learned), strides(x.shape)
    nest = dims(x.shape, step, step, step, None, _sums(how, x), columns)
    return _attributes(how, x, columns, nest, bool(learned), str(dy.dtype))


_moments = _operation(
    "moments",
    _plain_moments,
    lambda how, x, *_: [((3, *_sums(how, x)), jnp.float32)],
    _call_moments,
)
_normalize = _operation(
    "normalize",
    _plain_normalize,
    lambda how, x, *_: [
        (x.shape, how.dtype),
        ((3, *_sums(how, x)), jnp.float32),
        ((4, *_sums(how, x)), jnp.float32),
    ],
    _call_normalize,
)
_movement = _operation(
    "movement", _plain_movement, lambda how, x, *_: [(x.shape, how.dtype)]
)
_gradients = _operation(
    "gradients",
    _plain_gradients,
    lambda how, x, *others: [
        (x.shape, x.dtype),
        ((2, *_columns(x, others[:-2])), jnp.float32),
    ],
    _call_gradients,
)


def _transposed(gradients: Any, *inputs: Any, plain: Any, how: How) -> list[Any]:
    """Return the gradients of the movements of x, gamma and beta."""
    half = len(inputs) // 2
    (dy,) = gradients
    absent: list[Any] = [None] * (half + 1)
    if isinstance(dy, ad.Zero):
        return absent + [None] * half
    dx, columns = _gradients.bind(*inputs[: half + 1], dy, plain=plain, how=how)
    found = [dx, columns[1], columns[0]][:half]
    pairs = zip(found, inputs[half + 1 :], strict=True)
    return absent + [part if ad.is_undefined_primal(given) else None for part, given in pairs]


ad.primitive_transposes[_movement] = _transposed
