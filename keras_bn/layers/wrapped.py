"""What `WeightNormalization` knows of the layers inside: their kernels, outputs and biases."""

from typing import Any, NamedTuple

import keras
from keras import layers

from keras_bn.errors import invalid


class Kernel(NamedTuple):
    """A kernel of a layer.

    Attributes:
        name: The variable's.
        length: Name of the weight that holds its lengths.
        kept: The axes of the output, counted from the last: each of their elements has a length.
    """

    name: str
    length: str
    kept: tuple[int, ...]


def _kernel(*kept: int, of: str = "") -> Kernel:
    return Kernel(f"{of}kernel", f"{of}g", kept)


_KERNELS: dict[type[Any], tuple[Kernel, ...]] = {
    layers.Dense: (_kernel(-1),),
    layers.Conv1D: (_kernel(-1),),
    layers.Conv2D: (_kernel(-1),),
    layers.Conv3D: (_kernel(-1),),
    # Keras puts their outputs before their inputs.
    layers.Conv1DTranspose: (_kernel(-2),),
    layers.Conv2DTranspose: (_kernel(-2),),
    layers.Conv3DTranspose: (_kernel(-2),),
    layers.DepthwiseConv1D: (_kernel(-2, -1),),
    layers.DepthwiseConv2D: (_kernel(-2, -1),),
    layers.SeparableConv1D: (_kernel(-2, -1, of="depthwise_"), _kernel(-1, of="pointwise_")),
    layers.SeparableConv2D: (_kernel(-2, -1, of="depthwise_"), _kernel(-1, of="pointwise_")),
    layers.Embedding: (Kernel("embeddings", "g", (-2,)),),
    layers.EinsumDense: (),  # as its equation says
}


def kernels_of(wrapper: str, layer: Any) -> tuple[Kernel, ...]:
    """Return the kernels of a layer, that of its output last; refuse a layer without any."""
    if not isinstance(layer, keras.layers.Layer):
        raise invalid(wrapper, "layer", "a Keras layer", layer, kind=TypeError)
    kind = next((kind for kind in _KERNELS if isinstance(layer, kind)), None)
    if kind is None:
        known = ", ".join(sorted(kind.__name__ for kind in _KERNELS))
        raise invalid(wrapper, "layer", f"one of {known}, or of a class derived from one", layer)
    require_plain(wrapper, layer)
    return _KERNELS[kind] or (_kernel_of_equation(layer),)


def _kernel_of_equation(layer: Any) -> Kernel:
    letters, output = _specification(layer)
    return _kernel(*(i - len(letters) for i, letter in enumerate(letters) if letter in output))


def require_plain(wrapper: str, layer: Any) -> None:
    """Refuse a layer that computes with more than its kernel."""
    mode, rank = layer.quantization_mode, getattr(layer, "lora_rank", None)
    if mode is not None or rank:
        raise invalid(
            wrapper,
            "layer",
            "without quantization and LoRA",
            layer,
            "Use them after `unwrap()`.",
            quantization_mode=mode,
            lora_rank=rank,
        )


def has_bias_per_channel(layer: Any) -> bool:
    """Say whether the layer adds a bias to each channel of its output."""
    if isinstance(layer, layers.EinsumDense):
        letters, output = _specification(layer)
        return set(layer.bias_axes or "") == set(letters) & set(output)
    return bool(getattr(layer, "use_bias", False))


def channel_axes(layer: Any, rank: int) -> tuple[int, ...]:
    """Return the channel axes of an output of this rank, in the order of the kernel's."""
    if isinstance(layer, layers.EinsumDense):
        letters, output = _specification(layer)
        before, _, after = output.rpartition("...")
        places = {letter: i for i, letter in enumerate(before)}
        places |= {letter: rank - len(after) + i for i, letter in enumerate(after)}
        return tuple(places[letter] for letter in letters if letter in places)
    first = getattr(layer, "data_format", None) == "channels_first"
    return (1 if first else rank - 1,)


def _specification(layer: Any) -> tuple[str, str]:
    """Return the axes of kernel and output in the equation of an `EinsumDense`."""
    inputs, output = layer.equation.split("->")
    return inputs.split(",")[1], output
