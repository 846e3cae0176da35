"""Time synchronized batch normalization beside the scheme of torch.nn.SyncBatchNorm, over gloo.

    python benchmarks/synchronized.py

Two processes on this machine, a stack of 20 layers, forward and backward. SyncBatchNorm itself
refuses tensors on the CPU (torch 2.13), so its scheme is stated again here: one all-gather of
mean, reciprocal deviation and count forward, one all-reduce of the two sums backward. What is
timed goes in turn, in one group; `ratio` is to the scheme, the median over the rounds. The scheme
is timed as a bare module of torch.nn and as a Keras layer: every Keras layer takes its share of
Python around its `call`. First, in one process, what `synchronized=True` costs where there is
nothing to synchronize.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "torch")
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import torch
from measuring import heading, in_turn, ratio, table
from torch import distributed

import keras_bn

LAYERS, RANKS, EPSILON, MOMENTUM = 20, 2, 1e-3, 0.99
# Of a process' batch, channels last.
SHAPES = [(8, 8, 8, 64), (16, 16, 16, 64), (8, 32, 32, 64), (16, 8, 8, 512)]
COLLECTIVES = ("all_gather", "all_reduce")


class Scheme(torch.autograd.Function):
    """SyncBatchNorm's way of sharing statistics."""

    @staticmethod
    def forward(ctx: Any, x: Any, gamma: Any, beta: Any) -> Any:
        """Gather mean, reciprocal deviation and count, and merge them."""
        axes, channels = tuple(range(x.ndim - 1)), x.shape[-1]
        variance, mean = torch.var_mean(x, axes, correction=0)
        count = mean.new_full((1,), x.numel() // channels)
        own = torch.cat([mean, torch.rsqrt(variance + EPSILON), count])
        gathered = own.new_empty((RANKS, len(own)))
        distributed.all_gather(list(gathered.unbind()), own)
        means, inverses, counts = gathered.split([channels, channels, 1], 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        squares = inverses**-2 - EPSILON + (means - mean) ** 2
        variance = (counts * squares).sum(0) / total
        inverse = torch.rsqrt(variance + EPSILON)
        ctx.save_for_backward(x, gamma, mean, inverse, total)
        ctx.mark_non_differentiable(mean, variance)
        scale = gamma * inverse
        return torch.addcmul(beta - mean * scale, x, scale), mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Any, *_: Any) -> Any:
        """Reduce Σ dy and Σ dy·(x - mean)."""
        x, gamma, mean, inverse, total = ctx.saved_tensors
        axes, channels = tuple(range(x.ndim - 1)), x.shape[-1]
        centered = x - mean
        first, second = dy.sum(axes), (dy * centered).sum(axes)
        both = torch.cat([first, second])
        distributed.all_reduce(both)
        level, slope = (both / total).split(channels)
        terms = centered.mul_(inverse * inverse * slope).add_(level)
        return (dy - terms).mul_(gamma * inverse), second * inverse, first


class SchemeLayer(torch.nn.Module):
    """A layer that does so, with moving statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.ones(channels))
        self.beta = torch.nn.Parameter(torch.zeros(channels))
        self.register_buffer("moving_mean", torch.zeros(channels))
        self.register_buffer("moving_variance", torch.ones(channels))

    def forward(self, x: Any) -> Any:
        """Normalize, and move the statistics."""
        y, mean, variance = Scheme.apply(x, self.gamma, self.beta)
        with torch.no_grad():
            self.moving_mean.lerp_(mean, 1 - MOMENTUM)
            self.moving_variance.lerp_(variance, 1 - MOMENTUM)
        return y


class KerasSchemeLayer(keras.layers.Layer):
    """The same as a Keras layer."""

    def build(self, input_shape: Any) -> None:
        """Create what a batch normalization has."""
        shape = input_shape[-1:]
        self.gamma = self.add_weight(shape=shape, initializer="ones")
        self.beta = self.add_weight(shape=shape, initializer="zeros")
        self.moving_mean = self.add_weight(shape=shape, initializer="zeros", trainable=False)
        self.moving_variance = self.add_weight(shape=shape, initializer="ones", trainable=False)

    def call(self, x: Any) -> Any:
        """Normalize, and move the statistics."""
        y, mean, variance = Scheme.apply(x, self.gamma.value, self.beta.value)
        self._move(self.moving_mean, mean)
        self._move(self.moving_variance, variance)
        return y

    def _move(self, variable: Any, new: Any) -> None:
        variable.assign(variable * MOMENTUM + new * (1 - MOMENTUM))


def ours(synchronized: bool, shape: tuple[int, ...]) -> Callable[[Any], Any]:
    """Return one of our layers, in training."""
    layer = keras_bn.BatchNormalization(synchronized=synchronized)
    layer.build((None, *shape[1:]))
    return lambda x: layer(x, training=True)


def keras_scheme(shape: tuple[int, ...]) -> Callable[[Any], Any]:
    """Return the scheme as a built Keras layer."""
    layer = KerasSchemeLayer()
    layer.build((None, *shape[1:]))
    return layer


def step_of(make: Callable[[], Callable[[Any], Any]], shape: tuple[int, ...]) -> Callable:
    """Return a step through a stack of layers."""
    stack = [make() for _ in range(LAYERS)]
    data = torch.randn(shape)

    def step() -> Any:
        x = y = data.clone().requires_grad_()
        for layer in stack:
            y = layer(y)
        y.sum().backward()
        return x.grad

    return step


def collectives(step: Callable[[], object]) -> int:
    """Count the collectives of a step."""
    wrapped = {name: mock.Mock(wraps=getattr(distributed, name)) for name in COLLECTIVES}
    with mock.patch.multiple(distributed, **wrapped):
        step()
    return sum(call.call_count for call in wrapped.values())


def measured(shape: tuple[int, ...], rounds: int) -> list[tuple[str, ...]]:
    """Return a line for each way to do it."""
    steps = {
        "synchronized": step_of(lambda: ours(True, shape), shape),
        "SyncBatchNorm's scheme": step_of(lambda: SchemeLayer(shape[-1]), shape),
        "the same, Keras layer": step_of(lambda: keras_scheme(shape), shape),
        "not synchronized": step_of(lambda: ours(False, shape), shape),
    }
    counts = {name: collectives(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            distributed.barrier()
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    scheme = times["SyncBatchNorm's scheme"]
    return [
        (
            "x".join(map(str, shape)),
            name,
            f"{statistics.median(times[name]) / LAYERS * 1e3:.2f}",
            f"{ratio(times[name], scheme):.2f}",
            f"{counts[name] / LAYERS:g}",
        )
        for name in steps
    ]


def work(rank: int, folder: str, rounds: int, markdown: bool) -> None:
    """Be one process; the first one prints."""
    torch.set_num_threads(1)
    store = distributed.FileStore(os.path.join(folder, "store"), RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    lines = [("batch of a process", "layer", "ms per layer", "ratio", "collectives per layer")]
    for shape in SHAPES:
        lines += measured(shape, rounds)
    if rank == 0:
        print(f"\n{RANKS} processes\n\n{table(lines, markdown)}", flush=True)
    distributed.destroy_process_group()


def without_an_engine(shape: tuple[int, ...]) -> str:
    """Return what `synchronized=True` costs in one process."""
    steps = {
        str(flag): step_of(lambda flag=flag: ours(flag, shape), shape) for flag in (True, False)
    }
    times = in_turn(steps, 3.0)
    share = ratio(times["True"], times["False"])
    return f"one process: `synchronized=True` takes {share:.2f} times as long as without"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=31, help="default 31")
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("forkserver")
    print(heading())
    print(f"\n{without_an_engine(SHAPES[0])}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, options.rounds, options.markdown)
        processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))


if __name__ == "__main__":
    main()
