"""Programs that start several processes or devices, each run in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 600  # of a program, on a machine that is slow or busy with other things [s]


def run(program: str, *arguments: object, backend: str, **environment: str) -> str:
    """Run a Python program of this repository and return what it printed.

    Args:
        program: Its path from the root of the repository.
        *arguments: For its command line.
        backend: KERAS_BACKEND.
        **environment: More environment variables.

    Raises:
        AssertionError: It failed, or took more than `LIMIT`; says what it printed.
    """
    settings = {"KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / program), *map(str, arguments)],
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the processes it starts can be ended with it
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired as timeout:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"{program} took more than {LIMIT} s:\n{output}") from timeout
    if process.returncode:
        raise AssertionError(f"{program} failed ({process.returncode}):\n{output}")
    return output
