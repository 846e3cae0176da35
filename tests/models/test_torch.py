"""Layers do what PyTorch allows beside training with Keras."""

import keras
import numpy as np
import pytest

from tests.models.networks import LAYERS, assert_close, images, layer_like

if keras.backend.backend() != "torch":
    pytest.skip("these are properties of PyTorch", allow_module_level=True)

import torch

every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
def test_activation_in_place_changes_no_gradient(name):
    def gradients(activation):
        layer = layer_like(LAYERS[name]())
        x = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5, 5, 4))).float()
        x.requires_grad_()
        variables = [v.value for v in layer.trainable_variables]
        y = activation(layer(x * 1, training=True))
        return torch.autograd.grad((y**2).sum(), [x, *variables])

    assert all(map(torch.equal, gradients(torch.relu_), gradients(torch.relu)))


@every_layer
def test_compiled_layer_takes_batches_of_any_size(name, run):
    layer = layer_like(LAYERS[name]())
    compiled = torch.compile(
        lambda x: layer(x, training=True), backend="aot_eager", fullgraph=True, dynamic=True
    )
    x = [torch.from_numpy(images(count)[..., [0, 1, 2, 0]]) for count in (2, 3, 5)]
    found = [compiled(part).detach().numpy() for part in x]
    other = layer_like(layer)
    assert_close(found, [other(part, training=True).detach().numpy() for part in x])
