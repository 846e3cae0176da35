"""Checks of one call of a layer, each run by every process of a group at the same time."""

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import keras
import numpy as np
import torch
from torch import distributed

from tests.distributed.shards import LAYERS, PAIRS, SPACE, Shards, built, errors
from tests.oracle import expected, weights_by_name

# For three replicas.
TRIPLES = {
    "equal": Shards((3, 3, 3)),
    "5, 1 and 2": Shards((5, 1, 2)),
    "4, 0 and 4, masked": Shards((4, 0, 4), is_masked=True),
}

# All that a process may send or receive by.
COLLECTIVES = (
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_single"),
    *("all_gather_object", "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single"),
    *("barrier", "broadcast", "gather", "irecv", "isend", "monitored_barrier", "recv", "reduce"),
    *("reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "send"),
)


def tensors(shards: Shards, rank: int) -> list[Any]:
    """Return a replica's x, dy and mask."""
    parts = (shards.x, shards.dy, shards.mask)
    return [part if part is None else torch.from_numpy(shards.cut(part)[rank]) for part in parts]


def step(
    layer: Any, x: Any, dy: Any, mask: Any, wrap: Callable = lambda call: call
) -> tuple[Any, ...]:
    """Return y, dx, the gradients and the weights after the call, by name."""
    variables = layer.trainable_variables
    x.requires_grad_()
    y = wrap(layer)(x, training=True, mask=mask)
    dx, *gradients = torch.autograd.grad(y, [x, *(v.value for v in variables)], dy)
    named = {v.name: g.numpy() for v, g in zip(variables, gradients, strict=True)}
    return y.detach().numpy(), dx.numpy(), named, weights_by_name(layer)


def errors_of(shards: Shards, kind: str, members: list[int], own: tuple) -> dict[str, float]:
    """Return the errors of the members' results together."""
    everyone = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    return errors(shards, kind, *zip(*(everyone[rank] for rank in members), strict=True))


def together(folder: str, shards: Shards, kind: str, **options: Any) -> dict[str, float]:
    """Return the errors of the output, the gradients and the weights."""
    own = step(built(kind, **options), *tensors(shards, distributed.get_rank()))
    return errors_of(shards, kind, list(range(len(shards.sizes))), own)


def compiled(folder: str) -> dict[str, float]:
    """Return the errors in a group of the user's, as one compiled graph."""
    shards, layer = PAIRS["7 and 1"], built("batch", synchronized=True)
    layer.process_group = distributed.new_group([0, 1])
    own = step(
        layer,
        *tensors(shards, distributed.get_rank()),
        functools.partial(torch.compile, backend="aot_eager", fullgraph=True),
    )
    return errors_of(shards, "batch", [0, 1], own)


def in_a_group(folder: str, kind: str) -> dict[str, float]:
    """Return the errors where processes 0 and 2 are replicas, and 1 is alone."""
    groups = {(0, 2): Shards((5, 3)), (1,): Shards((4,))}
    handles = {members: distributed.new_group(list(members)) for members in groups}
    rank = distributed.get_rank()
    members = next(members for members in groups if rank in members)
    layer = built(kind, synchronized=True)
    layer.process_group = handles[members]
    own = step(layer, *tensors(groups[members], members.index(rank)))
    found = {members: errors_of(groups[members], kind, list(members), own) for members in groups}
    return found[members]


def second_order(folder: str, members: tuple[int, ...]) -> float:
    """Return the error of the gradient of Σ dx³, over all replicas, relative to its largest."""
    group = distributed.new_group(list(members))
    rank = distributed.get_rank()
    if rank not in members:
        return 0.0
    shards = Shards((5, 3))
    layer = built("batch", synchronized=True)
    layer.process_group = group
    x, dy, _ = tensors(shards, members.index(rank))
    found = cubes(lambda x: layer(x, training=True), x, dy).numpy()
    weights = {name: torch.from_numpy(w) for name, w in weights_by_name(built("batch")).items()}

    def plain(x: Any) -> Any:
        z = (x - x.mean((0, 1, 2))) / torch.sqrt(x.var((0, 1, 2), correction=0) + layer.epsilon)
        return weights["gamma"] * z + weights["beta"]

    whole = cubes(plain, *(torch.from_numpy(a).double() for a in (shards.x, shards.dy))).numpy()
    true = shards.cut(whole)[members.index(rank)]
    return float(np.max(np.abs(found - true)) / np.max(np.abs(whole)))


def cubes(call: Callable, x: Any, dy: Any) -> Any:
    """Return the gradient of Σ dx³."""
    x.requires_grad_()
    (dx,) = torch.autograd.grad(call(x), x, dy, create_graph=True)
    return torch.autograd.grad((dx**3).sum(), x)[0]


def ghosts(folder: str) -> dict[str, float]:
    """Return the errors where outputs are those of ghosts, and what is kept is of all replicas."""
    shards, rank = Shards((7, 4)), distributed.get_rank()
    layer = built("batch", synchronized=True, virtual_batch_size=3)
    y, dx, gradients, state = step(layer, *tensors(shards, rank))
    before = weights_by_name(built("batch"))
    x, dy = (shards.cut(array)[rank] for array in (shards.x, shards.dy))
    local = expected(layer, before, x, dy, training=True)
    whole = expected(built("batch"), before, shards.x, shards.dy, training=True)
    found = {"y": (y, local.y), "dx": (dx, local.dx)}
    found |= {name: (gradients[name], true) for name, true in local.gradients.items()}
    found |= {name: (state[name], true) for name, true in whole.state.items() if "moving" in name}
    return {
        name: float(np.max(np.abs(value - true) / (1 + np.abs(true))))
        for name, (value, true) in found.items()
    }


@contextmanager
def counted() -> Iterator[list[str]]:
    """Collect the names of the collectives that are called."""
    names: list[str] = []

    def counting(name: str, collective: Callable) -> Callable:
        @functools.wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return collective(*args, **kwargs)

        return call

    there = {name: getattr(distributed, name) for name in COLLECTIVES if hasattr(distributed, name)}
    with mock.patch.multiple(distributed, **{k: counting(k, v) for k, v in there.items()}):
        yield names


def calls_of_a_step(folder: str, **options: Any) -> list[list[str]]:
    """Return what is called in the forward and in the backward pass."""
    x, dy, _ = tensors(PAIRS["equal"], distributed.get_rank())
    layer = built("batch", **options)
    x.requires_grad_()
    with counted() as forward:
        y = layer(x, training=True)
    with counted() as backward:
        y.backward(dy)
    return [forward, backward]


def alone() -> Any:
    """Return a group of this process only."""
    ranks = range(distributed.get_world_size())
    groups = [distributed.new_group([rank]) for rank in ranks]
    return groups[distributed.get_rank()]


# What does not communicate: how the layer is set up, and how it is called.
SILENT: dict[str, tuple[Callable[[Any], object], bool]] = {
    "inference": (lambda layer: None, False),
    "frozen": (lambda layer: setattr(layer, "trainable", False), True),
    "one process": (lambda layer: setattr(layer, "process_group", alone()), True),
    "not synchronized": (lambda layer: setattr(layer, "synchronized", False), True),
}


def silence(folder: str, name: str, kind: str) -> dict[str, Any]:
    """Return what is called, and whether the results are those of a plain layer, to the bit."""
    set_up, training = SILENT[name]
    layer, plain = built(kind, synchronized=True), built(kind)
    plain.trainable = name != "frozen"
    set_up(layer)
    x, dy, _ = tensors(PAIRS["equal"], distributed.get_rank())
    results = []
    with counted() as calls:
        for each in (layer, plain):
            part = x.clone().requires_grad_()
            y = each(part, training=training)
            y.backward(dy)
            results.append([y.detach().numpy(), part.grad.numpy(), *each.get_weights()])
    return {"calls": calls, "is plain": all(map(np.array_equal, *results))}


def symbolic(folder: str) -> list[str]:
    """Return what is called while a model is built, and its shapes inferred."""
    layers = [make(synchronized=True) for make in LAYERS.values()]
    with counted() as calls:
        inputs = keras.Input(SPACE)
        outputs = functools.reduce(lambda x, layer: layer(x, training=True), layers, inputs)
        keras.Model(inputs, outputs).compute_output_shape((2, *SPACE))
    return calls


def table(cases: dict[str, Shards], is_synchronized: bool) -> dict[str, Callable]:
    """Return a check for each case and layer."""
    word = "" if is_synchronized else ", not synchronized"
    return {
        f"{case}, {kind}{word}": functools.partial(
            together, shards=shards, kind=kind, synchronized=is_synchronized
        )
        for case, shards in cases.items()
        for kind in LAYERS
    }


CHECKS: dict[str, Callable[[str], object]] = {
    **table(PAIRS, True),
    **table(PAIRS, False),
    **{
        f"{name}, {kind}": functools.partial(silence, name=name, kind=kind)
        for name in SILENT
        for kind in LAYERS
    },
    "symbolic": symbolic,
    "calls": functools.partial(calls_of_a_step, synchronized=True),
    "calls of ghosts": functools.partial(calls_of_a_step, synchronized=True, virtual_batch_size=2),
    "ghosts": ghosts,
    "second order": functools.partial(second_order, members=(0, 1)),
}
CHECKS_OF_THREE = operator.or_(
    table(TRIPLES, True),
    {
        "second order": functools.partial(second_order, members=(0, 2)),
        **{f"group, {kind}": functools.partial(in_a_group, kind=kind) for kind in LAYERS},
    },
)
