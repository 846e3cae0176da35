"""How a step gets its derivative in PyTorch."""

from typing import Any

import torch
from torch._C import _functorch  # nothing public says whether `torch.func` is at work
from torch.autograd import forward_ad

from keras_bn.kernels.steps import Step
from keras_bn.types import Tensor


def run(step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the step's outputs, with its derivative; of its inputs' size, only these are saved.

    Under `torch.func` and in forward mode it is the plain step, which goes through everything.
    """
    if not torch.compiler.is_compiling() and _is_transformed(inputs):
        return step.plain(inputs, None)
    outputs: tuple[Tensor, ...] = _Differentiable.apply(step, *inputs)
    return outputs


def _is_transformed(inputs: tuple[Tensor, ...]) -> bool:
    duals = (forward_ad.unpack_dual(part).tangent is not None for part in inputs)
    return _functorch.peek_interpreter_stack() is not None or any(duals)


class _Differentiable(torch.autograd.Function):
    """A step."""

    @staticmethod
    def forward(ctx: Any, step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, ctx.constants = step.forward(*inputs)
        ctx.step = step
        ctx.save_for_backward(*inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        step, inputs, constants = ctx.step, ctx.saved_tensors, ctx.constants
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # This gradient is to be differentiated, and the passes cannot be.
            _, gradient = torch.func.vjp(lambda *inputs: step.plain(inputs, constants), *inputs)
            return None, *gradient(grads)
        return None, *step.backward(inputs, constants, grads)
