"""The launchers: what they would run, what they run with stand-ins for gcloud, xpk and SLURM."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHELL = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.slurm")])
POD = ["launch_tpu_pod.sh", "--name", "pod", "--zone=us-west4-a"]
POD += ["--accelerator-type", "v5litepod-16"]
GKE = ["launch_gke.sh", "--cluster", "team", "--workload=story", "--tpu-type", "v5litepod-16"]
SLURM = ["train.slurm"]
LAUNCHERS = pytest.mark.parametrize("launcher", [POD, GKE, SLURM], ids=lambda words: words[0])
# What quoting must survive: spaces, quotes, brackets, a dollar, a star, an empty word, a line end.
TRAINING = ["--config", "configs/shapes.py", "--workdir", "/mnt/my stories/run's", ""]
TRAINING += ["--config.trainable=('unet.*',\"$HOME\")", "--config.note=a\nb;c|d&&e"]
CONSTRAINED = ["-c", "constraints.txt"]
TRAIN = ["-m", "contextualstory_jax.train", *TRAINING]

# Stands in for any command: writes its words down, and answers as the test says.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, subprocess, sys
name = pathlib.Path(sys.argv[0]).name
home = pathlib.Path(os.environ["HOME"])
with open(home / "calls.jsonl", "a") as calls:
    print(json.dumps([name, *sys.argv[1:]]), file=calls)
if "describe" in sys.argv:
    states = (home / "states").read_text().split()
    print(states[0])
    (home / "states").write_text(" ".join(states[1:] or states))
elif "scp" in sys.argv:
    source, target = sys.argv[5:7]
    (home / target.split(":")[1]).write_bytes(pathlib.Path(source).read_bytes())
elif "ssh" in sys.argv:
    command = sys.argv[-1].removeprefix("--command=")
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home).returncode)
elif name == "uv" and sys.argv[1] == "venv":
    python = pathlib.Path(sys.argv[-1]) / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.argv[0])
elif name == "python":
    print("trained in", os.getcwd())
sys.exit(int(os.environ.get(name.upper() + "_STATUS", 0)))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A small repository with the launchers and a recipe."""
    root = tmp_path_factory.mktemp("my code") / "checkout"
    shutil.copytree(SCRIPTS, root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "configs").mkdir()
    (root / "configs" / "shapes.py").write_text("learning_rate = 1\n")
    (root / ".gitignore").write_text("/build/\n")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "-c", "user.name=x", "-c", "user.email=x", "commit", "--quiet", "--message=x")
    return root


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """A home folder, and stand-ins for the commands that launchers run."""
    home = tmp_path / "home"
    stand_ins, local = home / "stand_ins", home / ".local" / "bin"
    for folder in (stand_ins, local):
        folder.mkdir(parents=True)
    for path in [
        *(stand_ins / name for name in ("gcloud", "xpk", "srun", "scontrol", "sudo", "gcsfuse")),
        *(stand_ins / name for name in ("python3", "mountpoint", "python")),
        local / "uv",
    ]:
        path.write_text(STAND_IN)
        path.chmod(0o755)
    (home / "states").write_text("ACTIVE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = f"{stand_ins}{os.pathsep}{os.environ['PATH']}"
    return kept | {"HOME": str(home), "PATH": path, "LAUNCH_POLL_SECONDS": "0"}


@pytest.fixture
def launch(checkout, environment) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script of the checkout from there; a dry run has no command to launch with."""

    def launch(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        script = ["bash", f"scripts/{words[0]}", *words[1:]]
        full = environment | variables
        return subprocess.run(script, cwd=checkout, env=full, capture_output=True, text=True)

    return launch


def calls(environment: dict[str, str], *names: str) -> list[list[str]]:
    """What was run of the named commands."""
    lines = Path(environment["HOME"], "calls.jsonl").read_text().splitlines()
    return [call for line in lines if (call := json.loads(line))[0] in names]


def words(line: str) -> list[str]:
    """A line's words, as bash reads them."""
    program = f"printf '%s\\0' {line}"
    run = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return run.stdout.split("\0")[:-1]


def option(command: list[str], name: str) -> str:
    (value,) = (word.removeprefix(f"{name}=") for word in command if word.startswith(f"{name}="))
    return value


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_bash_can_read_it(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@LAUNCHERS
def test_help_is_a_usage(launch, launcher):
    shown = launch(launcher[0], "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: ") and "--dry-run" in shown.stdout


@LAUNCHERS
def test_a_dry_run_runs_nothing(launch, environment, launcher):
    shown = launch(*launcher, "--dry-run", "--", *TRAINING)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert not Path(environment["HOME"], "calls.jsonl").exists()


def test_pod_shows_its_commands(launch, checkout):
    options = ["--project", "mine", "--spot", "--bucket", "gs://stories", "--setup", "ls /x y"]
    shown = launch(*POD, *options, "--delete", "--dry-run", "--", *TRAINING).stdout
    create, setup, archive, copy, install, train, delete = (
        words(line) for line in shown.splitlines() if not line.startswith("#")
    )
    where = ["--quiet", "--zone=us-west4-a", "--project=mine"]
    slices = ["gcloud", "compute", "tpus", "queued-resources"]
    machine = ["gcloud", "compute", "tpus", "tpu-vm"]
    tar = str(checkout / "build" / "tpu_pod.tar.gz")
    assert create == [
        *(*slices, "create", "pod", *where, "--node-id=pod"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
    ]
    on_all = [*machine, "ssh", "pod", *where, "--worker=all"]
    assert setup == [*on_all, "--command=ls /x y"]
    assert archive[:5] == ["git", "-C", str(checkout), "archive", "--format=tar.gz"]
    assert archive[5] == f"--output={tar}"
    assert copy == [*machine, "scp", tar, "pod:contextualstory.tar.gz", *where, "--worker=all"]
    assert install[:-1] == train[:-1] == on_all
    assert install[-1].endswith("bash contextualstory/new/scripts/tpu_worker.sh install stories")
    worker = ["bash", "contextualstory/code/scripts/tpu_worker.sh", "train"]
    assert words(option(train, "--command")) == [*worker, *TRAINING]
    assert delete == [*slices, "delete", "pod", *where, "--force"]


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_each_tpu_has_its_runtime(launch, accelerator, runtime):
    launcher = [*POD[:-1], accelerator]
    shown = launch(*launcher, "--dry-run", "--", *TRAINING).stdout
    assert f"--runtime-version={runtime}\n" in shown


def test_gke_shows_its_commands(launch, checkout):
    options = ["--storage", "a", "--storage=b", "--zone", "z", "--max-restarts", "3"]
    shown = launch(*GKE, *options, "--dry-run", "--", *TRAINING).stdout
    *_, workload = map(words, shown.splitlines())
    assert workload[:-1] == [
        *("xpk", "workload", "create", "--storage=a", "--storage=b", "--zone=z", "--cluster=team"),
        *("--workload=story", "--tpu-type=v5litepod-16", "--max-restarts=3"),
        *("--termination-grace-period-seconds=300", "--base-docker-image=python:3.12"),
        f"--script-dir={checkout}/build/gke",
    ]
    command = option(workload, "--command")
    install, train = command.split(" && exec ")
    assert words(install) == ["pip", "install", "--quiet", "-e", ".[tpu,data]", *CONSTRAINED]
    assert words(train) == ["bash", "scripts/resumable.sh", "--forward", "python", *TRAIN]
    assert "\n" not in command  # it becomes a line of YAML


def test_slurm_shows_its_commands(launch):
    shown = launch(*SLURM, "--python", "/my env/python", "--dry-run", "--", *TRAINING).stdout
    step, requeue = (words(line) for line in shown.splitlines() if not line.startswith("#"))
    assert step == [
        *("srun", "--kill-on-bad-exit=0", "--gpu-bind=none", "--cpus-per-task=8"),
        *("bash", "scripts/resumable.sh", "/my env/python", *TRAIN),
    ]
    assert requeue == ["scontrol", "requeue", "JOB"]


def without(words: list[str], option: str) -> list[str]:
    """Words without an option that is given as `--option value` or `--option=value`."""
    place = next(i for i, word in enumerate(words) if word.split("=")[0] == option)
    return words[:place] + words[place + (1 if "=" in words[place] else 2) :]


TRAINED = ["--", *TRAINING]
NO_RECIPE = ["--", "--workdir", "run"]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (POD[:1], "--name is missing; see --help"),
        ([*without(POD, "--zone"), *TRAINED], "--zone is missing; see --help"),
        ([*POD, "--zone", *TRAINED], "--zone needs a value; see --help"),
        ([*POD, "--name"], "--name needs a value; see --help"),
        ([*POD, "--spots", *TRAINED], "unknown argument '--spots'; .* after --; see --help"),
        ([*POD, *TRAINING], "unknown argument '--config'; .* come after --; see --help"),
        ([*POD[:-1], "tpu7x-8", *TRAINED], "no runtime .* tpu7x-8; give --runtime-version"),
        ([*POD, "--bucket", "gs://a/b", *TRAINED], "--bucket a/b is a path; name the bucket"),
        (POD, "--config FILE.py is missing among the arguments of training, after --"),
        ([*POD, *NO_RECIPE], "--config FILE.py is missing .*"),
        ([*POD, "--", "--config=configs/shapes.py"], "--workdir DIR is missing .*, after --"),
        ([*POD, *NO_RECIPE, "--config=x.py"], "x.py is not in git, .*; git add it, and name it"),
        (GKE[:1], "--cluster is missing; see --help"),
        ([*without(GKE, "--workload"), *TRAINED], "--workload is missing; see --help"),
        ([*GKE, "--max-restarts=x", *TRAINED], "--max-restarts must be a whole number; got x"),
        ([*GKE, "--storage"], "--storage needs a value; see --help"),
        ([*GKE, "more", *TRAINED], "unknown argument 'more'; .*"),
        ([*GKE, *NO_RECIPE], "--config FILE.py is missing .*"),
        ([*SLURM, "--gpus=8", *TRAINED], "unknown argument '--gpus'; .*"),
        ([*SLURM, *NO_RECIPE], "--config FILE.py is missing .*"),
        ([*SLURM, *TRAINED], "this is no SLURM job; submit it: sbatch scripts/train.slurm"),
    ],
)
def test_bad_input_is_one_line(launch, environment, command, line):
    refused = launch(*command)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(f"error: {line}.*\n", refused.stderr), refused.stderr
    assert not Path(environment["HOME"], "calls.jsonl").exists()


@pytest.mark.parametrize(
    ("launcher", "line"),
    [
        (POD, "error: gcloud is not installed; install the Google Cloud CLI, then: gcloud auth"),
        (GKE, "error: xpk is not installed; install it: pip install xpk"),
        (SLURM, "error: srun is not installed; run this on a cluster that SLURM manages"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_missing_command_is_named_except_in_a_dry_run(launch, tmp_path, launcher, line):
    for name in ("bash", "git", "dirname", "cat", "mkdir"):
        (tmp_path / name).symlink_to(shutil.which(name))
    refused = launch(*launcher, *TRAINED, PATH=str(tmp_path))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(line) and refused.stderr.count("\n") == 1
    assert launch(*launcher, "--dry-run", *TRAINED, PATH=str(tmp_path)).returncode == 0


def test_pod_asks_for_a_slice_waits_installs_and_trains(launch, environment, checkout):
    home = Path(environment["HOME"])
    recipe = checkout / "configs" / "shapes.py"
    (home / "states").write_text("SUSPENDED WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    recipe.write_text("learning_rate = 2\n")  # not committed
    (checkout / "notes.txt").write_text("not in git")
    launched = launch(*POD, "--bucket", "stories", "--delete", *TRAINED, MOUNTPOINT_STATUS="1")
    assert launched.returncode == 0, launched.stderr
    verbs = [call[3:5] for call in calls(environment, "gcloud") if call[4] != "describe"]
    slices, machines = "queued-resources", "tpu-vm"
    assert verbs == [
        *([slices, "delete"], [slices, "create"], [machines, "ssh"], [machines, "scp"]),
        *([machines, "ssh"], [machines, "ssh"], [slices, "delete"]),
    ]
    code = home / "contextualstory" / "code"
    assert (code / "configs" / "shapes.py").read_text() == "learning_rate = 2\n"
    assert not (code / "notes.txt").exists()
    _, pip = calls(environment, "uv")
    assert pip[-4:] == ["-e", ".[tpu,data]", *CONSTRAINED]
    assert calls(environment, "gcsfuse")[0][-2:] == ["stories", "/mnt/stories"]
    assert calls(environment, "python") == [["python", *TRAIN]]
    assert launched.stdout == f"trained in {code}\n"


def test_pod_keeps_its_slice_when_training_fails(launch, environment):
    launched = launch(*POD, "--delete", *TRAINED, PYTHON_STATUS="2")
    assert launched.returncode == 2
    assert not [call for call in calls(environment, "gcloud") if call[4] in ("delete", "create")]


def test_a_worker_stops_its_training_before_it_is_installed_anew(launch, environment):
    home = Path(environment["HOME"])
    assert launch(*POD, *TRAINED).returncode == 0
    python = home / "contextualstory" / "venv" / "bin" / "python"
    python.unlink()
    python.write_text(
        "#!/bin/bash\ntrap 'echo saved; exit' TERM\ntouch ~/on\nwhile :; do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    worker = ["bash", home / "contextualstory" / "code" / "scripts" / "tpu_worker.sh"]
    watching = subprocess.Popen([*worker, "train", *TRAINING], env=environment)
    wait_for(home / "on")
    watching.kill()  # the connection is lost
    watching.wait()
    shutil.copytree(home / "contextualstory" / "code", home / "contextualstory" / "new")
    subprocess.run([*worker, "install"], env=environment, check=True)
    assert (home / "contextualstory" / "train.log").read_text() == "saved\n"


def test_gke_submits_what_git_tracks(launch, environment, checkout):
    (checkout / "build" / "gke").mkdir(parents=True, exist_ok=True)
    (checkout / "build" / "gke" / "old.py").touch()
    assert launch(*GKE, *TRAINED).returncode == 0
    ((*_, context, command),) = calls(environment, "xpk")
    folder = Path(context.removeprefix("--script-dir="))
    assert {path.name for path in folder.iterdir()} == {".gitignore", "configs", "scripts"}
    train = words(command.split(" && exec ")[1])
    assert train == ["bash", "scripts/resumable.sh", "--forward", "python", *TRAIN]


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (3, 3), (143, 0)])
def test_slurm_job_queues_again_where_sigterm_ended_it(
    launch, environment, checkout, tmp_path, status, expected
):
    spool = tmp_path / "slurm_script"  # SLURM runs a copy
    shutil.copy(checkout / "scripts" / "train.slurm", spool)
    variables = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "4", "SRUN_STATUS": str(status)}
    variables |= {"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_NTASKS_PER_NODE": "4"}
    job = ["bash", str(spool), *TRAINED]
    ended = subprocess.run(job, cwd=checkout, env=environment | variables)
    assert ended.returncode == expected
    ((*step, wrapper, python),) = [call[:7] for call in calls(environment, "srun")]
    assert (step[3], wrapper, python) == ("--cpus-per-task=4", "scripts/resumable.sh", "python")
    requeued = calls(environment, "scontrol")
    assert requeued == ([["scontrol", "requeue", "17"]] if status == 143 else [])


def test_slurm_wants_a_process_a_gpu_and_the_checkout(launch, tmp_path):
    variables = {"SLURM_JOB_ID": "17", "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_PER_NODE": "8"}
    refused = launch(*SLURM, *TRAINED, **variables)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: 1 tasks a node for 8 GPUs; there must be one a GPU")
    job = ["bash", str(SCRIPTS / "train.slurm"), *TRAINED]
    refused = subprocess.run(
        job, cwd=tmp_path, env=os.environ | {"SLURM_JOB_ID": "17"}, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert refused.stderr.endswith("submit from there: sbatch scripts/train.slurm\n")


SAVES = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    sys.exit(int(sys.argv[2]))
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1]).touch()
while True: time.sleep(0.01)
"""


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "to all"])
@pytest.mark.parametrize(("status", "expected"), [(0, 143), (5, 5)])
def test_resumable_tells_stopped_from_done(tmp_path, forward, status, expected):
    wrapper = ["bash", str(SCRIPTS / "resumable.sh"), *(["--forward"] if forward else [])]
    on = tmp_path / "on"
    child = [sys.executable, "-c", SAVES, str(on), str(status)]
    process = subprocess.Popen([*wrapper, *child], start_new_session=True)
    wait_for(on)
    if forward:
        process.send_signal(signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == expected


@pytest.mark.parametrize("status", [0, 3])
def test_resumable_passes_a_status_on(status):
    command = ["bash", str(SCRIPTS / "resumable.sh"), "bash", "-c", f"exit {status}"]
    assert subprocess.run(command).returncode == status


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.02)
