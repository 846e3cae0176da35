"""Time a training step of whole networks, with our layers and with Keras' own, and their memory.

    python benchmarks/networks.py [--backend jax]   all backends, or one

ResNet-50 of keras.applications, 128×128, batch 8, SGD: as it is (BatchNormalization), and with
GroupNormalization(32) in place of each BatchNormalization. Both are trained with `train_on_batch`,
as Keras compiles them for the backend by default, in turn in one process; the ratio is the median
over the rounds. Peak memory is the largest resident set of a process that does three steps with
one of them alone, less what it held before the network was made.
"""

import argparse
import json
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
from measuring import BACKENDS, heading, in_turn, printed_by, ratio, table

import keras_bn

BATCH, SIZE, CLASSES = 8, 128, 1000
HEAD = ("network", "layers", "ms a step", "x Keras", "peak memory, MiB")
LAYERS: dict[str, dict[str, Callable[..., keras.layers.Layer]]] = {
    "ResNet-50": {
        "Keras": keras.layers.BatchNormalization,
        "ours": keras_bn.BatchNormalization,
    },
    "ResNet-50, groups": {
        "Keras": keras.layers.GroupNormalization,
        "ours": keras_bn.GroupNormalization,
    },
}


def main() -> None:
    """Measure one backend here, or each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, help="default: all")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(peak_memory(*options.memory)))
    elif options.backend == keras.backend.backend():
        print(heading(), "", table([HEAD, *rows()], markdown=True), "", sep="\n", flush=True)
    else:
        for backend in [options.backend] if options.backend else BACKENDS:
            print(printed_by(__file__, backend, "--backend", backend), flush=True)


def rows() -> list[tuple[str, ...]]:
    """Measure each network with both layers."""
    found = []
    for network, makers in LAYERS.items():
        times = in_turn({name: step(made(make)) for name, make in makers.items()}, seconds=12.0)
        for name in makers:
            peak = json.loads(
                printed_by(__file__, keras.backend.backend(), "--memory", network, name)
            )
            faster = f"{ratio(times['Keras'], times[name]):.2f}"
            milliseconds = f"{1e3 * statistics.median(times[name]):.0f}"
            found.append((network, name, milliseconds, faster, f"{peak:.0f}"))
    return found


def peak_memory(network: str, name: str) -> float:
    """Return how much the process grew over three steps [MiB]."""
    before = resident()
    train = step(made(LAYERS[network][name]))
    for _ in range(3):
        train()
    return resident() - before


def resident() -> float:
    """Return the largest resident set of this process so far [MiB]."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` says there includes what the parent held
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1 if sys.platform == "darwin" else 1024
    )


def made(normalization: Callable[..., keras.layers.Layer]) -> keras.Model:
    """Return the network with this layer for each BatchNormalization, ready to train."""
    keras.utils.set_random_seed(0)
    shape = (SIZE, SIZE, 3)
    stock = keras.applications.ResNet50(weights=None, input_shape=shape, classes=CLASSES)

    def replaced(layer: keras.layers.Layer) -> keras.layers.Layer:
        if not isinstance(layer, keras.layers.BatchNormalization):
            return layer.__class__.from_config(layer.get_config())
        return normalization(axis=layer.axis, epsilon=layer.epsilon, name=layer.name)

    def called(layer: keras.layers.Layer, *inputs: object, **_: object) -> object:
        return layer(*inputs)  # Keras' GroupNormalization takes neither `training` nor `mask`

    model = keras.models.clone_model(stock, clone_function=replaced, call_function=called)
    model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
    return model


def step(model: keras.Model) -> Callable[[], object]:
    """Return a training step on random images."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCH, SIZE, SIZE, 3), "float32")
    labels = rng.integers(CLASSES, size=BATCH)
    return lambda: model.train_on_batch(images, labels)


if __name__ == "__main__":
    main()
