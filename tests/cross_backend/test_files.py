"""What one backend saves, every other loads, each in a process of its own."""

import fcntl
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
SAVERS = ["tensorflow", "jax", "torch"]
# NumPy and OpenVINO only infer.
LOADERS = [*SAVERS, "numpy", *(["openvino"] if find_spec("openvino") else [])]

every_saver = pytest.mark.parametrize("saver", SAVERS)
not_installed = pytest.mark.skipif(not find_spec("openvino"), reason="openvino is not installed")
every_loader = pytest.mark.parametrize(
    "loader", [*SAVERS, "numpy", pytest.param("openvino", marks=not_installed)]
)
every_file = pytest.mark.parametrize("file", ["keras", "weights.h5"])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return a folder with what every backend saved and loaded, made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "cross_backend"
    with open(base / "cross_backend.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            run_all("save", SAVERS, folder)
            run_all("load", LOADERS, folder)
    return folder


def run_all(action, backends, folder):
    """Let each backend do it, at the same time."""
    command = [sys.executable, WORKER, action, folder]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for backend in backends
    ]
    errors = [process.communicate()[1] for process in started]
    failed = [error for process, error in zip(started, errors, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)


def read(folder, name):
    with np.load(folder / f"{name}.npz") as arrays:
        return dict(arrays)


@every_file
@every_saver
@every_loader
def test_predictions_are_equal(saver, loader, file, folder):
    found, wanted = read(folder, f"{loader} from {saver}.{file}"), read(folder, saver)
    # OpenVINO 2026.4 takes (x - center)·scale apart: 8·u·(1 + κ) is left, κ = 100. It multiplies
    # matrices in bfloat16 where the processor can.
    outputs = {"norms": 5e-5} if loader == "openvino" else {"norms": 1e-5, "y": 1e-5}
    for output, tolerance in outputs.items():
        np.testing.assert_allclose(found[output], wanted[output], rtol=0, atol=tolerance)


@every_file
@every_saver
@every_loader
def test_weights_are_the_same_bits(saver, loader, file, folder):
    found, wanted = read(folder, f"{loader} from {saver}.{file}"), read(folder, saver)
    for output in ("norms", "y"):
        found.pop(output), wanted.pop(output)
    np.testing.assert_equal(list(found.values()), list(wanted.values()))


@every_saver
def test_saved_statistics_have_moved(saver, folder):
    saved = read(folder, saver)
    moving = {name: value for name, value in saved.items() if "moving" in name or "renorm_" in name}
    assert len(moving) == 2 + 2 + 5 + 2 + 2 + 3 + 2
    assert all(((value != 0) & (value != 1)).any() for value in moving.values())
    assert [int(v) for name, v in saved.items() if name.endswith("step")] == [3, 3]


def test_training_on_numpy_is_refused_by_keras(folder):
    environment = os.environ | {"KERAS_BACKEND": "numpy", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, WORKER, "save", folder]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "NotImplementedError: fit not implemented for NumPy backend." in result.stderr
