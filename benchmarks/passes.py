"""Time the passes in C within training steps of eager PyTorch: how much of a step they are.

    KERAS_BACKEND=torch make bench BENCH=passes [ARGS="--only 'BN conv' --seconds 1"]

Before each step there is one of Keras' layer on the same tensors, so no cache holds any of ours.
`forward` are the operations of the normalization, with those that merge ghosts and move
statistics, `backward` those of its gradients, memory for their results included; `beside` them is
the rest of the step: Python, of ours and of Keras, and PyTorch's autograd. `x stream` is the time
in the operations over that in which the best streaming pass of this process moves x, y, x, dy and
dx, each once. Medians in ms.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import engines
import keras
import layers
import numpy as np
from measuring import heading, streaming_bandwidth, table

FORWARD = ("normalize", "moments", "mapped", "moved")
BACKWARD = ("gradients", "products", "mapped_products", "combined")
HEADER = ("layer", "shape", "step", "forward", "backward", "beside", "x stream")


class Clock:
    """The seconds in each operation since it was cleared."""

    def __init__(self, operations: Any) -> None:
        self.seconds: dict[str, float] = {}
        for name in FORWARD + BACKWARD:
            setattr(operations, name, self._timed(name, getattr(operations, name)))

    def _timed(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            found = operation(*arguments)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return found

        return timed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="words that a row's name must hold")
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    options = parser.parse_args()
    if keras.backend.backend() != "torch":
        sys.exit("This times the passes in PyTorch: set KERAS_BACKEND=torch.")
    from keras_bn.kernels.torch import operations  # other backends may be without PyTorch

    if not operations.DTYPES:
        sys.exit("There are no passes: built without a compiler, or switched off.")
    print(heading(), flush=True)
    clock = Clock(operations)
    chosen = [case for case in cases() if set(options.only.split()) <= set(case)]
    print(table([HEADER, *(measured(*case, clock, options.seconds) for case in chosen)], False))


def cases() -> Iterator[tuple[str, str]]:
    """List the layers and shapes."""
    for layer in layers.LAYERS:
        for shape in layers.MAIN_SHAPES:
            if layers.makes_sense(layers.Case("eager", layer, shape, "float32", True)):
                yield layer, shape


def measured(layer: str, shape: str, clock: Clock, seconds: float) -> tuple[str, ...]:
    """Return a line of the table."""
    sizes, axis = layers.SHAPES[shape]
    engine = engines.active()
    rng = np.random.default_rng(0)
    x, dy = (engine.tensor(rng.standard_normal(sizes, "float32"), "float32") for _ in range(2))
    use = {"training": True} if layer in layers.BATCH else {}
    made = [make(axis=axis, dtype="float32") for make in layers.LAYERS[layer]]
    for own in made:
        own.build(sizes)
    ours, other = (engine.layer_step(own, use, x, dy, "eager") for own in made)
    rounds = []
    end = time.perf_counter() + seconds
    while len(rounds) < 10 or time.perf_counter() < end:
        other()
        clock.seconds.clear()
        start = time.perf_counter()
        ours()
        spent = time.perf_counter() - start
        parts = [sum(clock.seconds.get(n, 0.0) for n in names) for names in (FORWARD, BACKWARD)]
        rounds.append((spent, *parts))
    step, forward, backward = (statistics.median(part) for part in zip(*rounds[2:], strict=True))
    nbytes = int(np.prod(sizes)) * 4
    stream = 5 * nbytes / streaming_bandwidth(nbytes, engine)
    times = (step, forward, backward, step - forward - backward)
    return layer, shape, *(f"{1e3 * t:.2f}" for t in times), f"{(forward + backward) / stream:.2f}"


if __name__ == "__main__":
    main()
