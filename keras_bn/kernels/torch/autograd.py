"""How a step gets its derivative in PyTorch."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from keras_bn.kernels.steps import Step
from keras_bn.kernels.torch.tracing import is_transformed
from keras_bn.types import Tensor


def run(step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the step's outputs, with its derivative, and its further results.

    Of the inputs' size, only the inputs are saved. Under `torch.func` and in forward mode it is
    the plain step, which goes through everything.
    """
    if is_transformed(*inputs):
        outputs, others = step.plain(inputs, None)
        return (*outputs, *[part.detach() for part in others])
    if not torch.is_grad_enabled():
        # The compiler would mistake the arguments of a function of two inputs (torch 2.13).
        outputs, others, _ = step.forward(*inputs)
        return (*outputs, *others)
    results: tuple[Tensor, ...] = _Differentiable.apply(step, *inputs)
    return results


class _Differentiable(torch.autograd.Function):
    """A step."""

    @staticmethod
    def forward(ctx: Any, step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, others, constants = step.forward(*inputs)
        ctx.step, ctx.number, saved = step, len(outputs), list(inputs)
        # In PyTorch's hands the constants are freed, moved and counted like all that is saved.
        ctx.form = _parted(constants, saved)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*others)
        # For results without gradient PyTorch would make zeros.
        ctx.set_materialize_grads(len(outputs) > 1)
        return (*outputs, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        step, saved = ctx.step, iter(ctx.saved_tensors)
        inputs = tuple(islice(saved, len(ctx.needs_input_grad) - 1))
        constants = _joined(ctx.form, saved)
        if grads[0] is None:
            return None, *(None for _ in inputs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # This gradient is to be differentiated, and the passes cannot be.
            _, gradient = torch.func.vjp(lambda *inputs: step.plain(inputs, constants)[0], *inputs)
            return None, *gradient(grads[: ctx.number])
        return None, *step.backward(inputs, constants, grads[: ctx.number])


def _parted(values: Any, tensors: list[Tensor]) -> Any:
    """Move the tensors of nested tuples into a list, and return the tuples without them."""
    parts = []
    for value in values or ():
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            value = torch.Tensor
        parts.append(_parted(value, tensors) if isinstance(value, tuple) else value)
    return _like(values, parts)


def _joined(form: Any, tensors: Iterator[Tensor]) -> Any:
    """Undo `_parted`."""
    parts = []
    for part in form or ():
        if part is torch.Tensor:
            part = next(tensors)
        parts.append(_joined(part, tensors) if isinstance(part, tuple) else part)
    return _like(form, parts)


def _like(form: Any, parts: list[Any]) -> Any:
    """Return parts as a tuple of the same kind; None for None."""
    if form is None:
        return None
    return type(form)(*parts) if hasattr(form, "_fields") else tuple(parts)
