"""Who looks at what is done with a tensor: nothing public says all of it (torch 2.13)."""

import torch
from torch._C import _functorch, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad

from keras_bn.types import Tensor

_plain = (torch.Tensor, torch.nn.Parameter)


def takes_operations() -> bool:
    """Say whether what is being compiled may hold operations of ours."""
    # What is exported has to run without this package, and our operations have no derivatives.
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not _is_within_transform()
    )


def are_memory(*tensors: Tensor) -> bool:
    """Say whether tensors are memory of the CPU, and nobody else looks at what is done with it."""
    return (
        not torch.compiler.is_compiling()
        and _get_tracing_state() is None
        and not _len_torch_dispatch_stack()
        and all(x.is_cpu and type(x) in _plain and not x.is_neg() for x in tensors)
    )


def is_transformed(*inputs: Tensor) -> bool:
    """Say whether `torch.func` is at work, or forward mode on one of the inputs."""
    if _is_within_transform():
        return True
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return False
    return any(forward_ad.unpack_dual(part).tangent is not None for part in inputs)


@torch.compiler.assume_constant_result
def _is_within_transform() -> bool:
    return _functorch.peek_interpreter_stack() is not None
