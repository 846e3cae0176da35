"""What all examples print: the versions they ran with, and a table."""

import importlib
from collections.abc import Iterable, Sequence

import keras

import keras_bn


def versions() -> str:
    """Return the versions of keras_bn, Keras and the backend in use, on one line."""
    backend = importlib.import_module(keras.config.backend())
    modules = (keras_bn, keras, backend)
    return ", ".join(f"{module.__name__} {module.__version__}" for module in modules)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of text as an aligned table: the first column to the left, others to the right.

    Args:
        header: The names of the columns.
        rows: One text per column each.

    Returns:
        Lines for the terminal, a rule under the header.
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(_line(cells, widths) for cells in (header, rule, *lines[1:]))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join([first, *others])
