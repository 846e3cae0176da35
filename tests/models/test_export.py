"""A network leaves Keras, and loads where neither Keras nor this package is needed."""

import keras
import numpy as np
import pytest

from tests.models.networks import LAYERS, images, network

BACKEND = keras.backend.backend()

# The same network in another compiler: some ten layers of a few roundings.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model():
    return network()


def served_by_tensorflow(model, folder):
    import tensorflow as tf

    model.export(folder / "saved", verbose=False)
    saved = tf.saved_model.load(folder / "saved")
    return lambda x: saved.serve(x).numpy()


def served_by_torch(model, folder):
    import torch

    batch = {0: torch.export.Dim("batch")}  # otherwise Keras exports for a batch of 1
    model.export(folder / "model.pt2", format="torch", dynamic_shapes=batch, verbose=False)
    program = torch.export.load(folder / "model.pt2").module()
    return lambda x: program(torch.from_numpy(x)).detach().numpy()


# Keras writes a SavedModel on TensorFlow and JAX, and torch's own format on torch.
SERVED = {"torch": served_by_torch}.get(BACKEND, served_by_tensorflow)


def test_exported_model_predicts_the_same(model, tmp_path):
    served = SERVED(model, tmp_path)
    found = [served(images(count)) for count in (1, 6)]
    wanted = [model.predict(images(count), verbose=0) for count in (1, 6)]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(wanted), atol=TOLERANCE)


def test_summary_names_every_layer(model):
    lines = []
    model.summary(print_fn=lines.append)
    assert all(name in "\n".join(lines) for name in LAYERS)


def test_plot_names_every_layer(model):
    pytest.importorskip("pydot", reason="keras.utils.model_to_dot needs pydot")
    text = keras.utils.model_to_dot(model, show_layer_names=True).to_string()
    assert all(name in text for name in LAYERS)
