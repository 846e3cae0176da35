"""The kernels in PyTorch: autograd functions that save `x` and nothing else of its size."""

import torch

from keras_bn.kernels.steps import Kernel
from keras_bn.kernels.torch import compiled, passes
from keras_bn.kernels.torch.autograd import run
from keras_bn.kernels.torch.tracing import are_memory, is_transformed, takes_operations
from keras_bn.types import Tensor

__all__ = [
    "apply",
    "harmless",
    "hold",
    "is_compiling",
    "known_number",
    "moments",
    "moved",
    "normalize",
]

harmless, moved = passes.harmless, compiled.moved
is_compiling = torch.compiler.is_compiling
_kernel = Kernel(passes, run)
moments, apply, normalize = _kernel.moments, _kernel.apply, _kernel.normalize


def known_number(x: Tensor) -> Tensor | int:
    """Return a whole number as one of Python, where it is there to be read."""
    return int(x) if are_memory(x) and not is_transformed() else x


def hold(x: Tensor) -> Tensor:
    """Return a constant that the backward pass takes as it is now.

    torch 2.13: compiled code may compute it again in the backward pass, from statistics that the
    forward pass has moved meanwhile, and silently return a wrong gradient.
    """
    return torch.ops.keras_bn.hold(x) if takes_operations() else x


@torch.library.custom_op("keras_bn::hold", mutates_args=())
def _hold(x: torch.Tensor) -> torch.Tensor:
    """Copy, in a way that the compiler does not see through."""
    return x.clone()


@_hold.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_hold.register_autograd(lambda ctx, grad: grad)
