"""The compiled passes as operations of JAX.

Each is a primitive that says what it is in plain JAX: that is what other devices, exports, `vmap`
and second derivatives get. On the CPU, XLA gets a custom call.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad

from keras_bn.core.affine import Learned
from keras_bn.core.moments import Moments
from keras_bn.kernels.compiled import RANK, are_in_turn, corrected, dtypes, numbers, xla_calls
from keras_bn.kernels.jax.operation import operation
from keras_bn.kernels.normalization import How, Plan, how_of
from keras_bn.types import Tensor

Axes = tuple[int, ...]


@functools.cache
def _dtypes() -> frozenset[str]:
    """Return the dtypes that the passes take; none where there is no library."""
    for name, handler in xla_calls().items():
        target = jax.ffi.pycapsule(handler)
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    return dtypes()


def has_passes() -> bool:
    """Say whether there are passes for where the arrays are: one CPU."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and bool(_dtypes())


def serves(x: Tensor, *others: Tensor | None, dtype: str | None = None) -> bool:
    """Say whether the passes take an array beside others, for a result of a dtype."""
    given = [part for part in (x, *others) if part is not None]
    return (
        has_passes()
        and {str(x.dtype), dtype or str(x.dtype)} <= _dtypes()
        and all(isinstance(size, int) for size in x.shape)
        and x.ndim <= RANK
        and x.size > 0
        # On a mesh, of one device too, the type of an array tells how it lies there.
        and all(jax.typeof(part).sharding.mesh.empty for part in given)
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
    how = how_of(learned, plan)
    sums = _sums(how, x)
    kept = _kept(plan.correct, sums)
    if kept is None or not serves(x, *learned.given, *kept, dtype=plan.dtype):
        return None
    if not all(_is_taken(part, sums, how) for part in learned.given):
        return None
    y, *found = _whole((plain, how), x, learned, kept)
    return y, Moments(x.size // math.prod(sums) * plan.cells(x), *found)


# Where nothing is traced, each operation would take longer than the passes do with a small input.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _whole(what: tuple[Any, How], x: Tensor, learned: Learned, kept: list[Tensor]) -> Any:
    """Return y, pivots, offsets and m2."""
    y, affine, rest = _normalized(what, x, *_filled(learned), *kept)
    affine, rest = jax.lax.stop_gradient((affine, rest))
    return y, *(rest if what[1].merges else (affine[0], *rest))


def _filled(learned: Learned) -> list[Tensor]:
    """Return gamma and beta, both or neither."""
    if learned.is_nothing:
        return []
    gamma, beta = learned
    gamma = jnp.ones_like(beta) if gamma is None else gamma
    return [gamma, jnp.zeros_like(gamma) if beta is None else beta]


def _kept(correct: Any, sums: Axes) -> list[Tensor] | None:
    """Return what sets are corrected towards, and the limits; None if that is not taken."""
    if correct is None:
        return []
    limits = corrected(correct, sums)
    if limits is None or correct.mean.dtype != jnp.float32:
        return None
    kept = [correct.mean, correct.variance, jnp.stack(limits).astype("float32")]
    return [jax.lax.stop_gradient(part) for part in kept]


def _is_taken(part: Tensor, sums: Axes, how: How) -> bool:
    """Say whether the passes take gamma or beta."""
    return part.dtype == jnp.float32 and (how.varies or are_in_turn(part.shape, sums))


# The derivative is linear in the movements of x, gamma and beta, and is an operation of its own:
# its transpose is the pass of the gradients.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalized(what: tuple[Any, How], x: Tensor, *others: Tensor) -> Any:
    plain, how = what
    return tuple(_normalize.bind(x, *others, plain=plain, how=how))


@_normalized.defjvp
def _normalized_jvp(what: tuple[Any, How], primals: Any, tangents: Any) -> Any:
    plain, how = what
    how = how._replace(is_training=True)
    y, affine, rest = _normalized((plain, how), *primals)
    if how.is_corrected:
        primals, tangents = _composed(primals[:-3], tangents[:-3], affine[3], affine[4])
        how = how._replace(is_corrected=False)
    (dy,) = _movement.bind(*primals, affine, *tangents, plain=plain, how=how)
    return (y, affine, rest), (dy, jnp.zeros_like(affine), jnp.zeros_like(rest))


def _composed(primals: Any, tangents: Any, r: Tensor, d: Tensor) -> tuple[Any, Any]:
    """Return x, gamma·r and gamma·d + beta, and their movements: r and d are constants."""

    def composed(x: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        gamma, beta = learned or (jnp.ones_like(r), jnp.zeros_like(r))
        return x, gamma * r, gamma * d + beta

    made: tuple[Any, Any] = jax.jvp(composed, primals, tangents)
    return made


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
    x, dy, _, *learned = inputs
    _, pull = jax.vjp(functools.partial(_plain_y, plain, how), x, *learned)
    dx, *others = pull(dy)
    columns = others[::-1] or [jnp.zeros((1,) * dx.ndim)] * 2
    return dx, jnp.stack(columns)


def _sums(how: How, x: Any) -> Axes:
    return tuple(1 if axis in how.axes else size for axis, size in enumerate(x.shape))


def _columns(x: Any, learned: Any) -> Axes:
    return tuple(learned[0].shape) if learned else (1,) * x.ndim


def _call(how: How, **options: bool) -> dict[str, Any]:
    """Return what xla_calls.c reads."""
    options |= {"varies": how.varies, "is_corrected": how.is_corrected, "merges": how.merges}
    given = numbers(how.axes, how.together, how.is_centered, **options)
    return {"numbers": np.array(given, np.int64), "epsilon": np.array([how.epsilon])}


def _call_moments(how: How, _: Any, *counted: Any) -> dict[str, Any]:
    return _call(how, is_given=bool(counted))


def _call_normalize(how: How, _: Any, *others: Any) -> dict[str, Any]:
    is_given = len(others) > 3 * how.is_corrected
    return _call(how, is_given=is_given, is_training=how.is_training)


def _call_gradients(how: How, *inputs: Any) -> dict[str, Any]:
    return _call(how, is_given=len(inputs) > 3)


_moments = operation(
    "moments",
    _plain_moments,
    lambda how, x, *_: [((3, *_sums(how, x)), jnp.float32)],
    _call_moments,
)
_normalize = operation(
    "normalize",
    _plain_normalize,
    lambda how, x, *_: how.results(x),
    _call_normalize,
)
_movement = operation("movement", _plain_movement, lambda how, x, *_: [(x.shape, how.dtype)])
_gradients = operation(
    "gradients",
    _plain_gradients,
    lambda how, x, *others: [
        (x.shape, x.dtype),
        ((2, *_columns(x, others[2:])), jnp.float32),
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
    x, *learned, affine = inputs[: half + 1]
    dx, columns = _gradients.bind(x, dy, affine, *learned, plain=plain, how=how)
    found = [dx, columns[1], columns[0]][:half]
    pairs = zip(found, inputs[half + 1 :], strict=True)
    return absent + [part if ad.is_undefined_primal(given) else None for part, given in pairs]


ad.primitive_transposes[_movement] = _transposed
