"""Progress bar, metric averaging and profiling of a training run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import clu.metrics
import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.distributed.multihost import is_first
from contextualstory_jax.models.flops import peak_flops
from contextualstory_jax.training.metric_writers import NoWriter, ScalarWriter

# Of each step; what is logged are the means of all steps since the last log.
METRICS = ("loss", "grad_norm", "param_norm", "update_norm", "learning_rate")
StepMetrics = clu.metrics.Collection.create(
    **{name: clu.metrics.Average.from_output(name) for name in METRICS}
)


def starting(config: TrainConfig, workdir: Path, first_step: int) -> str:
    """The line at the start of a run: devices, precision, and the weights it begins with."""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if first_step > 0:
        weights = f"resuming from step {first_step} of {config.steps}"
    elif config.init_from is not None:
        weights = f"starting from the weights in {config.init_from}"
    else:
        weights = f"starting from new weights, seed {config.seed}"
    return f"training in {workdir} on {devices}, {config.compute_dtype}; {weights}"


class Progress:
    """Progress bar of a run, and the means of its metrics over all steps since the last log."""

    def __init__(
        self, config: TrainConfig, writer: ScalarWriter | NoWriter, first_step: int, flops: int
    ):
        """Open the bar.

        Args:
            flops: Of a step, on all devices together.
        """
        self._config, self._writer = config, writer
        self._bar = tqdm(
            total=config.steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not is_first(),
        )
        self._began: float | None = None  # when the first step, which compiles, was done
        self._logged = (0.0, first_step)  # the time and the step of the last log
        self._flops = flops
        device = jax.local_devices()[0]
        peak = peak_flops(device.device_kind, config.compute_dtype)
        self._peak = peak and peak * jax.device_count()

    def add(self, number: int, values: dict[str, jax.Array]) -> None:
        """Count a step."""
        self._bar.update()
        if self._began is None:
            jax.block_until_ready(values)
            self._began = time.monotonic()
            self._logged = (self._began, number)

    @property
    def out_of_time(self) -> bool:
        """Whether `config.max_minutes` are over, by the first process's clock."""
        if self._config.max_minutes is None:
            return False
        return bool(multihost_utils.broadcast_one_to_all(np.array(self._seconds_left() <= 0)))

    def log(
        self,
        steps: Sequence[tuple[int, dict[str, jax.Array]]],
        waited: float,
        measured: Mapping[str, float],
        aloud: bool,
    ) -> None:
        """Write the means of some steps, and print them if `aloud`.

        Args:
            waited: seconds that steps waited for their stories since the last log.
            measured: of the state after the last of them.
        """
        means = StepMetrics.empty()
        for _, values in jax.device_get(list(steps)):
            means = means.merge(StepMetrics.single_from_model_output(**values))
        number = steps[-1][0]
        now, (logged_time, logged_number) = time.monotonic(), self._logged
        # Of the first step, which compiles, there is no time.
        seconds = (now - logged_time) / max(number - logged_number, 1)
        rate = 1 / seconds if number > logged_number else 0.0
        values = {name: float(value) for name, value in means.compute().items()}
        values["stories_per_second"] = rate * self._config.batch_size
        values["step_time"] = seconds if rate else 0.0
        values["data_wait"] = waited / max(number - logged_number, 1)  # seconds a step
        values |= measured
        if self._peak:
            values["flop_utilization"] = self._flops * rate / self._peak
        values |= device_memory()
        self._writer.write(number, values)
        if self._config.max_minutes is not None:  # so that the time left that the bar shows is true
            steps_left = int(max(self._seconds_left(), 0) * rate)
            self._bar.total = min(self._config.steps, number + steps_left)
        self._bar.set_postfix(
            loss=f"{values['loss']:.4f}", stories_s=f"{values['stories_per_second']:.1f}"
        )
        if aloud and is_first():
            listed = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._bar.write(f"step {number}: {listed}")
        self._logged = (now, number)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done meanwhile out of the speed."""
        began = time.monotonic()
        yield
        time_logged, number = self._logged
        self._logged = (time_logged + time.monotonic() - began, number)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _seconds_left(self) -> float:
        if self._config.max_minutes is None or self._began is None:
            return math.inf
        return self._began + self._config.max_minutes * 60 - time.monotonic()


def device_memory() -> dict[str, float]:
    """GiB in use, and the peak so far, on this process's first device, where it reports them."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"memory": "bytes_in_use", "peak_memory": "peak_bytes_in_use"}
    return {name: stats[key] / 2**30 for name, key in names.items() if key in stats}


class Profile:
    """A profile of `config.profile_steps` steps, for TensorBoard, in `workdir/profile`."""

    def __init__(self, config: TrainConfig, workdir: Path):
        self._folder = workdir / "profile"
        start = config.profile_at
        self._steps = range(0) if start is None else range(start, start + config.profile_steps)
        self._running = False

    def before(self, step: int) -> None:
        """Begin with the first of the steps."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, values: Any) -> None:
        """End with the last."""
        if self._running and step + 1 not in self._steps:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Write what there is."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
