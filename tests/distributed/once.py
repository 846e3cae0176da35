"""Results of a long program, made once for all of pytest's workers."""

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> dict[str, Any]:
    """Return what a program writes, as `pickle` reads it.

    Args:
        factory: Of folders; those of all workers of `pytest-xdist` lie in one.
        name: Of the program's results.
        make: Runs the program, with a path to write to.
    """
    folder = factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / f"{name}.pickle"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(path)
    return pickle.loads(path.read_bytes())
