"""Ctrl-C in the commands: one line, exit status 130, and nothing partial.

No KeyboardInterrupt is raised: inside one of JAX's callbacks it would be lost, and it would wait
until XLA returns, for minutes while it compiles. Instead a thread notices each Ctrl-C at once, and
sets a flag that the loops of a command read (`check`). Before a loop first reads it there is
nothing to finish, and Ctrl-C ends the process at once, as the second one always does.

In a Python program that uses the package Ctrl-C stays as it is.
"""

from __future__ import annotations

import _thread
import contextlib
import glob
import itertools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

STATUS = 130  # as shells report a program that Ctrl-C ended
HALT_SECONDS = 0.3  # to wait for the main thread, which may be inside XLA
ATTEMPTS = 100  # to replace a folder that other threads make again


class Interrupted(BaseException):
    """Raised between two steps of a loop, after Ctrl-C; no `except Exception` stops it."""


_requested = threading.Event()
_read = threading.Event()  # a loop reads the flag
_ending = threading.Event()
_halted = threading.Event()  # the main thread waits for the end
_temporary: set[str] = set()  # glob patterns of files and folders
_watched = threading.Event()


def requested() -> bool:
    """Whether Ctrl-C was pressed; the caller asks repeatedly, and stops when it was."""
    _read.set()
    return _requested.is_set()


def check() -> None:
    """Raise `Interrupted` if Ctrl-C was pressed; to be called between two steps of a loop."""
    if requested():
        raise Interrupted


def request() -> None:
    """Set the flag: Ctrl-C was pressed in another process of the run."""
    _requested.set()


@contextlib.contextmanager
def removing(path: Path, pattern: str = "") -> Iterator[None]:
    """Remove a file or folder at the end, if it is still there, also where Ctrl-C ends the process.

    Args:
        path: The file or folder.
        pattern: Of the files in the folder `path` to remove instead of the folder.
    """
    escaped = glob.escape(str(path.absolute()))
    found = os.path.join(escaped, pattern) if pattern else escaped
    _temporary.add(found)
    try:
        yield
    finally:
        _remove_all([found])
        _temporary.discard(found)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Handle Ctrl-C as described above for as long as a command runs.

    Processes and threads that are started meanwhile do not receive it. Does nothing outside of the
    main thread, and where Ctrl-C is ignored, as for a background job of a script.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    _requested.clear()
    _read.clear()
    noticed, written = os.pipe()
    os.set_blocking(written, False)
    # Python's own part of signal handling, which writes to the pipe, waits for no thread.
    previous_pipe = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    previous = signal.signal(signal.SIGINT, _halt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a command that a command started
    threading.Thread(target=_watch, args=(noticed,), name="Ctrl-C", daemon=True).start()
    # That thread receives the signal. What this one starts inherits that it is blocked: processes
    # that read data would end with a traceback.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    _watched.set()
    try:
        yield
    except Interrupted:
        sys.stdout.flush()
        end()
    finally:
        if not _requested.is_set():  # else another Ctrl-C may follow until the process has ended
            signal.signal(signal.SIGINT, previous)
            signal.set_wakeup_fd(previous_pipe)
            os.close(written)  # which ends the thread
            _watched.clear()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if _requested.is_set():
        sys.exit(STATUS)


def before_processes() -> None:
    """Prepare multiprocessing, so that Ctrl-C neither reaches its processes nor leaves warnings."""
    if not _watched.is_set():
        return
    from multiprocessing import resource_tracker

    sys.warnoptions.append("ignore:resource_tracker")  # cleaning up after `end` is its purpose
    resource_tracker.ensure_running()  # which unblocks the signal
    sys.warnoptions.pop()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def end_at_once() -> None:
    """Let Ctrl-C end the process with one line, until `watching` handles it."""

    def handle(*_: object) -> None:
        _say("interrupted")
        end()

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)


def end() -> None:
    """End the process now, with the processes that it started; remove what is temporary."""
    try:
        # Absent before there can be children: also while the main thread imports the module.
        children = getattr(sys.modules.get("multiprocessing"), "active_children", tuple)
        for child in children():
            child.kill()
        _remove_all(list(_temporary))
    finally:
        os._exit(STATUS)  # the main thread may be inside XLA, and threads wait for one another


def _watch(noticed: int) -> None:
    """Read the numbers of the signals that arrive."""
    while received := os.read(noticed, 1):
        if received[0] != signal.SIGINT:
            continue
        if _requested.is_set():
            _halt_and_end()
        _requested.set()
        if not _read.is_set():
            _say("interrupted")
            _halt_and_end()
        _say("interrupted; finishing the current step (Ctrl-C again to stop at once)")
    os.close(noticed)


def _halt_and_end() -> None:
    """End the process, in which the main thread, where it runs Python, writes nothing more."""
    _ending.set()
    _thread.interrupt_main(signal.SIGINT)
    _halted.wait(HALT_SECONDS)
    end()


def _halt(*_: object) -> None:
    """Handle the signal, in the main thread and between two of its instructions."""
    if _ending.is_set():
        _halted.set()
        threading.Event().wait()


def _say(line: str) -> None:
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    with contextlib.suppress(OSError, ValueError):  # closed
        print("\n" * bool(bars) + line, file=sys.stderr, flush=True)


def _remove_all(patterns: Sequence[str]) -> None:
    """Remove files and folders, and keep threads that still write from making them again."""
    moved, placed = [], []
    for path in itertools.chain.from_iterable(map(glob.glob, patterns)):
        if os.path.isdir(path) and not os.path.islink(path):
            moved += _replace_by_file(path)
        placed.append(path)
    for folder in moved:
        shutil.rmtree(folder, ignore_errors=True)
    for path in placed:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _replace_by_file(folder: str) -> list[str]:
    """Put an empty file in the place of a folder, where nobody can then make a folder of that name.

    Returns:
        Where the folder lies now, and each that was made again before the file was.
    """
    moved = []
    for number in range(ATTEMPTS):
        with contextlib.suppress(OSError):
            os.rename(folder, f"{folder}.{number}")
            moved.append(f"{folder}.{number}")
            os.close(os.open(folder, os.O_CREAT | os.O_EXCL))
            break
    return moved
