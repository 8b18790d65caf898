"""`measure` on several devices and in several processes, with a small network for InceptionV3."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.devices import environment
from tests.helpers.tiny_inception import write_images, write_weights

ROOT = Path(__file__).parents[2]
PROCESS = """
import sys
from contextualstory_jax.commands.measure import main
from contextualstory_jax.evaluation import features, inception_features
from tests.helpers.tiny_inception import tiny_network
features.GROUP = 10
inception_features.fid_network = tiny_network
main(sys.argv[1:])
"""


def run(tmp_path, name, devices=1, processes=1):
    """The report of a run with a cache of its own, and what its processes printed."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    words = [tmp_path / "a", tmp_path / "b", "--metrics", "fid,kid", "--kid-subset-size", 20]
    words += ["--weights-dir", tmp_path / "weights", "--out", tmp_path / f"{name}.json"]
    words += ["--batch-size", 3]
    if processes > 1:
        words += ["--coordinator", f"127.0.0.1:{port}", "--processes", processes]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, words)]
            + (["--process", str(number)] if processes > 1 else []),
            cwd=ROOT,
            env=environment(devices) | {"XDG_CACHE_HOME": str(tmp_path / name)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    return json.loads((tmp_path / f"{name}.json").read_text()), printed


@pytest.mark.multiprocess
def test_devices_and_processes_agree(tmp_path):
    write_images(tmp_path / "a", 31, 0)
    write_images(tmp_path / "b", 45, 1)
    write_weights(tmp_path / "weights")

    expected, _ = run(tmp_path, "one")
    on_devices, _ = run(tmp_path, "devices", devices=4)
    in_processes, printed = run(tmp_path, "processes", processes=2)

    for metric in ("fid", "kid"):
        assert on_devices[metric] == pytest.approx(expected[metric], rel=1e-4)
        assert in_processes[metric] == pytest.approx(expected[metric], rel=1e-4)
    values = [[x for x in text.splitlines() if x[:3] in ("fid", "kid")] for text in printed]
    assert [len(lines) for lines in values] == [2, 0]  # beside a line of JAX's
    assert len(list((tmp_path / "processes").glob("*/features/*.npy"))) == 4 + 5
