"""The one place where the package words its errors."""

from typing import Any


def invalid(
    layer: str,
    name: str,
    expected: str,
    value: Any,
    advice: str = "",
    *,
    kind: type[Exception] = ValueError,
    **facts: Any,
) -> Exception:
    """Word the error for an argument that cannot be used; the caller raises it.

    Args:
        layer: Name of the layer that refuses the argument.
        name: The argument.
        expected: What it must be, to follow "must be".
        value: What was received.
        advice: What the user can do, a whole sentence.
        kind: `ValueError` for values and shapes, `TypeError` for kinds.
        **facts: Other values that explain the refusal, such as the input's shape.

    Returns:
        The exception.
    """
    received = ", ".join(f"{key}={item!r}" for key, item in {name: value, **facts}.items())
    text = f"{layer}: `{name}` must be {expected}. Received: {received}."
    return kind(f"{text} {advice}".rstrip())
