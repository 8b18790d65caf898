"""`contextualstory-jax COMMAND`, and the same as `python -m contextualstory_jax COMMAND`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import contextualstory_jax
import convert_weights
from contextualstory_jax import __main__
from contextualstory_jax.utils.errors import UserError

HELP = """
import sys
from contextualstory_jax.__main__ import COMMANDS, main
for words in ([], *([name] for name in COMMANDS)):
    try:
        main([*words, "--help"], "program")
    except SystemExit as end:
        assert end.code == 0
    late = {"jax", "flax", "orbax", "transformers"} & sys.modules.keys()
    assert not late, (words, late)
"""


def test_help_of_each_command_comes_without_importing_jax():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)

    usages = [line for line in done.stdout.splitlines() if line.startswith("usage: ")]
    names = ["COMMAND", *__main__.COMMANDS]
    assert [line.split()[2] for line in usages] == names
    assert {line.split()[1] for line in usages} == {"program"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a command: generate, train, evaluate, "),
        (["trian", "--config", "shapes"], "no command 'trian'; closest: train; "),
        (["cache_latents"], "no command 'cache_latents'; closest: cache-latents; "),
        (["--steps"], "unrecognized arguments: --steps; see --help"),
        (
            ["train", "--config", "shapez", "--workdir", "run"],
            "no config shapez; .*, shapes, shapes_vae$",
        ),
        (["cache-latents", "--config", "shapes"], "arguments are required: --checkpoint, --out"),
        (["storyflow-mean", "--config", "shapes"], "arguments are required: --checkpoint"),
        (["convert", "source", "out", "--weights", "raw"], "unrecognized arguments: --weights"),
        (["export", "source"], "arguments are required: OUTPUT"),
        (["prepare", "shapes"], "invalid choice: 'shapes'"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError, match=message) as caught:
        __main__.main(words)

    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_python_runs_the_package_as_the_command():
    command = [sys.executable, "-m", "contextualstory_jax"]

    version = subprocess.run([*command, "--version"], capture_output=True, text=True)
    unknown = subprocess.run([*command, "exprot"], capture_output=True, text=True)

    assert version.stdout == f"contextualstory-jax {contextualstory_jax.__version__}\n"
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == (
        "error: no command 'exprot'; closest: export; python -m contextualstory_jax --help lists "
        "all\n"
    )


@pytest.mark.parametrize(
    ("main", "words", "program"),
    [
        (__main__.main, ["train"], "python -m contextualstory_jax train"),
        (convert_weights.main, [], "convert_weights.py"),
        (convert_weights.main, ["--export"], "convert_weights.py --export"),
    ],
)
def test_help_names_the_command_as_it_was_called(capsys, main, words, program):
    with pytest.raises(SystemExit):
        main([*words, "--help"])

    assert capsys.readouterr().out.startswith(f"usage: {program} ")
