"""Starts the workers of a cluster, each a process that runs `tensorflow_worker.py`.

python tests/distributed/tensorflow_workers.py TASK FOLDER
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

WORKERS = 2
ADDRESS = "127.0.0.1"
WORKER = Path(__file__).with_name("tensorflow_worker.py")
DIED = 9  # the exit status of a worker that was to die


def main() -> None:
    """Start the workers and wait until all have ended; fail if one failed."""
    addresses = [f"{ADDRESS}:{reserved_port()}" for _ in range(WORKERS)]
    workers = []
    for index in range(WORKERS):
        task = {"type": "worker", "index": index}
        cluster = {"cluster": {"worker": addresses}, "task": task}
        environment = os.environ | {"TF_CONFIG": json.dumps(cluster)}
        workers.append(subprocess.Popen([sys.executable, WORKER, *sys.argv[1:]], env=environment))
    sys.exit(any({worker.wait() for worker in workers} - {0, DIED}))


def reserved_port() -> int:
    """Return a port that the system gives to nobody who does not ask for it by number.

    TensorFlow must know all ports before a worker has one. A connection that was closed here keeps
    its port out of the system's choice for a minute.
    """
    with socket.create_server((ADDRESS, 0)) as server:
        port = int(server.getsockname()[1])
        with socket.create_connection((ADDRESS, port)):
            server.accept()[0].close()
    return port


if __name__ == "__main__":
    main()
