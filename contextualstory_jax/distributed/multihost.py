"""Several processes as one run: how they meet, agree, speak with one voice and stop together.

On a TPU pod, on GKE and under SLURM, processes find each other from the environment; anywhere else
each is given the address of the first one. A single process needs none of this, and everything here
does nothing then.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from contextualstory_jax.utils import interruption
from contextualstory_jax.utils.errors import UserError, require

# JAX takes seconds to import, and --help need not wait for it.

COMPILE_SECONDS = 3600  # that one process may compile longer than another


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which processes meet, for a command that may run in several."""
    group = parser.add_argument_group(
        "several processes", "found from the environment on TPU pods, GKE and SLURM; else:"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which this is, from 0 on")
    group.add_argument(
        "--connect-seconds", type=int, default=300, metavar="S", help="to wait for the others (300)"
    )


def connect(arguments: argparse.Namespace) -> None:
    """Meet the other processes, if there are any; before anything else is asked of JAX.

    Raises `UserError` for arguments that do not go together. Where the others do not come in time,
    the process ends with one line and status 2.
    """
    given = (arguments.coordinator, arguments.processes, arguments.process)
    seconds = arguments.connect_seconds
    require(seconds >= 1, f"--connect-seconds must be at least 1; got {seconds}")
    if given == (None, None, None):
        if not (_on_tpu() or _under_slurm() or "JAX_COORDINATOR_ADDRESS" in os.environ):
            return
        where = "the others that the environment names"
    else:
        require(None not in given, "--coordinator, --processes and --process go together")
        host, _, port = arguments.coordinator.rpartition(":")
        require(
            bool(host) and port.isdigit(),
            f"--coordinator must be HOST:PORT; got {arguments.coordinator!r}",
        )
        require(
            0 <= arguments.process < arguments.processes,
            f"--process must be in 0..{arguments.processes - 1}; got {arguments.process}",
        )
        where = f"all {arguments.processes} at {arguments.coordinator}"

    import jax

    def give_up() -> None:
        print(
            f"error: processes did not meet in {seconds} seconds: waited for {where}; start every "
            "one of them, with one --coordinator that all can reach",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # the main thread waits inside JAX, which would end it with a stack trace

    watchdog = threading.Timer(seconds, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(*given, initialization_timeout=seconds + 60)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"processes could not meet ({reason}); waited for {where}") from error
    finally:
        watchdog.cancel()
    interruption.check()  # from now on the processes stop together


def _on_tpu() -> bool:
    # Set by GKE; on a TPU VM JAX asks the machine itself, which has these devices.
    return importlib.util.find_spec("libtpu") is not None and (
        "TPU_WORKER_HOSTNAMES" in os.environ
        or any(os.path.exists(device) for device in ("/dev/accel0", "/dev/vfio/0"))
    )


def _under_slurm() -> bool:
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ


def is_first() -> bool:
    """Whether this process speaks for all: prints, and writes what there is one of."""
    import jax

    return jax.process_index() == 0


def say(text: str) -> None:
    """Print in the first process."""
    if is_first():
        print(text, flush=True)


def gather(text: str) -> list[str]:
    """A text of every process, in order of processes."""
    import jax
    from jax.experimental.multihost_utils import process_allgather

    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(process_allgather(np.array([own.size])))
    padded = np.pad(own, (0, int(sizes.max()) - own.size))
    rows = np.asarray(process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def require_agreement(values: Mapping[str, Any]) -> None:
    """Raise `UserError`, in all processes, for the first key whose values they disagree on."""
    first, *others = map(json.loads, gather(json.dumps(values)))
    for number, theirs in enumerate(others, 1):
        for key in sorted({*first, *theirs}):
            require(
                first.get(key) == theirs.get(key),
                f"processes disagree: {key} is {first.get(key)!r} in process 0 and "
                f"{theirs.get(key)!r} in process {number}; start all with the same arguments",
            )


def by_first(action: Callable[[], None]) -> None:
    """Do something in the first process while the others wait.

    Raises the `UserError` that it raises there in all processes.
    """
    problem = ""
    if is_first():
        try:
            action()
        except UserError as error:
            problem = str(error)
    problem = gather(problem)[0]
    if problem:
        raise UserError(problem)


def all_succeed(action: Callable[[], None], kind: type[UserError]) -> str | None:
    """Do something in every process; the message of the first one that raises a `kind`, if any."""
    problem = ""
    try:
        action()
    except kind as error:
        problem = str(error)
    return next((text for text in gather(problem) if text), None)


def compiled_together(function: Any, static: int = 0) -> Callable[..., Any]:
    """A jitted function that no process begins to run before all have compiled it.

    For a late one the others would wait for seconds only.

    Args:
        static: how many of its first arguments are static.
    """
    import jax
    from orbax.checkpoint import multihost

    if jax.process_count() == 1:
        return function
    compiled: dict[Any, Callable[..., Any]] = {}

    def call(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments[static:])
        shapes = tuple((np.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)
        key = arguments[:static], structure, shapes
        if key not in compiled:
            compiled[key] = function.lower(*arguments).compile()
            wait = multihost.get_barrier_sync_fn()
            wait(key="compiled", timeout_ms=1000 * COMPILE_SECONDS)
        return compiled[key](*arguments[static:])

    return call


class StopRequest:
    """Whether the run is to stop: after SIGTERM, as a rule a machine is taken away, or Ctrl-C.

    As a context manager it takes SIGTERM over; `after(step)`, asked in every process after each
    step, is true in all of them after the same one. Where Ctrl-C was pressed in one process,
    `interruption.requested` is then true in all.
    """

    def __init__(self) -> None:
        self._asked = False
        self._passed_on = False
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        # With several processes JAX's own handler is there, which signals the others.
        if not _connected() and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def after(self, step: int) -> bool:
        """Whether to stop after this step."""
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        if not _connected():
            return self._asked or interruption.requested()
        if interruption.requested() and not self._passed_on:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX lets all processes stop after one step then
            self._passed_on = True
        stops = reached_preemption_sync_point(step)
        if stops and str(True) in gather(str(interruption.requested())):
            interruption.request()
        return stops

    def _ask(self, *_: object) -> None:
        self._asked = True


def _connected() -> bool:
    import jax

    return jax.distributed.is_initialized()
