"""Predict with saved models, in a process that did not build them.

    python examples/predict_saved.py INPUTS.npy PREDICTIONS.npz MODEL.keras ...

Loads each model, predicts for the array in INPUTS.npy, and writes PREDICTIONS.npz with one array
per model, named like its file without the ending. Prints one line when done.
"""

import argparse
from pathlib import Path

import keras
import numpy as np

import keras_bn  # noqa: F401 - importing it is all that load_model needs to find the layers


def predict(model: Path, inputs: np.ndarray) -> np.ndarray:
    """Return what the model in the file `model` predicts for `inputs`."""
    return np.asarray(keras.ops.convert_to_numpy(keras.saving.load_model(model)(inputs)))


def main() -> None:
    """Predict with every model that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("inputs", type=Path)
    parser.add_argument("predictions", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    options = parser.parse_args()

    inputs = np.load(options.inputs)
    np.savez(options.predictions, **{path.stem: predict(path, inputs) for path in options.models})
    print(f"A new process loaded {len(options.models)} models and predicted with each.")


if __name__ == "__main__":
    main()
