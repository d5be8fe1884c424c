"""Several processes: finding each other, and leaving when one of them cannot go on.

Every process runs the same program (JAX's multi-controller runtime) and sees all devices; `connect`
comes before anything that touches a device. Launchers that JAX knows need no flags. What the
processes then agree on is in `parallel/agreement.py`.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax

# Launcher -> environment variables that it sets for each of several processes.
LAUNCHERS: dict[str, tuple[str, ...]] = {
    "Slurm": (
        "SLURM_JOB_ID",
        "SLURM_STEP_NODELIST",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
    ),
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
    stays alone. `coordinator="auto"` leaves everything to JAX, for a cluster that shows itself by
    no environment variable.

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
    flags = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    if timeout <= 0:
        raise ValueError(f"a time limit of {timeout:g} s; give some seconds, 300 say")
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == len(flags) or coordinator == "auto":
        if coordinator == "auto" and len(missing) < 2:
            raise ValueError("--coordinator auto finds all by itself: leave the other flags out")
        found = launcher(os.environ)
        if found is None and coordinator is None:
            return False
        _initialize(f"{found or 'this launcher'}'s processes", timeout, {})
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
    where = {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    _initialize(f"all {num_processes} processes at {coordinator}", end - time.monotonic(), where)
    return True


def leave(code: int, patience: float = 5.0) -> NoReturn:
    """Ends this process for good, after an error that the others may not have met.

    Leaving in order waits for all others, and they may be waiting for this one in a collective.
    So it waits for `patience` seconds, enough where all leave at once; then the connection is
    broken off, which ends the others.

    Args:
      code: exit status.
      patience: seconds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(patience)
        os._exit(code)
    sys.exit(code)


def _initialize(whom: str, left: float, where: dict[str, Any]) -> None:
    """Joins the others, or says whom it waited for before XLA ends the process at `left` seconds.

    JAX would catch SIGTERM for itself, in C++, where Python's handlers do not see it; the loop has
    its own way to agree on when to stop (`train.stop`).
    """
    jax.config.update("jax_enable_preemption_service", False)
    # XLA ends the whole process when the time is over, so that nothing can be raised here: the
    # reason has to be said before.
    left = max(1, round(left))
    me = f"process {where['process_id']}" if where else "this process"
    reason = (
        f"{me} waited {left} s for {whom}; are all of them started, and with the same number of "
        "processes?"
    )
    watch = threading.Timer(left, lambda: print(reason, file=sys.stderr, flush=True))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(initialization_timeout=left + 1, **where)
    finally:
        watch.cancel()


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
