"""The one thread that generates: requests wait in a queue, and those alike share a batch.

Every batch has `BATCH` stories, the last repeated where there are fewer: so a story's bytes do not
depend on what was generated with it, and each model is compiled once.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import re
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from contextualstory_jax.checkpoints.layout import newest, read_model
from contextualstory_jax.checkpoints.manager import Checkpoints
from contextualstory_jax.data.vocabulary import read_vocabulary
from contextualstory_jax.diffusion.denoising import clean_estimate, level_steps, make_sampler
from contextualstory_jax.diffusion.solvers.sampler import Sampler
from contextualstory_jax.sampling.model_summary import about
from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.sampling.pretrained import SHIPPED, find_checkpoint
from contextualstory_jax.sampling.prompts import Kept, Story
from contextualstory_jax.sampling.sample import Generated, fill
from contextualstory_jax.sampling.windows import windows
from contextualstory_jax.utils.cli import OUT_OF_MEMORY
from contextualstory_jax.utils.errors import UserError, require

BATCH = 4  # stories
MOST_WAITING = 64  # jobs
MOST_OF_CLIENT = 24  # jobs of one address that wait or are generated
PREVIEW_SECONDS = 0.5  # between two previews, at least
PREVIEW_SHARE = 5  # seconds of generation for each second of preview, at least

logger = logging.getLogger(__name__)


class Model:
    """A checkpoint that the studio serves, loaded when it is first used."""

    def __init__(self, name: str | None):
        """Read its config. Raises `UserError` where there is no such model."""
        self.folder: Path = find_checkpoint(name)
        self.name = "the model that ships" if self.folder == SHIPPED else str(name)
        self.config = read_model(self.folder)
        self.vocabulary = read_vocabulary(self.folder)
        self.about = about(self.config, self.vocabulary)

    @functools.cached_property
    def pipeline(self) -> StoryPipeline:
        """The model with weights. Raises `UserError` where they cannot be read."""
        return StoryPipeline.load(self.folder)

    @functools.cached_property
    def storyflow(self) -> list[float]:
        """The mean of the training stories; none where the model has no StoryFlow Adapter."""
        if not self.config.unet.use_motion_condition:
            return []
        return [*self._newest[1]["storyflow"]]

    @property
    def step(self) -> int:
        """The training step of the weights."""
        return self._newest[0]

    @functools.cached_property
    def _newest(self) -> tuple[int, dict]:
        with Checkpoints(self.folder) as checkpoints:  # the weights may be large, and wait
            return newest(checkpoints)


@dataclasses.dataclass(eq=False)
class Job:
    """Stories of one request, that differ in their seeds alone."""

    model: Model
    story: Story
    seeds: Sequence[int]
    kept: Kept | None
    options: dict[str, Any]  # of `StoryPipeline.draw_batches`, hashable; seeds and batch aside
    finish: Callable[[Generated], object]  # called by the worker's thread
    client: Hashable = None
    step: int = 0
    preview: UInt8[np.ndarray, "f h w 3"] | None = None  # of the first story
    error: str = ""
    cancelled: bool = False
    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    results: dict[int, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    taken: int = 0  # stories that are generated or were

    @property
    def key(self) -> Hashable:
        """Equal for jobs that may share a batch."""
        options = tuple(sorted(self.options.items()))
        return self.model.folder, len(self.story.sentences), options

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The solver."""
        config = self.model.config
        return make_sampler(config.scheduler, self.options["sampling"], config.kept_frames)

    @functools.cached_property
    def steps(self) -> int:
        """Calls of the network for all stories."""
        config, count = self.model.config, len(self.story.sentences)
        length, kept = config.unet.n_frames, self.kept.keep if self.kept else (False,) * count
        found = windows(count, length, self.options["window_overlap"])
        needed = [w for w in found if not all(kept[w.start : w.start + length])]
        return len(self.sampler.timesteps) * len(needed) * -(-len(self.seeds) // BATCH)


Slot = tuple[Job, int]  # a story of a job


class Worker:
    """Generates jobs in the order they came in."""

    def __init__(self, warm: Model | None = None):
        """Start the thread.

        Args:
            warm: compiled before the first job.
        """
        self._queue: collections.deque[Job] = collections.deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(warm,), daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises `UserError` where the queue or its client's is full."""
        with self._changed:
            waiting = {*self._queue, *self._running}
            own = sum(other.client == job.client for other in waiting)
            require(
                own < MOST_OF_CLIENT,
                f"you have {own} stories waiting; cancel one or wait for it",
            )
            require(len(waiting) < MOST_WAITING, "the queue is full; try again in a minute")
            self._queue.append(job)
            self._changed.notify()

    def position(self, job: Job) -> int:
        """The number of jobs before this one; 0 while it is generated."""
        with self._changed:
            return self._queue.index(job) + 1 if job in self._queue and not job.taken else 0

    def cancel(self, job: Job) -> None:
        """End a job, within one step if it is being generated; nothing of it is kept."""
        with self._changed:
            if not job.done.is_set():
                job.cancelled, job.error = True, "cancelled"
                if job in self._queue:
                    self._queue.remove(job)
                job.done.set()

    def close(self) -> None:
        """Cancel all jobs and end the thread."""
        with self._changed:
            self._closed = True
            jobs = [*self._queue, *self._running]
            self._changed.notify()
        for job in jobs:
            self.cancel(job)
        self._thread.join()

    def _run(self, warm: Model | None) -> None:
        if warm is not None:
            try:
                warm.pipeline.compile(batch_size=BATCH)
            except Exception:  # the first job will say it to its user
                logger.exception("the model cannot be compiled")
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                batch = self._take()
                self._running = list(dict.fromkeys(job for job, _ in batch))
            self._try(batch)
            with self._changed:
                self._running = []

    def _take(self) -> list[Slot]:
        """The stories of the next batch, of the first job and of those alike."""
        key, batch = self._queue[0].key, []
        for job in [job for job in self._queue if job.key == key]:
            while job.taken < len(job.seeds) and len(batch) < BATCH:
                batch.append((job, job.taken))
                job.taken += 1
            if job.taken == len(job.seeds):
                self._queue.remove(job)
        return batch

    def _try(self, batch: list[Slot]) -> None:
        """Generate a batch; where that fails, each of its jobs alone, so that others go on."""
        jobs = dict.fromkeys(job for job, _ in batch)
        try:
            self._generate(batch)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._try([slot for slot in batch if slot[0] is job])
                return
            self._fail(batch[0][0], error)

    def _fail(self, job: Job, error: Exception) -> None:
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
        if isinstance(error, UserError):
            job.error = str(error)
        elif re.search("RESOURCE_EXHAUSTED|Out of memory", str(error)):
            job.error = OUT_OF_MEMORY
        else:
            logger.error("a story could not be generated", exc_info=error)
            job.error = "the story could not be generated; the server's log says why"
        job.done.set()

    def _generate(self, batch: list[Slot]) -> None:
        slots = fill(batch, BATCH)
        first = batch[0][0]
        jobs = list(dict.fromkeys(job for job, _ in batch))
        (generated,) = [
            *first.model.pipeline.draw_batches(
                [job.story for job, _ in slots],
                kept=[job.kept for job, _ in slots],
                seed=[job.seeds[i] for job, i in slots],
                batch_size=BATCH,
                callback_on_step_end=_Watch(batch, jobs),
                **first.options,
            )
        ] or [None]
        if generated is None or all(job.cancelled for job in jobs):
            return
        for (job, i), images, latents in zip(batch, *generated, strict=False):
            job.results[i] = images, latents
        for job in jobs:
            if len(job.results) == len(job.seeds) and not job.cancelled:
                self._finish(job)

    def _finish(self, job: Job) -> None:
        results = [job.results.pop(i) for i in range(len(job.seeds))]
        try:
            job.finish(Generated(*map(np.stack, zip(*results, strict=True))))
        except Exception as error:
            self._fail(job, error)
        job.done.set()


class _Watch:
    """The callback after each step: counts, shows a preview, and stops what nobody waits for."""

    def __init__(self, batch: Sequence[Slot], jobs: Sequence[Job]):
        self.batch, self.jobs = batch, jobs
        self.first = {job: number for number, (job, _) in reversed([*enumerate(batch)])}
        self.levels = level_steps(jobs[0].model.config.scheduler, jobs[0].sampler)
        self.latents: Any = None  # after the step before
        self.next_preview = 0.0

    def __call__(self, pipeline: StoryPipeline, step: int, time_: Any, tensors: dict) -> None:
        for job in self.jobs:
            job.step += 1
        if all(job.cancelled for job in self.jobs):
            pipeline.interrupt = True
            return
        before, self.latents = self.latents, tensors["latents"]
        start = time.monotonic()
        last = len(self.levels) - 2  # after which the result follows at once
        if step in (0, last) or start < self.next_preview:
            return
        levels = self.levels[step : step + 2]
        if self.jobs[0].sampler.stochastic:  # whose steps end in fresh noise
            shown = self.latents / np.hypot(*levels[1])
        else:
            shown = clean_estimate(before, self.latents, levels)
        if shown is None:
            return
        images = pipeline.preview(shown)
        for job, number in self.first.items():
            job.preview = images[number, : len(job.story.sentences)]
        now = time.monotonic()
        self.next_preview = now + max(PREVIEW_SECONDS, PREVIEW_SHARE * (now - start))
