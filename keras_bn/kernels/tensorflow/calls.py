"""The compiled passes as custom calls of TensorFlow's XLA on the CPU.

An operation of TensorFlow, XlaCallModule, takes a program in StableHLO, whose shapes the compiler
fills in: so there may be sizes that the graph does not know.
"""

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

from keras_bn.kernels.compiled import numbers
from keras_bn.types import Tensor

Sizes = tuple[int | None, ...]
# Dtype and sizes of a tensor.
Type = tuple[str, Sizes]

# How many inputs a call has without gamma, beta or weights.
_LEAST = {
    "moments": 1,
    "products": 3,
    "map": 4,
    "combined": 6,
    "normalize": 1,
    "gradients": 3,
}
# How many more it has, after those, of sets that are to be corrected.
_OF_CORRECTED = {"normalize": 3}
_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
# Of what XlaCallModule takes; from here on it fills in shapes where it is asked to.
_VERSION = 9


@cache
def are_known() -> bool:
    """Say whether this TensorFlow makes such calls where the arrays are, by making one."""
    if any(device.device_type != "CPU" for device in tf.config.list_logical_devices()):
        return False

    @tf.function(jit_compile=True, input_signature=[tf.TensorSpec([None, 1])])
    def mean(x: Tensor) -> Tensor:
        (found,) = call("moments", [x], [("float32", (3, 1, 1))], axes=(0,))
        return tf.squeeze(found[0] + found[1])

    with tf.init_scope():
        try:
            return float(mean(tf.constant([[1.0], [3.0]]))) == 2.0
        except (ValueError, tf.errors.OpError):  # the operation is not one that TensorFlow promises
            return False


def call(
    name: str,
    inputs: Sequence[Tensor],
    results: Iterable[Type],
    axes: Sequence[int] = (),
    epsilon: float = 0.0,
    is_corrected: bool = False,
    **options: Any,
) -> list[Tensor]:
    """Return the results of a pass.

    Args:
        name: What it is called in xla_calls.c.
        inputs: x, and what else is given.
        results: Their dtypes and shapes. The last axes are those of x; so are sizes not known.
        axes: Summed over.
        epsilon: Added to the variance.
        is_corrected: Whether the last inputs say towards what, or how.
        **options: What `numbers` takes.
    """
    given = tuple((part.dtype.name, tuple(part.shape)) for part in inputs)
    found = tuple((dtype, tuple(shape)) for dtype, shape in results)
    is_given = len(inputs) - is_corrected * _OF_CORRECTED.get(name, 0) > _LEAST[name]
    what = numbers(tuple(axes), is_given=is_given, is_corrected=is_corrected, **options)
    module = _module(name, given, found, tuple(what), epsilon)
    made: list[Tensor] = xla.call_module(
        inputs,
        version=_VERSION,
        module=module,
        Tout=[tf.as_dtype(dtype) for dtype, _ in found],
        Sout=[sizes for _, sizes in found],
        platforms=["CPU"],
    )
    return made


@lru_cache(maxsize=4096)
def _module(
    name: str,
    given: tuple[Type, ...],
    found: tuple[Type, ...],
    options: tuple[int, ...],
    epsilon: float,
) -> bytes:
    """Return the program: the call, and before it the sizes of its results."""
    lines: list[str] = []
    operands = {f"%x{i}": _text(*type_) for i, type_ in enumerate(given)}
    signature = ", ".join(f"{operand}: {type_}" for operand, type_ in operands.items())
    outputs = ", ".join(_text(*type_) for type_ in found)
    config = f"""
        api_version = 4 : i32,
        backend_config = {{
          numbers = dense<{list(options)}> : tensor<{len(options)}xi64>,
          epsilon = dense<{epsilon:.17e}> : tensor<1xf64>
        }}"""
    if any(None in sizes for _, sizes in found):
        places = list(range(len(given), len(given) + len(found)))
        config += f""",
        indices_of_shape_operands = dense<{places}> : tensor<{len(places)}xi64>"""
        for i, (_, sizes) in enumerate(found):
            lines += _sizes(f"%s{i}", sizes, len(given[0][1]), operands["%x0"])
            operands[f"%s{i}"] = f"tensor<{len(sizes)}xi32>"
    # TensorFlow fills in sizes where the program says that JAX left some open.
    return f"""
module @keras_bn attributes {{jax.uses_shape_polymorphism = true}} {{
  func.func public @main({signature}) -> ({outputs}) {{
    {"".join(lines)}
    %y:{len(found)} = stablehlo.custom_call @keras_bn_{name}({", ".join(operands)}) {{{config}
    }} : ({", ".join(operands.values())}) -> ({outputs})
    return {", ".join(f"%y#{i}" for i in range(len(found)))} : {outputs}
  }}
}}
""".encode()


def _text(dtype: str, sizes: Sizes) -> str:
    each = ("?x" if size is None else f"{size}x" for size in sizes)
    return f"tensor<{''.join(each)}{_NAMES[dtype]}>"


def _sizes(name: str, sizes: Sizes, rank: int, x: str) -> list[str]:
    """Return the statements that give the sizes of a result a name."""
    lines = []
    for i, size in enumerate(sizes):
        axis = i + rank - len(sizes)
        if size is None:
            lines.append(f"""
    {name}_{i}_ = stablehlo.get_dimension_size %x0, dim = {axis} : ({x}) -> tensor<i32>
    {name}_{i} = stablehlo.reshape {name}_{i}_ : (tensor<i32>) -> tensor<1xi32>""")
        else:
            lines.append(f"""
    {name}_{i} = stablehlo.constant dense<{size}> : tensor<1xi32>""")
    parts = ", ".join(f"{name}_{i}" for i in range(len(sizes)))
    each = ", ".join(["tensor<1xi32>"] * len(sizes))
    lines.append(f"""
    {name} = stablehlo.concatenate {parts}, dim = 0 : ({each}) -> tensor<{len(sizes)}xi32>""")
    return lines
