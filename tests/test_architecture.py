"""How the package hangs together: who imports whom, and how large its parts are."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_bn

ROOT = Path(keras_bn.__file__).parent
BACKENDS = ("tensorflow", "jax", "torch")
FILES = sorted(ROOT.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))

# From the bottom to the top: a file imports from its own level and from those before it.
LEVELS = ["types", "errors", "core", "kernels", "layers", "tools"]


def level_of(module):
    """Return the level of `keras_bn.x.y`; the package itself stands above all."""
    parts = module.split(".")
    return LEVELS.index(parts[1]) if len(parts) > 1 else len(LEVELS)


def module_of(path):
    return ".".join(["keras_bn", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(
        ".__init__"
    )


def imported_by(path):
    """Return the full names of all that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@each_file
def test_imports_point_downwards(path):
    own = level_of(module_of(path))
    ours = [name for name in imported_by(path) if name.startswith("keras_bn.")]
    assert not [name for name in ours if level_of(name) > own]


@each_file
def test_only_its_own_kernel_file_imports_a_backend(path):
    found = {name.split(".")[0] for name in imported_by(path)} & set(BACKENDS)
    own = path.relative_to(ROOT / "kernels").parts[0] if "kernels" in path.parts else ""
    assert found == {own.removesuffix(".py")} & found & set(BACKENDS)


@each_file
def test_nothing_private_of_keras_is_imported(path):
    assert not [name for name in imported_by(path) if name.startswith("keras.src")]
    assert "keras.src" not in path.read_text()


@each_file
def test_imports_are_absolute(path):
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    assert not [node.lineno for node in nodes if node.level]


@each_file
def test_nothing_is_asserted(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)]


@each_file
def test_file_has_at_most_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


@each_file
def test_function_has_at_most_40_lines(path):
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    long = {f.name: body_lines(f) for f in functions if body_lines(f) > 40}
    assert not long


def body_lines(function):
    """Count the lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_the_core_has_no_layer_and_no_variable():
    text = "".join(path.read_text() for path in (ROOT / "core").glob("*.py"))
    assert "keras.layers" not in text
    assert "add_weight" not in text


@pytest.mark.parametrize("module", [keras_bn, keras_bn.layers], ids=lambda module: module.__name__)
def test_public_names_are_sorted_and_there(module):
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_layers_are_public_at_both_places():
    assert set(keras_bn.layers.__all__) == set(keras_bn.__all__) - {"layers"}
    assert all(getattr(keras_bn, n) is getattr(keras_bn.layers, n) for n in keras_bn.layers.__all__)


@pytest.mark.parametrize("name", keras_bn.layers.__all__)
def test_layer_is_registered_under_its_name(name):
    assert keras.saving.get_registered_name(getattr(keras_bn, name)) == f"keras_bn>{name}"


def test_version_is_the_installed_one():
    try:
        installed = importlib.metadata.version("keras-bn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("keras-bn is not installed")
    assert installed == keras_bn.__version__


def test_package_is_marked_as_typed():
    assert (ROOT / "py.typed").exists()


def new_modules(statement):
    """Return what a statement imports in a new process that has Keras already."""
    code = (
        "import sys, keras; before = set(sys.modules)\n"
        f"{statement}\n"
        "print(*(set(sys.modules) - before))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1].split()


def test_import_brings_in_no_other_backend():
    modules = new_modules("import keras_bn")
    # Keras itself imports more than it needs; keras_bn must add none.
    others = [name for name in BACKENDS if name != keras.backend.backend()]
    assert not [name for name in modules if name.split(".")[0] in others]
    kernels = {f"keras_bn.kernels.{name}" for name in BACKENDS}
    assert kernels & set(modules) == {f"keras_bn.kernels.{keras.backend.backend()}"}
