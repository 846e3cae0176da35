"""The threads of the passes in C, where no OpenMP runtime has any."""

import subprocess
import sys

import pytest

from keras_bn.kernels.compiled import place

# Only the library: what else would be loaded has threads of its own.
PROGRAM = """
import ctypes, os, random, sys, threading
library = ctypes.CDLL(sys.argv[1])
ROWS, COLUMNS = 3000, 100
x = (ctypes.c_float * (ROWS * COLUMNS))(*(random.random() for _ in range(ROWS * COLUMNS)))
numbers = [ROWS, COLUMNS, COLUMNS, 1, *[0] * 6, 0, 1, 0, 0]
nest = (ctypes.c_int64 * len(numbers))(*numbers)

def sums(threads):
    out = (ctypes.c_float * (3 * COLUMNS))()
    done = library.keras_bn_moments(2, nest, x, 0, None, None, ctypes.c_double(ROWS), 1,
                                    ctypes.c_int64(COLUMNS), out, threads)
    return bytes(out) if done else None

wanted = {n: sums(n) for n in (1, 2, 5, 200)}
assert None not in wanted.values()
for found in wanted.values():
    pivots, offsets = (memoryview(found).cast("f")[i * COLUMNS :][:COLUMNS] for i in range(2))
    means = [sum(x[j::COLUMNS]) / ROWS for j in range(COLUMNS)]
    assert all(abs(p + d - mean) < 1e-9 for p, d, mean in zip(pivots, offsets, means))

def repeat(threads, wrong):
    wrong.extend(n for _ in range(50) for n in threads if sums(n) != wanted[n])

def all_at_once():
    wrong = []
    callers = [threading.Thread(target=repeat, args=((1, 2, 5, 200), wrong)) for _ in range(6)]
    for caller in callers: caller.start()
    for caller in callers: caller.join()
    return not wrong

assert all_at_once()
child = os.fork()
if not child:
    os._exit(0 if all_at_once() else 1)
assert os.waitpid(child, 0)[1] == 0
print("the same")
"""


@pytest.mark.skipif(place("passes") is None, reason="built without a compiler, or switched off")
def test_many_calls_at_once_and_a_child_sum_as_one_thread_at_a_time():
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, place("passes")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout == "the same\n", done.stderr[-2000:]
