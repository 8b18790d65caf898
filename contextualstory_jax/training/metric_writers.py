"""Metric writers of a run: `metrics.jsonl`, TensorBoard (without TensorFlow), wandb."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter

from contextualstory_jax.checkpoints.layout import write_text
from contextualstory_jax.utils.errors import UserError


class ScalarWriter:
    """Appends one JSON object a call to `metrics.jsonl`, and the same values to TensorBoard.

    A run that starts again after `first_step` takes back what was written of later steps, so that
    the curves have neither gap nor repeat. With `wandb_project` it all goes there too, to one run
    of the workdir's name. Raises `UserError` where the extra [wandb] is not installed.
    """

    def __init__(self, workdir: Path, first_step: int, wandb_project: str | None = None):
        self._wandb = None if wandb_project is None else _open_wandb(wandb_project, workdir)
        self.path = workdir / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step(line) <= first_step]
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Show an image in TensorBoard."""
        self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoWriter:
    """The writer of all other processes: it writes nothing."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record nothing."""

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing is open."""


def _open_wandb(project: str, workdir: Path) -> Any:
    try:
        import wandb  # type: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "wandb_project needs wandb: pip install 'contextualstory-jax[wandb]'"
        ) from error
    name = workdir.absolute().name
    return wandb.init(project=project, name=name, id=name, resume="allow", dir=str(workdir))


def _step(line: str) -> float:
    """The step of a line; infinity for a line that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
