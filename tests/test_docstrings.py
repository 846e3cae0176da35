"""The examples in the docstrings run, and the docstrings speak of every option."""

import doctest
import inspect

import pytest

import keras_bn

PUBLIC = [getattr(keras_bn, name) for name in keras_bn.__all__]
CLASSES = [item for item in PUBLIC if inspect.isclass(item)]
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)

# In the order of CONTRIBUTING.md.
SECTIONS = [
    "Args:",
    "Call arguments:",
    "Shapes:",
    "Raises:",
    "Example:",
    "Differences:",
    "References:",
]


@each_class
def test_example_runs(cls):
    (example,) = doctest.DocTestFinder(recurse=False).find(cls, cls.__name__, globs={})
    report = []
    found = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert (found.failed, found.attempted >= 3) == (0, True), "".join(report)


@each_class
def test_example_compares_with_the_formula(cls):
    example = inspect.getdoc(cls).partition("Example:")[2]
    assert "np.allclose(" in example
    assert f"keras_bn.{cls.__name__}(" in example


@each_class
def test_every_option_is_described(cls):
    described = section(cls, "Args:")
    options = [
        p.name for p in inspect.signature(cls).parameters.values() if p.kind != p.VAR_KEYWORD
    ]
    assert [line.split(":")[0] for line in described if ":" in line][: len(options)] == options


@each_class
def test_every_argument_of_the_call_is_described(cls):
    described = {line.split(":")[0] for line in section(cls, "Call arguments:")}
    call = getattr(cls, "call", cls.__call__)  # an initializer is called directly
    assert set(inspect.signature(call).parameters) - {"self"} <= described


@each_class
def test_sections_stand_in_order(cls):
    lines = inspect.getdoc(cls).splitlines()
    found = [line for line in lines if line in SECTIONS]
    assert found == SECTIONS


def section(cls, title):
    """Return the entries of a section, without their further lines."""
    lines = inspect.getdoc(cls).splitlines()
    start = lines.index(title) + 1
    end = next(i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith(" "))
    return [line[4:] for line in lines[start:end] if line[4:5].strip()]
