"""What each option of the family may be: one table, by which every layer checks and keeps them."""

import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any

import keras
from keras.optimizers.schedules import LearningRateSchedule

from keras_bn.errors import invalid

Check = Callable[[str, str, Any], Any]


def checked(layer: str, name: str, value: Any) -> Any:
    """Return the option as the layer keeps it; raise if it cannot be used."""
    check = CHECKS.get(f"{layer}.{name}") or CHECKS.get(name) or PARTS[name.rsplit("_", 1)[1]]
    return check(layer, name, value)


def _number(low: float, high: float = math.inf, *, optional: bool = False) -> Check:
    """Accept a finite number in [low, high], and None if it is optional."""
    limits = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
    expected = f"{'None, or ' if optional else ''}a finite number, {limits}"

    def check(layer: str, name: str, value: Any) -> float | None:
        if optional and value is None:
            return None
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise invalid(layer, name, expected, value, kind=TypeError)
        number = float(value)
        if not (low <= number <= high and math.isfinite(number)):
            raise invalid(layer, name, expected, value)
        return number

    return check


def _flag(layer: str, name: str, value: Any) -> bool:
    if value not in (True, False):
        raise invalid(layer, name, "True or False", value, kind=TypeError)
    return bool(value)


def _integer(layer: str, name: str, expected: str, value: Any) -> int:
    (number,) = _integers(layer, name, expected, value, [value])
    return number


def _integers(
    layer: str, name: str, expected: str, value: Any, items: Iterable[Any]
) -> tuple[int, ...]:
    """Return the items of an option's value as integers."""
    items = tuple(items)
    if any(isinstance(item, bool) or not hasattr(item, "__index__") for item in items):
        raise invalid(layer, name, expected, value, kind=TypeError)
    return tuple(operator.index(item) for item in items)


def _axis(layer: str, name: str, value: Any) -> int | tuple[int, ...]:
    expected = "an integer, or a tuple of different integers"
    if not isinstance(value, list | tuple):
        return _integer(layer, name, expected, value)
    axes = _integers(layer, name, expected, value, value)
    if not axes or len(set(axes)) < len(axes):
        raise invalid(layer, name, expected, value, "Name each axis that is kept once.")
    return axes[0] if len(axes) == 1 else axes


def _axis_or_none(layer: str, name: str, value: Any) -> int | tuple[int, ...] | None:
    return None if value is None else _axis(layer, name, value)


def _groups(layer: str, name: str, value: Any) -> int:
    expected = "a positive integer, or -1 for one group per channel"
    groups = _integer(layer, name, expected, value)
    if groups < 1 and groups != -1:
        raise invalid(layer, name, expected, value)
    return groups


def _size(layer: str, name: str, value: Any) -> int | None:
    expected = "None, or a positive integer"
    if value is None:
        return None
    size = _integer(layer, name, expected, value)
    if size < 1:
        raise invalid(layer, name, expected, value)
    return size


def _at_least(low: int) -> Check:
    """Accept an integer that is not below `low`."""
    expected = f"an integer, at least {low}"

    def check(layer: str, name: str, value: Any) -> int:
        number = _integer(layer, name, expected, value)
        if number < low:
            raise invalid(layer, name, expected, value)
        return number

    return check


def _mode(layer: str, name: str, value: Any) -> str:
    expected = "'standard', 'min_max' or 'mean'"
    if not isinstance(value, str):
        raise invalid(layer, name, expected, value, kind=TypeError)
    if value not in ("standard", "min_max", "mean"):
        raise invalid(layer, name, expected, value)
    return value


def _steps(layer: str, name: str, value: Any) -> tuple[int, int] | None:
    expected = "None, or two integers (start, end) with 0 <= start <= end"
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise invalid(layer, name, expected, value, kind=TypeError)
    steps = _integers(layer, name, expected, value, value)
    if len(steps) != 2 or not 0 <= steps[0] <= steps[1]:
        raise invalid(layer, name, expected, value)
    return steps[0], steps[1]


def _name(layer: str, name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise invalid(layer, name, "None, or the name of a mapped axis", value, kind=TypeError)
    return value


def _clipping(layer: str, name: str, value: Any) -> dict[str, Any] | None:
    expected = "None, or a dictionary with any of the keys 'rmin', 'rmax' and 'dmax'"
    if value is None:
        return None
    if not isinstance(value, dict):
        raise invalid(layer, name, expected, value, kind=TypeError)
    if set(value) - {"rmin", "rmax", "dmax"}:
        raise invalid(layer, name, expected, value)
    limits = {key: _limit(layer, f"{name}[{key!r}]", limit) for key, limit in value.items()}
    low, high = limits.get("rmin"), limits.get("rmax")
    if isinstance(low, float) and isinstance(high, float) and low > high:
        raise invalid(layer, name, "a dictionary with rmin <= rmax", value)
    return limits


def _limit(layer: str, name: str, value: Any) -> Any:
    """Accept None (no limit), a schedule over training steps, or a number."""
    value = _revived(value)
    if value is None or isinstance(value, LearningRateSchedule):
        return value
    return _number(0.0)(layer, name, value)


def _layers(layer: str, name: str, value: Any) -> tuple[keras.layers.Layer, ...]:
    layers = tuple(map(_revived, value)) if isinstance(value, list | tuple) else ()
    if not layers or not all(isinstance(item, keras.layers.Layer) for item in layers):
        raise invalid(layer, name, "a list of layers", value, kind=TypeError)
    return layers


def _layer_or_none(layer: str, name: str, value: Any) -> keras.layers.Layer | None:
    value = _revived(value)
    if value is not None and not isinstance(value, keras.layers.Layer):
        raise invalid(layer, name, "None, or a layer", value, kind=TypeError)
    return value


def _revived(value: Any) -> Any:
    """Return the object of a config; anything else as it is."""
    return keras.saving.deserialize_keras_object(value) if isinstance(value, dict) else value


# A layer's own check, under its name, goes before the family's.
CHECKS: dict[str, Check] = {
    "FeatureScaling.axis": _axis_or_none,
    "axis": _axis,
    "axis_name": _name,
    "batch_size": _size,
    "branch_layers": _at_least(2),
    "center": _flag,
    "data_init": _flag,
    "debias": _flag,
    "depth": _at_least(1),
    "dmax": _number(0.0),
    "dmax_steps": _steps,
    "epsilon": _number(0.0),
    "groups": _groups,
    "inverse": _flag,
    "layers": _layers,
    "mode": _mode,
    "momentum": _number(0.0, 1.0, optional=True),
    "renorm": _flag,
    "renorm_clipping": _clipping,
    "renorm_momentum": _number(0.0, 1.0),
    "rmax": _number(1.0),
    "rmax_steps": _steps,
    "scale": _flag,
    "shortcut": _layer_or_none,
    "steps": _size,
    "synchronized": _flag,
    "unbiased": _flag,
    "virtual_batch_size": _size,
}

# By the last word of the option's name: `beta_initializer`, `gamma_constraint`, ...
PARTS: dict[str, Check] = {
    "initializer": lambda _layer, _name, value: keras.initializers.get(value),
    "regularizer": lambda _layer, _name, value: keras.regularizers.get(value),
    "constraint": lambda _layer, _name, value: keras.constraints.get(value),
}
