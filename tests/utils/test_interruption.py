"""Ctrl-C in a small command: the flag, the second one, what is removed, who hears it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from contextualstory_jax.utils import interruption
from contextualstory_jax.utils.cli import run

ROOT = Path(__file__).parents[2]
# Of a job in a shell's background it is ignored, and what that starts inherits this.
INTERRUPTIBLE = ("env", "--default-signal=INT")
STOPPING = "interrupted; finishing the current step (Ctrl-C again to stop at once)"
COMMAND = """
import signal, sys, time
from pathlib import Path
from contextualstory_jax.utils import interruption
from contextualstory_jax.utils.cli import run

def deaf():  # the main thread, as inside XLA: Python's own handlers wait
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    print("ready", flush=True)
    import ctypes
    ctypes.CDLL(None).sleep(60)

def ready():
    print("ready", flush=True)

def main():
{body}

if __name__ == "__main__":
    run(main)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Starts a command whose `main` has a body, and waits until it prints "ready"."""
    running = []

    def start(body: str) -> subprocess.Popen[str]:
        script = tmp_path / "command.py"
        lines = [f"    {line}" for line in body.strip().splitlines()]
        script.write_text(COMMAND.format(body="\n".join(lines)))
        process = subprocess.Popen(
            [*INTERRUPTIBLE, sys.executable, str(script)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        assert process.stdout and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in running:
        process.kill()


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C, as a terminal sends it: to all processes of the group."""
    os.killpg(process.pid, signal.SIGINT)


def end(process: subprocess.Popen[str]) -> str:
    """What a command printed on stderr that ended as it should after Ctrl-C."""
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    return errors


def test_before_a_loop_reads_the_flag_the_first_one_ends_the_process(start):
    process = start("deaf()")

    interrupt(process)

    assert end(process) == "interrupted\n"


LOOP = """
for number in range(10**6):
    time.sleep(0.05)
    interruption.check()
    number or ready()
"""


def test_a_loop_ends_between_two_steps(start):
    process = start(LOOP)

    interrupt(process)

    assert end(process) == STOPPING + "\n"


def test_the_second_one_ends_the_process_where_no_loop_reads_the_flag(start):
    process = start("interruption.check()\ndeaf()")

    interrupt(process)
    assert process.stderr and process.stderr.readline() == STOPPING + "\n"
    assert process.poll() is None
    interrupt(process)

    assert end(process) == ""


def test_a_command_that_ends_by_itself_after_it_has_status_130_too(start):
    process = start("while not interruption.requested():\n    ready()\n    time.sleep(0.1)")

    interrupt(process)

    assert end(process) == STOPPING + "\n"


@pytest.mark.parametrize("wait", ["deaf()", LOOP], ids=["at once", "by a loop"])
def test_what_is_temporary_is_removed_and_the_rest_stays(start, tmp_path, wait):
    process = start(f"""
Path("folder").mkdir()
for name in ("kept", "part-1", "part-2"):
    Path("folder", name).touch()
Path("[a]*").touch()
with interruption.removing(Path("[a]*")), interruption.removing(Path("folder"), "part-*"):
    {wait.strip().replace(chr(10), chr(10) + "    ")}
""")

    interrupt(process)

    end(process)
    assert {path.name for path in tmp_path.iterdir()} == {"command.py", "folder"}
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["kept"]


def test_a_folder_is_removed_while_threads_write_into_it(start, tmp_path):
    process = start("""
import os, threading

def write():
    number = 0
    while True:
        number += 1
        try:
            os.makedirs(f"folder/{number % 10}", exist_ok=True)
            Path(f"folder/{number % 10}/{number}").touch()
        except FileNotFoundError:  # removed since: make it again, as tensorstore does
            continue

with interruption.removing(Path("folder")):
    for _ in range(4):
        threading.Thread(target=write, daemon=True).start()
    while len(list(Path("folder").glob("*/*"))) < 100:
        pass
    deaf()
""")

    interrupt(process)

    end(process)
    assert {path.name for path in tmp_path.iterdir()} == {"command.py"}


def test_what_is_temporary_is_removed_while_a_module_is_imported(start, tmp_path):
    (tmp_path / "multiprocessing.py").write_text("deaf()\ndef active_children(): ...\n")
    process = start("""
import builtins
builtins.deaf = deaf
with interruption.removing(Path("folder")):
    Path("folder").mkdir()
    import multiprocessing
""")

    interrupt(process)

    end(process)
    assert not (tmp_path / "folder").exists()


def test_processes_it_started_neither_hear_it_nor_stay(start):
    process = start("""
from multiprocessing import get_context
interruption.before_processes()
child = get_context("spawn").Process(target=time.sleep, args=(60,))
child.start()
time.sleep(2)  # until it has begun
interruption.check()
print(child.pid, file=sys.stderr, flush=True)
ready()
while not interruption.requested():
    time.sleep(0.01)
time.sleep(0.5)
interruption.check() if child.is_alive() else sys.exit("it heard")
""")
    assert process.stderr
    child = int(process.stderr.readline())

    interrupt(process)

    assert end(process) == STOPPING + "\n"
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the process stays")


def test_a_job_for_which_it_is_ignored_runs_on(start):
    process = start("ready()\ntime.sleep(1)")
    process.kill()
    process.communicate()
    ignoring = subprocess.Popen(
        ["env", "--ignore-signal=INT", *process.args[2:]],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ignoring.stdout and ignoring.stdout.readline() == "ready\n"

    ignoring.send_signal(signal.SIGINT)

    assert ignoring.wait(timeout=30) == 0


def test_a_command_run_in_a_python_program_gives_ctrl_c_back():
    before = signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ())

    run(interruption.check)

    assert (signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before
