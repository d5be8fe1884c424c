"""Several processes: finding each other, and what each of them owns.

Every process runs the same program (JAX's multi-controller runtime) and sees all devices; `connect`
comes before anything that touches a device. Launchers that JAX knows need no flags.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.mesh import BATCH_AXES

# Launcher -> environment variables that it sets for each of several processes.
LAUNCHERS: dict[str, tuple[str, ...]] = {
    "Slurm": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"),
    "Kubernetes": ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"),
    "TPU pod": ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"),
}
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300,
) -> bool:
    """Joins the processes of this run, if there are several; returns whether it did.

    With the three flags, or under a launcher of `LAUNCHERS`; a program that was simply started
    stays alone. `coordinator="auto"` leaves everything to JAX, for a launcher that is not there.

    Args:
      coordinator: `HOST:PORT` of process 0, the same for all, free on that machine.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: flags that are incomplete or do not fit each other.
      TimeoutError: process 0 cannot be reached in time. (A process that is not there ends those
        that wait for it, after a sentence on stderr: XLA leaves no choice.)

    >>> connect()
    False
    """
    if coordinator == "auto":
        jax.distributed.initialize(initialization_timeout=int(timeout))
        return True
    flags = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        if launcher(os.environ) is None:
            return False
        jax.distributed.initialize(initialization_timeout=int(timeout))
        return True
    if missing:
        given = [name for name in flags if name not in missing]
        raise ValueError(
            f"{' and '.join(given)} without {' and '.join(missing)}; several processes need all "
            "three, or none under a launcher that sets them"
        )
    assert coordinator is not None
    assert num_processes is not None
    assert process_id is not None
    host, port = _address(coordinator)
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process {process_id} of {num_processes} processes; they are numbered from 0 to "
            f"{num_processes - 1}"
        )
    end = time.monotonic() + timeout
    if process_id:
        _wait_for(host, port, process_id, timeout)
    # XLA ends the whole process when the time is over, so that nothing can be raised here: the
    # reason has to be said before.
    left = max(1, round(end - time.monotonic()))
    reason = (
        f"process {process_id} waited {timeout:g} s for all {num_processes} processes at "
        f"{coordinator}; are all of them started, with the same --num-processes?"
    )
    watch = threading.Timer(left, lambda: print(reason, file=sys.stderr, flush=True))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=left + 1
        )
    finally:
        watch.cancel()
    return True


def launcher(environment: Mapping[str, str]) -> str | None:
    """Returns which of `LAUNCHERS` has started several processes, or None.

    >>> launcher({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"})
    'Open MPI'
    """
    for name, variables in LAUNCHERS.items():
        if not all(variable in environment for variable in variables):
            continue
        alone = any(environment.get(count) == "1" for count in _COUNTS if count in variables)
        if not alone and "," in environment.get("TPU_WORKER_HOSTNAMES", ","):
            return name
    return None


def is_main() -> bool:
    """Whether this process is the one that writes logs and records.

    >>> is_main()
    True
    """
    return jax.process_index() == 0


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Returns the rows of a global batch of which this process's devices need some part.

    >>> from parallel.mesh import make_mesh
    >>> local_rows(make_mesh(devices=jax.devices()[:1]), 3)
    [0, 1, 2]
    """
    parts = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((rows,))
    return sorted({row for part in parts.values() if part for row in range(rows)[part[0]]})


def check_same(text: str, what: str) -> None:
    """Checks that all processes have the same text; every process must call it.

    Args:
      text: settings as JSON, say.
      what: for the message.

    Raises:
      ValueError (on every process): the text of some process differs from that of process 0.

    >>> check_same("{}", "settings")
    """
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = np.atleast_2d(multihost_utils.process_allgather(digest))
    different = [i for i, row in enumerate(digests) if (row != digests[0]).any()]
    if different:
        raise ValueError(
            f"the {what} of process {', '.join(map(str, different))} of {len(digests)} differ from "
            "those of process 0; start all processes with the same command"
        )


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"the coordinator is {coordinator!r}; write it as HOST:PORT, for instance node0:12355"
        )
    return host.strip("[]"), int(port)


def _wait_for(host: str, port: int, process_id: int, timeout: float) -> None:
    """Waits until something listens there: JAX itself ends the process where it cannot connect."""
    end = time.monotonic() + timeout
    reason: Exception = TimeoutError()
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((host, port), timeout=min(left, 5.0)).close()
            return
        except OSError as error:
            reason = error
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))
    raise TimeoutError(
        f"process {process_id} could not reach the coordinator at {host}:{port} within "
        f"{timeout:g} s ({reason}); is process 0 started there, and the port open?"
    )
