"""How a step gets its derivative in PyTorch."""

from typing import Any

import torch
from torch._C import _functorch  # nothing public says whether `torch.func` is at work
from torch.autograd import forward_ad

from keras_bn.kernels.steps import Step
from keras_bn.types import Tensor


def run(step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the step's outputs, with its derivative, and its further results.

    Of the inputs' size, only the inputs are saved. Under `torch.func` and in forward mode it is
    the plain step, which goes through everything.
    """
    if not torch.compiler.is_compiling() and is_transformed(*inputs):
        outputs, others = step.plain(inputs, None)
        return (*outputs, *others)
    if not torch.is_grad_enabled():
        # The compiler would mistake the arguments of a function of two inputs (torch 2.13).
        outputs, others, _ = step.forward(*inputs)
        return (*outputs, *others)
    results: tuple[Tensor, ...] = _Differentiable.apply(step, *inputs)
    return results


def is_transformed(*inputs: Tensor) -> bool:
    """Say whether `torch.func` is at work, or forward mode on one of the inputs."""
    duals = (forward_ad.unpack_dual(part).tangent is not None for part in inputs)
    return _functorch.peek_interpreter_stack() is not None or any(duals)


class _Differentiable(torch.autograd.Function):
    """A step."""

    @staticmethod
    def forward(ctx: Any, step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, others, ctx.constants = step.forward(*inputs)
        ctx.step, ctx.number = step, len(outputs)
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*others)
        # For results without gradient PyTorch would make zeros.
        ctx.set_materialize_grads(len(outputs) > 1)
        return (*outputs, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        step, inputs, constants = ctx.step, ctx.saved_tensors, ctx.constants
        if grads[0] is None:
            return None, *(None for _ in inputs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # This gradient is to be differentiated, and the passes cannot be.
            _, gradient = torch.func.vjp(lambda *inputs: step.plain(inputs, constants)[0], *inputs)
            return None, *gradient(grads[: ctx.number])
        return None, *step.backward(inputs, constants, grads[: ctx.number])
