"""Networks trained with `fit` under `keras.distribution`, beside the same on one device.

    python tests/distributed/jax_fit.py

As a program, on virtual devices: prints as JSON how far the weights of each case are from those of
one device, and what its compiled step sends.
"""

import json
import math
import re
import sys
from itertools import zip_longest

import jax
import keras
import numpy as np
from keras import distribution as parallel

import keras_bn

SAMPLES, STEPS = 16, 4
WIDE = 4096  # features, from which on a sum over a short batch is a product

# NumPy draws the kernels: several processes draw others than one does, and take seconds for each
# (Keras 3.15.1, jax 0.10.2).
LINEAR = {"use_bias": False, "kernel_initializer": "zeros"}
NORMS = {
    "plain": [],
    "synchronized": [
        lambda: keras_bn.BatchNormalization(momentum=0.5, synchronized=True),
        lambda: keras_bn.BatchRenormalization(
            momentum=0.5, rmax_steps=(0, 2), dmax_steps=(0, 2), synchronized=True
        ),
    ],
    "ghosts": 2 * [lambda: keras_bn.BatchNormalization(virtual_batch_size=4, synchronized=True)],
}


def images(norms: str) -> keras.Model:
    """Return a convolutional network, with two normalization layers or without."""
    parts = [keras.Input((6, 6, 2))]
    for filters, norm in zip_longest((8, 16), NORMS[norms]):
        parts.append(keras.layers.Conv2D(filters, 3, padding="same", **LINEAR))
        parts += [norm()] if norm else []
        parts.append(keras.layers.Activation("tanh"))
    return _compiled([*parts, keras.layers.GlobalAveragePooling2D()], rate=0.1)


def table(norms: str) -> keras.Model:
    """Return a network of wide dense layers, with two normalization layers or without."""
    parts = [keras.Input((6,))]
    for width, norm in zip_longest((WIDE, WIDE), NORMS[norms]):
        parts.append(keras.layers.Dense(width, **LINEAR))
        parts += [norm()] if norm else []
        parts += [keras.layers.Activation("tanh"), keras.layers.Dense(8, **LINEAR)]
    return _compiled(parts, rate=1e-3)


def _compiled(parts: list[keras.layers.Layer], rate: float) -> keras.Model:
    model = keras.Sequential([*parts, keras.layers.Dense(4, **LINEAR)])
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        if variable.name == "kernel":
            width = np.sqrt(np.prod(variable.shape[:-1]))
            variable.assign(rng.normal(size=variable.shape) / width)
    model.compile(keras.optimizers.SGD(rate), "mse")
    return model


def data(model: keras.Model) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch for each step, one after the other."""
    rng, samples = np.random.default_rng(0), SAMPLES * STEPS
    x = rng.normal(3, 1, (samples, *model.input_shape[1:])).astype("float32")
    return x, rng.normal(size=(samples, 4)).astype("float32")


def trained(model: keras.Model) -> list[np.ndarray]:
    """Return the weights after a pass over the data."""
    x, y = data(model)
    model.fit(x, y, batch_size=SAMPLES, shuffle=False, verbose=0)
    return [np.asarray(v.value) for v in model.weights]


def difference(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Return the largest difference, relative to 1 + |wanted|."""
    pairs = zip(found, wanted, strict=True)
    return max(float(np.max(np.abs(a - b) / (1 + np.abs(b)))) for a, b in pairs)


def sent(model: keras.Model) -> dict[str, list[int]]:
    """Return the collectives of the step that `fit` compiled, each with its number of elements."""
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in groups)
    shardings = tuple([value.sharding for value in group] for group in state)
    layout = parallel.distribution().get_data_layout
    batch = [
        jax.device_put(part[:SAMPLES], layout(part.shape).backend_layout) for part in data(model)
    ]
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, shardings))
    return collectives(step.lower(state, tuple(batch)).compile().as_text())


def collectives(text: str) -> dict[str, list[int]]:
    """Return the collectives in a text of XLA, each with its number of elements."""
    found: dict[str, list[int]] = {}
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    for shapes, name in re.findall(rf" = (\S.*?) ({names})(?:-start)?\(", text):
        sizes = [size.split(",") for size in re.findall(r"\[([\d,]*)\]", shapes)]
        elements = sum(math.prod(int(n or 1) for n in size) for size in sizes)
        found.setdefault(name, []).append(elements)
    return found


def model_parallel() -> parallel.ModelParallel:
    """Return 2 x 4 devices, over which kernels and what belongs to their channels are split."""
    mesh = parallel.DeviceMesh((2, 4), ["batch", "model"], parallel.list_devices())
    layouts = parallel.LayoutMap(mesh)
    layouts[".*conv2d.*kernel"] = (None, None, None, "model")
    layouts[".*normalization.*(gamma|beta|moving_mean|moving_variance)"] = ("model",)
    return parallel.ModelParallel(layout_map=layouts, batch_dim_name="batch")


CASES = {
    f"{how.__name__}, {network.__name__}, {norms}": (how, network, norms)
    for how, network, names in (
        (parallel.DataParallel, images, ("plain", "synchronized", "ghosts")),
        (parallel.DataParallel, table, ("plain", "synchronized")),
        (model_parallel, images, ("plain", "synchronized")),
    )
    for norms in names
}


def devices() -> dict[str, dict]:
    """Return what each case sends and how far its weights are from those of one device."""
    networks = {(network, norms) for _, network, norms in CASES.values()}
    alone = {(network, norms): trained(network(norms)) for network, norms in networks}
    found = {}
    for name, (how, network, norms) in CASES.items():
        parallel.set_distribution(how())
        model = network(norms)
        far = difference(trained(model), alone[network, norms])
        found[name] = {"difference": far, "sent": sent(model)}
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(devices()))
