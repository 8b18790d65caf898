"""The original, in a process of its own that answers one request at a time."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contextualstory_jax.utils.errors import UserError, require
from scripts.benchmarks.measuring import Row, Task

SCRIPT = Path(__file__).parents[1] / "benchmark_reference.py"


class Original:
    """`scripts/benchmark_reference.py`, run by the Python that has the original's packages."""

    def __init__(self, folder: Path, python: str, variants: Sequence[str]):
        """Raises `UserError` where the original cannot be run so."""
        require(
            (folder / "contextualstory" / "models").is_dir(),
            f"no original in {folder}: name a clone of sixiaozheng/ContextualStory",
        )
        self.variants, self._errors = variants, tempfile.TemporaryFile("w+")
        try:
            self._process = subprocess.Popen(
                [python, str(SCRIPT), str(folder.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                # What this Python finds its packages by would hide those of that one.
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            )
        except OSError as error:
            raise UserError(f"cannot run {python}: {error.strerror}") from error
        self.versions = self._answer()

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Send a request and wait. Raises `UserError` with what went wrong over there."""
        assert self._process.stdin
        try:
            print(json.dumps({"do": do, **values}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # what it left says why
        return self._answer()

    def outputs(self, what: str, variant: str) -> list[np.ndarray]:
        """The arrays that it computes for a request."""
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "outputs.npz")
            self.ask("outputs", what=what, variant=variant, file=file)
            return list(np.load(file).values())

    def tasks(self, what: str) -> dict[str, Task]:
        """Doing it once, in each variant."""

        def seconds(variant: str) -> float:
            return self.ask("time", what=what, variant=variant)["seconds"]

        return {f"original, {v}": functools.partial(seconds, v) for v in self.variants}

    def peak_memory(self) -> Row:
        """The most memory it has held so far."""
        return Row("peak memory of the original", [self.ask("memory")["bytes"] / 1e9], "GB")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError:
            self.close()
            self._errors.seek(0)
            said = (self._errors.read().strip() or line.strip() or "no answer").splitlines()[-1]
            raise UserError(f"the original cannot be run: {said}") from None
        require("error" not in answer, f"the original fails: {answer.get('error')}")
        return answer
