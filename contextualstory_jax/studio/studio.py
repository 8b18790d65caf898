"""The actions of the studio: each one changes a story, and saves it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contextualstory_jax.data.vocabulary import warnings
from contextualstory_jax.sampling.arguments import (
    SEEDS,
    check_choice,
    check_integer,
    check_stories,
    read_frames,
)
from contextualstory_jax.sampling.export_formats import FORMATS, check_formats
from contextualstory_jax.sampling.prompts import OVERLAP, Kept, Story, fit_image
from contextualstory_jax.sampling.sample import Generated
from contextualstory_jax.sampling.saved_story import SavedStory
from contextualstory_jax.sampling.windows import unclear_starts
from contextualstory_jax.studio.frames import (
    arranged,
    checkpoint_path,
    generated_story,
    sources_of,
)
from contextualstory_jax.studio.inputs import (
    Settings,
    decode_image,
    read_frame,
    read_own_images,
    read_story,
    read_storyflow,
)
from contextualstory_jax.studio.projects import Project, Projects
from contextualstory_jax.studio.worker import Job, Model, Worker
from contextualstory_jax.utils.errors import UserError, brief, require

MOST_CANDIDATES = 8
EXPORTS = ("png", *FORMATS, "json")


class Studio:
    """Stories, models and the worker that generates."""

    def __init__(self, models: Sequence[Model], projects: Projects, worker: Worker):
        self.models = {model.name: model for model in models}
        self.projects, self.worker = projects, worker
        self._jobs: dict[str, Job] = {}  # by link, the last one

    def model(self, name: Any) -> Model:
        """A model by its name; the first one where none is given."""
        name = name or next(iter(self.models))
        check_choice("model", name, list(self.models))
        return self.models[name]

    def generate(
        self,
        link: Any,
        sentences: Any,
        settings: Settings,
        *,
        keep: Any = None,
        images: Any = None,
        model: Any = "",
        client: Hashable = None,
    ) -> tuple[str, Job]:
        """Generate a story, or the frames of it that are not kept.

        Args:
            link: of the story; empty for a new one.
            sentences: a list, one a frame; frames of a story follow their sentences.
            settings: all else.
            keep: a list of frames that stay; None for those that are locked.
            images: by frame, one's own as base64 or data URL; 0 is a continuation's first.
            model: name of the model.
            client: whose jobs are limited.

        Returns:
            The story's link, and the job that generates it.

        Raises:
            UserError: For input that is not right; nothing is changed then.
        """
        chosen = self.model(model)
        story = read_story(sentences)
        own = read_own_images(images, len(story.sentences))
        project = self.projects.find(link) if link else None
        saved = None if project is None else self._idle(project).read()
        sources = sources_of(() if saved is None else saved.story.sentences, story.sentences)
        size = (chosen.config.height, chosen.config.width)
        if keep is None:
            locked = [] if project is None else project.read_page().get("locked", [])
            keep = [i for i, source in enumerate(sources) if source in locked]
        require(isinstance(keep, list), f"keep must be a list of frames; got {brief(keep)}")
        numbers = {read_frame("keep", i, len(sources)) for i in keep}
        kept = {i for i in numbers if sources[i] is not None} | own.keys()
        if saved is not None and kept - own.keys():
            size = saved.images.shape[1:3]
        base = arranged(saved, story, sources, size, own)
        if chosen.config.unet.is_continuation:
            require(0 in own or sources[0] == 0, "give a first frame, which the story continues")
            base = dataclasses.replace(base, story=story._replace(first_frame=base.images[0]))
            kept |= {0}
        frames = [i for i in range(len(sources)) if i not in kept]
        require(len(frames) > 0, f"all {len(kept)} frames are kept; leave one to generate")
        project = project or self.projects.create()
        page = {"sentences": list(story.sentences), "model": chosen.name, **settings._asdict()}
        page["locked"] = sorted(kept)
        job = self._job(project, chosen, base, frames, [settings.seed], settings, client)
        self._submit(project, job, page)
        return project.link, job

    def regenerate(
        self,
        link: Any,
        frames: Any,
        settings: Settings,
        *,
        sentences: Any = None,
        near: Any = False,
        client: Hashable = None,
    ) -> Job:
        """Generate some frames again; all others stay.

        Args:
            link: of the story.
            frames: their numbers.
            settings: all else.
            sentences: as many as frames, where some have changed.
            near: whether they stay near to the old ones.
            client: whose jobs are limited.

        Raises:
            UserError: For input that is not right.
        """
        project, saved, model = self._open(link, sentences)
        again = read_frames(frames, model.config.unet, len(saved.seeds))
        shared = saved.seeds[again[0]] if near else None
        job = self._job(project, model, saved, again, [settings.seed], settings, client, shared)
        self._submit(project, job)
        return job

    def candidates(
        self,
        link: Any,
        frames: Any,
        count: Any,
        settings: Settings,
        *,
        client: Hashable = None,
    ) -> Job:
        """Generate versions of some frames, of which `choose` takes one into the story.

        Raises:
            UserError: For input that is not right.
        """
        require(count != 0, "candidates must be at least 1; got 0")
        check_integer("candidates", count, 1, MOST_CANDIDATES)
        project, saved, model = self._open(link, None)
        again = read_frames(frames, model.config.unet, len(saved.seeds))
        check_integer("seed", settings.seed, 0, SEEDS[1] - count)
        seeds = [settings.seed + i for i in range(count)]
        job = self._job(project, model, saved, again, seeds, settings, client, to_choose=True)
        self._submit(project, job)
        return job

    def choose(self, link: Any, number: Any) -> None:
        """Take one of the candidates. Raises `UserError` where there is no such one."""
        project = self._idle(self.projects.find(link))
        found = project.read_candidates()
        require(len(found) > 0, "there are no candidates; generate some")
        project.save(found[check_integer("number", number, 0, len(found) - 1)])

    def replace(self, link: Any, frame: Any, image: Any) -> None:
        """Put one's own image in place of a frame. Raises `UserError` for what is no image."""
        project, saved, _ = self._open(link, None)
        count = len(saved.seeds)
        read_frame("frame", frame, count)
        images = saved.images.copy()
        images[frame] = fit_image(decode_image(image), *images.shape[1:3])
        seeds = tuple(None if i == frame else seed for i, seed in enumerate(saved.seeds))
        first = images[0] if saved.story.first_frame is not None else None
        project.save(
            dataclasses.replace(
                saved,
                story=saved.story._replace(first_frame=first),
                images=images,
                latents=None,  # the VAE encodes them where they are kept
                seeds=seeds,
            )
        )
        self.lock(link, frame, True)

    def lock(self, link: Any, frame: int, locked: bool) -> None:
        """Remember that a frame stays when the story is generated again."""
        project = self.projects.find(link)
        with project.lock:
            others = {*project.read_page().get("locked", [])} - {frame}
            project.write_page(locked=sorted(others | ({frame} if locked else set())))

    def step(self, link: Any, by: int) -> None:
        """Undo (-1) or redo (1) the last change. Raises `UserError` where there is none."""
        project = self._idle(self.projects.find(link))
        project.step(by)
        saved = project.read()
        assert saved is not None
        project.write_page(sentences=list(saved.story.sentences))

    def cancel(self, link: Any) -> None:
        """End the generation of a story; it stays as it was before."""
        if job := self._jobs.get(self.projects.find(link).link):
            self.worker.cancel(job)

    def export(self, link: Any, kind: Any, folder: Path) -> list[Path]:
        """Write a story in one format, and return the files.

        Args:
            link: of the story.
            kind: one of `EXPORTS`; `png` is a file for each frame, `json` makes the same again.
            folder: where the files are written.

        Raises:
            UserError: For a format that is not known, or whose library is not installed.
        """
        check_choice("format", kind, EXPORTS)
        check_formats([kind])
        saved = self.projects.find(link).read()
        if saved is None:
            raise UserError("the story has no frames yet; generate it first")
        saved.write(folder, formats=[kind] if kind in FORMATS else [])
        if kind == "png":
            return [folder / f"frame_{i}.png" for i in range(len(saved.seeds))]
        return [folder / ("story.json" if kind == "json" else FORMATS[kind][0])]

    def notes(self, sentences: Sequence[str], model: Model) -> list[str]:
        """Warnings of words that the model does not know, and of pronouns it cannot resolve."""
        lines = warnings(sentences, model.vocabulary) if model.vocabulary else []
        story = Story([s or "." for s in sentences])
        for i in unclear_starts(story, model.config.unet.n_frames, OVERLAP) if sentences else ():
            word = story.sentences[i].split()[0]
            lines.append(f"sentence {i + 1} begins a window: name who {word!r} is")
        return lines

    def settings(self, link: Any, seed: Any) -> Settings:
        """Those that a story was generated with, and another seed."""
        page = self.projects.find(link).read_page()
        return Settings(seed, page.get("steps"), page.get("guidance"), page.get("storyflow"))

    def next_seed(self, link: str, frame: int, seed: int) -> int:
        """The seed, or the next one that is not a frame's own, so that the frame changes."""
        saved = self.projects.find(link).read()
        seeds = () if saved is None else saved.seeds
        if not 0 <= frame < len(seeds) or seeds[frame] != seed:
            return seed
        return max(other for other in seeds if other is not None) + 1

    def titles(self, links: Iterable[str]) -> list[tuple[str, str]]:
        """Links of stories that are there, each with its first sentence."""
        rows = []
        for link in links:
            try:
                project = self.projects.find(link)
            except UserError:
                continue
            sentences = project.read_page().get("sentences") or [project.folder.name]
            rows.append((link, f"{sentences[0]} ({len(sentences)})"))
        return rows

    def running(self, link: str) -> Job | None:
        """The job that generates a story, if any."""
        job = self._jobs.get(link)
        return job if job is not None and not job.done.is_set() else None

    def _idle(self, project: Project) -> Project:
        require(
            self.running(project.link) is None,
            "this story is being generated; wait for it or cancel",
        )
        return project

    def _open(self, link: Any, sentences: Any) -> tuple[Project, SavedStory, Model]:
        """A story with frames, perhaps with other sentences, and the model it is of."""
        project = self._idle(self.projects.find(link))
        saved = project.read()
        if saved is None:
            raise UserError("the story has no frames yet; generate it first")
        model = self.model(str(project.read_page().get("model", "")))
        if sentences is not None:
            story = read_story(sentences)._replace(first_frame=saved.story.first_frame)
            require(
                len(story.sentences) == len(saved.seeds),
                f"{len(story.sentences)} sentences for {len(saved.seeds)} frames; "
                "generate the story first",
            )
            saved = dataclasses.replace(saved, story=story._replace(context=saved.story.context))
        return project, saved, model

    def _job(
        self,
        project: Project,
        model: Model,
        saved: SavedStory,
        frames: Sequence[int],
        seeds: Sequence[Any],
        settings: Settings,
        client: Hashable,
        shared_seed: int | None = None,
        to_choose: bool = False,
    ) -> Job:
        """A job that generates some frames of a story, and saves it."""
        for seed in seeds:
            check_integer("seed", seed, *SEEDS)
        keep = tuple(i not in frames for i in range(len(saved.seeds)))
        sampling = settings.sampling(model)
        flow = read_storyflow(settings.storyflow, model.config.unet, len(keep))
        options: dict[str, Any] = {
            "sampling": sampling,
            "size": tuple(saved.images.shape[1:3]),
            "storyflow": flow,
            "shared_noise_seed": shared_seed,
            "window_overlap": OVERLAP,
        }
        check_stories([saved.story], model.config.unet, options["size"])
        same_model = saved.checkpoint.get("path") == checkpoint_path(model)
        latents = saved.latents if same_model else None
        kept = Kept(saved.images, latents, keep) if any(keep) else None

        def finish(generated: Generated) -> None:
            stories = [
                generated_story(model, saved, keep, seed, options, *one)
                for seed, *one in zip(seeds, *generated, strict=True)
            ]
            if to_choose:
                project.write_candidates(stories)
            else:
                project.save(stories[0])

        return Job(model, saved.story, seeds, kept, options, finish, client)

    def _submit(self, project: Project, job: Job, page: Mapping[str, Any] | None = None) -> None:
        """Put a job into the queue; its page is saved first, so that a kill loses no sentence."""
        new = not project.folder.exists()
        if page is not None:
            project.write_page(**page)
        try:
            self.worker.submit(job)
        except UserError:
            if new:
                shutil.rmtree(project.folder)
            raise
        self._jobs[project.link] = job
