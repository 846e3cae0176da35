"""What half precision may cost: one rounding of each result."""

from typing import Any

import keras
import numpy as np

from tests.kernels import hard
from tests.oracle import expected, weights_by_name


def check_rounded_once(
    layer: Any, x: np.ndarray, dy: np.ndarray, axes: tuple[int, ...], dtype: str, run: Any
) -> None:
    """Compare a layer in half precision with the oracle; its parameters vary along other axes."""
    half = [keras.ops.cast(keras.ops.convert_to_tensor(part), dtype) for part in (x, dy)]
    exact = [keras.ops.convert_to_numpy(keras.ops.cast(part, "float32")) for part in half]
    wanted = expected(layer, weights_by_name(layer), *exact, training=True)
    found = run(layer, *half)
    ulp = 2 * hard.unit_roundoff(dtype)
    assert hard.share(found.y - wanted.y, 0.51 * ulp * np.abs(wanted.y) + 1e-5) <= 1
    assert hard.share(found.dx - wanted.dx, 2 * ulp * (1 + np.abs(wanted.dx))) <= 1
    for name, gradient in wanted.gradients.items():
        bound = 1e-5 * np.abs(exact[1]).sum(axes)
        assert hard.share(found.gradients[name] - gradient, bound) <= 1
