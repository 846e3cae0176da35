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
_LEAST = {"moments": 1, "products": 3, "map": 4, "combined": 6, "normalize": 1, "gradients": 3}
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
        is_corrected: Whether the last two inputs say towards what.
        **options: What `numbers` takes.
    """
    given = tuple((part.dtype.name, tuple(part.shape)) for part in inputs)
    found = tuple((dtype, tuple(shape)) for dtype, shape in results)
    is_given = len(inputs) - 2 * is_corrected > _LEAST[name]
    what = numbers(tuple(axes), is_given=is_given, **options)
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
    """Return the program."""
    lines: list[str] = []
    operands = [f"%x{i}" for i in range(len(given))]
    types = [_text(*type_) for type_ in given]
    signature = ", ".join(map("{}: {}".format, operands, types))
    attributes = [
        f"numbers = dense<{list(options)}> : tensor<{len(options)}xi64>",
        f"epsilon = dense<{epsilon:.17e}> : tensor<1xf64>",
    ]
    config = [
        "api_version = 4 : i32",
        f"backend_config = {{{', '.join(attributes)}}}",
    ]
    if any(None in sizes for _, sizes in found):
        last = len(operands)
        rank = len(given[0][1])
        for i, (_, sizes) in enumerate(found):
            lines += _sizes(f"%s{i}", sizes, rank, types[0])
            operands.append(f"%s{i}")
            types.append(f"tensor<{len(sizes)}xi32>")
        places = list(range(last, len(operands)))
        config.append(f"indices_of_shape_operands = dense<{places}> : tensor<{len(places)}xi64>")
    outputs = ", ".join(_text(*type_) for type_ in found)
    body = "\n".join(lines)
    return f"""
module @keras_bn attributes {{jax.uses_shape_polymorphism = true}} {{
  func.func public @main({signature}) -> ({outputs}) {{
{body}
    %y:{len(found)} = stablehlo.custom_call @keras_bn_{name}({", ".join(operands)})
      {{{", ".join(config)}}} : ({", ".join(types)}) -> ({outputs})
    return {", ".join(f"%y#{i}" for i in range(len(found)))} : {outputs}
  }}
}}
""".encode()


def _text(dtype: str, sizes: Sizes) -> str:
    return (
        f"tensor<{''.join('?x' if size is None else f'{size}x' for size in sizes)}{_NAMES[dtype]}>"
    )


def _sizes(name: str, sizes: Sizes, rank: int, x: str) -> list[str]:
    """Return the statements that give the sizes of a result a name."""
    lines, parts = [], []
    for i, size in enumerate(sizes):
        part = f"{name}_{i}"
        parts.append(part)
        if size is not None:
            lines.append(f"{part} = stablehlo.constant dense<{size}> : tensor<1xi32>")
            continue
        axis = i + rank - len(sizes)
        lines.append(
            f"{part}_ = stablehlo.get_dimension_size %x0, dim = {axis} : ({x}) -> tensor<i32>"
        )
        lines.append(f"{part} = stablehlo.reshape {part}_ : (tensor<i32>) -> tensor<1xi32>")
    kinds = ", ".join(["tensor<1xi32>"] * len(sizes))
    lines.append(
        f"{name} = stablehlo.concatenate {', '.join(parts)}, dim = 0 : ({kinds}) -> "
        f"tensor<{len(sizes)}xi32>"
    )
    return lines
