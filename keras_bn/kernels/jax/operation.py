"""Operations of JAX that are a custom call on the CPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_bn.kernels.normalization import How
from keras_bn.types import Tensor


def operation(
    name: str, plain: Callable[..., Any], results: Callable[..., Any], lower: Any = None
) -> Primitive:
    """Return a primitive.

    Args:
        name: Its name.
        plain: Gives its results in plain JAX.
        results: Gives shapes and dtypes of the results.
        lower: Gives the attributes of the custom call on the CPU; None where there is no such call.
    """
    primitive = Primitive(f"keras_bn_{name}")
    primitive.multiple_results = True

    def of(params: Any) -> Callable[..., Any]:
        return functools.partial(plain, params["plain"], params["how"])

    @functools.lru_cache(maxsize=4096)
    def jitted(**params: Any) -> Any:
        return jax.jit(functools.partial(primitive.bind, **params))

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

    primitive.def_impl(lambda *inputs, **params: jitted(**params)(*inputs))
    primitive.def_abstract_eval(abstract)
    ad.primitive_jvps[primitive] = differentiated
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, plainly)
    if lower is not None:
        mlir.register_lowering(primitive, called, platform="cpu")
    return primitive
