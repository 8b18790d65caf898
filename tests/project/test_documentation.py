"""Commands in README and docs: each is one that exists, with arguments that it takes.

Commands of this project parse their arguments as written and load the configs they name; launchers
run with `--dry-run`. What they do is tested elsewhere: README's first story in test_shipped.py, and
each subcommand from an installed wheel in test_wheel.py.
"""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from contextualstory_jax.__main__ import COMMANDS
from contextualstory_jax.config.config_files import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
# Commands of others: a shell's, Git's and a cloud's.
FOREIGN = {"curl", "gcloud", "git", "printf", "python3.11"}


def blocks(page: Path) -> Iterator[str]:
    yield from re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a block; assignments and redirections are left out."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word in (";", "&&"):
                if command:
                    yield command
                command = []
            elif command or not re.match(r"[A-Z]+=", word):
                command.append(word)


DOCUMENTED = [
    pytest.param(command, id=f"{page.stem}: {' '.join(command)[:60]}")
    for page in PAGES
    for block in blocks(page)
    for command in commands(block)
]


class Parsed(BaseException):
    """A script has parsed its arguments."""


def check_subcommand(module: str, arguments: Sequence[str]) -> None:
    parsed = importlib.import_module(f"contextualstory_jax.{module}").parse(arguments)
    values, overrides = parsed if isinstance(parsed, tuple) else (parsed, [])
    config = getattr(values, "config", None)
    if isinstance(config, str) and isinstance(overrides, list):
        load_config(config, overrides)


def check_script(path: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self: Any, *given: Any, **named: Any) -> None:
        _, rest = parse(self, *given, **named)
        assert rest == []
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / path), run_name="__main__")


def check_installation(arguments: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\[([\w,-]+)\]", " ".join(arguments)):
        assert {*extras.split(",")} <= project["optional-dependencies"].keys()
    assert "-c" not in arguments or (ROOT / arguments[arguments.index("-c") + 1]).is_file()


@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_documented_command_is_one_that_can_be_typed(command, monkeypatch):
    match command:
        case ["contextualstory-jax", name, *arguments]:
            check_subcommand(COMMANDS[name][0], arguments)
        case ["python", "-m", "pytest", *arguments]:
            paths = [word for word in arguments if word.startswith("tests")]
            assert all((ROOT / path).exists() for path in paths)
        case ["python", "-m", module, *arguments]:
            check_subcommand(module.removeprefix("contextualstory_jax."), arguments)
        case ["python", path, *arguments]:
            check_script(path, arguments, monkeypatch)
        case [pip, "install", *arguments] if pip.endswith("pip"):
            check_installation(arguments)
        case ["make", *arguments]:
            subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
        case [launcher, *arguments] if re.fullmatch(r"scripts/launch_\w+\.sh", launcher):
            dry = ["bash", launcher, "--dry-run", *arguments]
            subprocess.run(dry, cwd=ROOT, check=True, capture_output=True)
        case ["sbatch", *arguments]:
            assert [word for word in arguments if (ROOT / word).is_file()]
        case [script] if script.startswith("scripts/"):
            subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
        case [name, *_]:
            assert name in FOREIGN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_blocks_that_are_checked(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)

    assert not re.findall(r"^    (?:python|contextualstory-jax|make|pip|scripts/).*", text, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(
        r"\]\(([^)#:]+)\)|`((?:docs(?!/_build)|examples|scripts|configs|tests)/[\w./]+)`",
        page.read_text(),
    )

    for link, path in named:
        where = page.parent / link if link else ROOT / path
        assert where.exists(), where


def test_a_mistake_in_a_documented_command_is_found(monkeypatch):
    lines = (
        "contextualstory-jax generate --outt out",
        "contextualstory-jax train --config lost --workdir run",
        "contextualstory-jax train --config shapes --workdir run --config.stepz=1",
        "python scripts/rehearse_data.py --into out",
        "make nothing",
        "gcloudd storage",
    )
    for line in lines:
        [command] = commands(line)
        with pytest.raises((Exception, SystemExit)), monkeypatch.context() as patch:
            test_a_documented_command_is_one_that_can_be_typed(command, patch)
