"""What the benchmarks share: paired timings, the streaming limit, tables, processes."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np

BACKENDS = ("tensorflow", "jax", "torch")


def in_turn(steps: dict[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, list[float]]:
    """Time several functions in turn, so that what disturbs one disturbs all.

    Every second round goes backwards: what a function leaves in the caches and in the allocator
    is found by each of the others, and by itself, not always by the same one.

    Args:
        steps: Functions that return when their work is done; each is called twice beforehand.
        seconds: About how long to measure; at least 7 rounds, at most 101.

    Returns:
        The seconds of every round, for each function.
    """
    warm = 0.0
    for step in steps.values():
        step()
        start = time.perf_counter()
        step()
        warm += time.perf_counter() - start
    rounds = min(101, max(7, int(seconds / max(warm, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps.items())
    for _ in range(rounds):
        for name, step in order:
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
        order.reverse()
    return times


def ratio(rival: list[float], ours: list[float]) -> float:
    """Return how many times faster we are: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(rival, ours, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean."""
    return float(np.exp(np.mean(np.log(list(values)))))


def streaming_bandwidth(nbytes: int, engine: Any) -> float:
    """Return the bytes per second of the best single pass that reads and writes so many bytes."""
    source = np.ones(nbytes // 4, "float32")
    target = np.empty_like(source)
    passes: dict[str, Callable[[], object]] = {"numpy": lambda: np.copyto(target, source)}
    passes["backend"] = engine.stream(engine.tensor(source, "float32"))
    times = in_turn(passes, 0.3)
    return 2 * source.nbytes / min(min(rounds) for rounds in times.values())


def heading(*packages: str) -> str:
    """Name the backend, the versions, the processor and its cores."""
    name = keras.backend.backend()
    named = ", ".join(f"{p} {version(p)}" for p in (name, "keras", *packages))
    return f"### {named}; {processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(lines: list[tuple[str, ...]], markdown: bool) -> str:
    """Return the lines, the first of which is the head, in Markdown or in columns."""
    if markdown:
        ruled = [lines[0], ("---",) * len(lines[0]), *lines[1:]]
        return "\n".join(f"| {' | '.join(line)} |" for line in ruled)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def printed_by(script: str, backend: str, *arguments: str) -> str:
    """Return what a script prints in a process of its own on a backend."""
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def replace(path: Path, name: str, text: str) -> None:
    """Put a text between the marks of that name in a file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
