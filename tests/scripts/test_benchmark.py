"""The benchmark: its table and file, bad input in one line, the talk with the original."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.models.flops import unet_flops
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.utils.errors import UserError
from scripts import benchmark_checkpoint
from scripts.benchmarks import forward, tpu
from scripts.benchmarks.generation import CompilationCount
from scripts.benchmarks.measuring import COLUMNS, Machine, Row
from scripts.benchmarks.original import Original

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "helpers" / "tiny_config.py"
CHECKPOINT = ["--config", str(RECIPE), "--folder"]
# In the original's place: what it computes is what it is given, and one variant fails.
STAND_IN = """
import json, sys
import numpy as np
print(json.dumps({"torch": "none"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "load":
        loaded = dict(np.load(request["inputs"]))
        answer = {"device": "none"}
    elif request["do"] == "outputs":
        places = request["what"].split()[1:] or ["sample"]
        np.savez(request["file"], *(loaded[place] for place in places))
        answer = {}
    elif request["do"] == "time":
        answer = {"seconds": 2.0} if request["variant"] == "eager" else {"error": "out of memory"}
    else:
        answer = {"bytes": 10**9}
    print(json.dumps(answer), flush=True)
"""


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command on the tiny recipe."""
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "--config", str(RECIPE)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """A Python that runs the stand-in, whatever it is told to."""
    script, python = tmp_path / "stand_in.py", tmp_path / "python"
    script.write_text(STAND_IN)
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
    python.chmod(0o755)
    return str(python)


def clone(folder: Path) -> Path:
    """A folder that looks like a clone of the original, with nothing in it."""
    (folder / "contextualstory" / "models").mkdir(parents=True)
    return folder


def test_the_table_and_the_file_hold_the_same_lines(tmp_path):
    file = tmp_path / "out.json"

    done = benchmark("--suite=cpu", "--only", "seta", "--rounds=2", "--json", str(file))

    assert done.returncode == 0, done.stderr
    about, _, head, _, *lines = done.stdout.splitlines()
    assert "matmul " in about and f"jax {jax.__version__}" in about
    assert [cell.strip() for cell in head.strip("|").split("|")] == list(COLUMNS)
    found = json.loads(file.read_text())
    assert (found["suite"], found["command"][1:3]) == ("cpu", ["--config", str(RECIPE)])
    assert [row["what"] for row in found["rows"]] == [line.split(" | ")[0][2:] for line in lines]
    timed = [row for row in found["rows"] if row["mfu"]]
    assert [row["what"] for row in timed] == ["SETA, all 3 layers", "SETA, a layer of 4 x 4"]
    for row in timed:
        assert len(row["seen"]) >= 2 and min(row["seen"]) <= row["median"] <= max(row["seen"])
        assert 0 < row["floor"] < row["median"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite=cpu", "--only", "start"], "suite cpu has no start, only unet, seta, training"),
        (["--suite=cpu", "--rounds=0"], "--rounds must be at least 1"),
        (["--suite=cpu", "--reference=."], "--reference and --reference-python go together"),
        (["--suite=cpu", "--quick"], "--chip and --quick are of the suite tpu-aot"),
        (["--suite=cpu", "--json=none/out.json"], "--json: no folder "),
        (["--suite=cpu", "--config=none.py"], "no config none.py"),
        (
            ["--suite=cpu", "--reference=none", "--reference-python=python"],
            "no original in none: name a clone of sixiaozheng/ContextualStory",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message):
    done = benchmark(*arguments)

    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_gpu_check_without_its_wheels_is_refused_and_leaves_nothing(tmp_path):
    settings = {**os.environ, "WHEELS": str(tmp_path / "none"), "OUT": str(tmp_path / "out")}
    script = str(ROOT / "scripts" / "gpu_check.sh")

    done = subprocess.run(["bash", script], capture_output=True, text=True, env=settings)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no folder {tmp_path / 'none'}; name one with wheels\n"
    assert not (tmp_path / "out").exists()


def test_a_python_without_the_packages_is_told_in_a_line(tmp_path):
    folder = clone(tmp_path)

    with pytest.raises(
        UserError, match=r"the original cannot be run: \w+Error: .*(torch|contextual)"
    ):
        Original(folder, sys.executable, ["eager"])
    with pytest.raises(UserError, match="cannot run no-such-python: No such file"):
        Original(folder, "no-such-python", ["eager"])
    with pytest.raises(UserError, match="the original cannot be run: no answer"):
        Original(folder, "true", ["eager"])


def test_the_original_takes_turns(stand_in, tmp_path):
    original = Original(clone(tmp_path), stand_in, ["eager", "compile"])
    model = StoryModel(load_config(RECIPE).model)
    arrays = forward.inputs(model)
    machine = Machine(jax.devices()[0], "float32", rate=1e12, rounds=2, warm_ups=1)

    forward.load_original(original, model.config, arrays, "float32")
    (theirs,) = original.outputs("unet", "eager")
    tasks = original.tasks("unet")
    eager = {"": lambda: 1.0, "original, eager": tasks["original, eager"]}
    rows = list(machine.times("UNet", eager, flops=5e11))

    np.testing.assert_array_equal(theirs, arrays["sample"])
    assert rows == [
        Row("UNet", [1.0, 1.0], floor=0.5, mfu=0.5),
        Row("UNet: original, eager", [2.0, 2.0], floor=0.5, mfu=0.25, times_ours=2.0),
    ]
    assert original.peak_memory().seen == [1.0]
    with pytest.raises(UserError, match="the original fails: out of memory"):
        tasks["original, compile"]()
    original.close()


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("seta", "SETA, all 3 layers"),
        pytest.param("training", "UNet, one guided step of a story", marks=pytest.mark.slow),
    ],
)
def test_outputs_that_differ_end_with_status_1_and_no_number(part, what, stand_in, tmp_path):
    reference = ["--reference", str(clone(tmp_path)), "--reference-python", stand_in]

    done = benchmark("--suite=cpu", "--only", part, *reference)

    assert done.returncode == 1
    assert done.stdout == ""
    assert f"parity: {what}, eager: relative error " in done.stderr


def test_layers_with_seta_are_counted_as_the_project_counts():
    config = load_config(ROOT / "configs" / "pororo_visualization.py").model
    model = StoryModel(config)

    places = forward.seta_places(model)

    assert [place.side for place in places].count(32) == 5 and len(places) == 15
    total = sum(forward.seta_flops(config.unet.n_frames, place) for place in places)
    assert total == unet_flops(config)["SETA"]


def test_weights_are_live_across_frames():
    model = StoryModel(load_config(RECIPE).model)

    params = forward.named_weights(model, ["unet"])

    alphas = [p for name, p in params["unet"].items() if name.endswith(".alpha")]
    assert len(alphas) > 2 and all(np.all(p == np.float32(0.3)) for p in alphas)
    assert params["unet"].keys() == model.unet.shapes.keys()


def test_a_compilation_is_counted_while_it_is_listened_for():
    with CompilationCount() as counter:
        jax.jit(lambda x: x * 1.5)(np.ones(3)).block_until_ready()
    seen = counter.count
    jax.jit(lambda x: x * 2.5)(np.ones(3)).block_until_ready()

    assert counter.count == seen >= 1


def test_a_program_that_does_not_fit_a_chip_has_a_line_too():
    found = {
        "program": "training",
        "topology": "v5e:1x1",
        "hbm_bytes_per_chip": {"total": 20 * 2**30},
        "hbm_limit": 16 * 2**30,
        "useful_flops_per_chip": 10**12,
        "compile_seconds": 61.4,
        "fits": False,
    }

    cells = tpu.cells(found)

    assert len(cells) == len(tpu.COLUMNS)
    assert cells[:4] == ["training", "v5e:1x1", "20.0 GiB", "16.0 GiB"] and cells[-1] == "61 s"


@pytest.mark.slow
def test_a_checkpoint_is_saved_and_restored_with_its_times(tmp_path, capsys):
    with pytest.raises(UserError, match="no such folder"):
        benchmark_checkpoint.main([*CHECKPOINT, str(tmp_path / "away")])

    benchmark_checkpoint.main([*CHECKPOINT, str(tmp_path)])

    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[1:]] == ["save:", "save:", "save:", "restore:"]
    assert list(tmp_path.iterdir()) == []
