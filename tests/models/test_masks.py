"""A masked sequence model: what stands under the mask, and how much of it, changes nothing."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_bn

NORMS = {
    "group": lambda: keras_bn.GroupNormalization(4),
    "instance": keras_bn.InstanceNormalization,
    "batch": keras_bn.BatchNormalization,
    "renormalization": lambda: keras_bn.BatchRenormalization(rmax_steps=None, dmax_steps=None),
    "ghost": lambda: keras_bn.BatchNormalization(virtual_batch_size=2),
    "layer": keras_bn.LayerNormalization,
    "rms": keras_bn.RMSNormalization,
}
each_norm = pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)


def sentences(length):
    """Return 6 sentences of 3 to 17 words, filled up with 0."""
    rng = np.random.default_rng(0)
    rows = np.zeros((6, length), "int32")
    for row, words in zip(rows, (3, 17, 8, 5, 12, 9), strict=True):
        row[:words] = rng.integers(1, 30, words)
    return rows


class Hide(keras.layers.Layer):
    """Put 0 where the mask is: the convolution that follows sees over the end of a sentence."""

    supports_masking = True

    def call(self, x, mask=None):
        return x * ops.cast(mask[..., None], x.dtype)


def classifier(make):
    """Return a model whose mask comes from the words and goes on by itself."""
    keras.utils.set_random_seed(0)
    convolution = keras.layers.Conv1D(8, 3, padding="same")
    convolution.supports_masking = True  # it keeps the length
    return keras.Sequential(
        [
            keras.layers.Embedding(30, 8, mask_zero=True),
            Hide(),
            convolution,
            make(),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3),
        ]
    )


def trained_on(make, length):
    """Return the predictions in training and in inference, and the statistics, of one length."""
    model = classifier(make)
    outputs = [model(sentences(length), training=training) for training in (True, False)]
    return [ops.convert_to_numpy(part) for part in (*outputs, *model.non_trainable_variables)]


@each_norm
def test_nothing_depends_on_the_padding(make):
    for short, long in zip(trained_on(make, 20), trained_on(make, 200), strict=True):
        bound = 64 * 2.0**-24 * (1 + np.abs(short).max())
        np.testing.assert_allclose(short, long, rtol=0, atol=bound)


def test_without_masks_the_padding_does_matter():
    short, long = (trained_on(lambda: keras.layers.GroupNormalization(4), n)[0] for n in (20, 200))
    assert np.abs(short - long).max() > 0.01
