"""The actions of the studio: each one changes a story, and saves it."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contextualstory_jax.sampling.arguments import (
    SEEDS,
    check_choice,
    check_integer,
    check_stories,
    read_frames,
    read_size,
)
from contextualstory_jax.sampling.export_formats import FORMATS, check_formats
from contextualstory_jax.sampling.prompts import OVERLAP, Kept, Story, fit_image
from contextualstory_jax.sampling.regeneration import seed_of
from contextualstory_jax.sampling.sample import Generated
from contextualstory_jax.sampling.saved_story import JSON, SavedStory
from contextualstory_jax.studio.forms import (
    Draft,
    Form,
    as_json,
    form_of,
    kept_frames,
    locked_frames,
)
from contextualstory_jax.studio.frames import (
    arranged,
    by_hand,
    checkpoint_path,
    generated_story,
    is_of,
    moved_context,
    moved_storyflow,
    order_after,
    reordered,
    sources_of,
)
from contextualstory_jax.studio.inputs import (
    Settings,
    decode_image,
    read_context,
    read_frame,
    read_own_images,
    read_story,
    read_storyflow,
)
from contextualstory_jax.studio.projects import Project, Projects
from contextualstory_jax.studio.worker import Job, Model, Worker
from contextualstory_jax.utils.errors import UserError, require

MOST_CANDIDATES = 8
EXPORTS = ("png", *FORMATS, "json")


class Studio:
    """Stories, models and the worker that generates."""

    def __init__(self, models: Sequence[Model], projects: Projects, worker: Worker):
        self.models = {model.name: model for model in models}
        self.projects, self.worker = projects, worker
        self._jobs: dict[str, Job] = {}  # by link, those that are not done and the last one
        self._submitting = threading.Lock()

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
        context: Any = None,
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
            context: words that the model reads for some sentences where a window begins with them;
                None for those of the same sentences before.
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
        before = Story(()) if saved is None else saved.story
        sources = sources_of(before.sentences, story.sentences)
        if context is None:
            words = moved_context(before.context, before.sentences, story.sentences, sources)
        else:
            words = read_context(context, len(sources))
        story = story._replace(context=words, id=before.id)
        size = (chosen.config.height, chosen.config.width)
        kept = kept_frames(project, sources, keep) | own.keys()
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
        page |= {"locked": sorted(kept), "context": as_json(words)}
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
        context: Any = None,
        near: Any = False,
        client: Hashable = None,
    ) -> Job:
        """Generate some frames again; all others stay.

        Args:
            link: of the story.
            frames: their numbers.
            settings: all else.
            sentences: as many as frames, where some have changed.
            context: as for `generate`.
            near: whether they stay near to the old ones.
            client: whose jobs are limited.

        Raises:
            UserError: For input that is not right.
        """
        project, saved, model = self._open(link, sentences, context)
        again = read_frames(frames, model.config.unet, len(saved.seeds))
        shared = seed_of([saved.seeds[i] for i in again]) if near else None
        job = self._job(project, model, saved, again, [settings.seed], settings, client, shared)
        page = {"sentences": list(saved.story.sentences), "context": as_json(saved.story.context)}
        self._submit(project, job, page)
        return job

    def candidates(
        self,
        link: Any,
        frames: Any,
        count: Any,
        settings: Settings,
        *,
        sentences: Any = None,
        context: Any = None,
        client: Hashable = None,
    ) -> Job:
        """Generate versions of some frames, of which `choose` takes one into the story.

        Arguments beside `count` are those of `regenerate`.

        Raises:
            UserError: For input that is not right.
        """
        require(count != 0, "candidates must be at least 1; got 0")
        check_integer("candidates", count, 1, MOST_CANDIDATES)
        project, saved, model = self._open(link, sentences, context)
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
        chosen = found[check_integer("number", number, 0, len(found) - 1)]
        project.save(chosen)
        project.write_page(sentences=list(chosen.story.sentences))

    def replace(self, link: Any, frame: Any, image: Any) -> None:
        """Put one's own image in place of a frame. Raises `UserError` for what is no image."""
        project, saved, _ = self._open(link)
        read_frame("frame", frame, len(saved.seeds))
        images = saved.images.copy()
        images[frame] = fit_image(decode_image(image), *images.shape[1:3])
        seeds = tuple(None if i == frame else seed for i, seed in enumerate(saved.seeds))
        first = images[0] if saved.story.first_frame is not None else None
        story = saved.story._replace(first_frame=first)
        # Without latents, so that the VAE encodes those of kept frames.
        project.save(by_hand(saved, story=story, images=images, latents=None, seeds=seeds))
        self.lock(link, frame, True)

    def arrange(self, link: Any, frames: Any) -> None:
        """Put the frames of a story in another order, without those that are left out.

        Args:
            link: of the story.
            frames: numbers of frames as they are now, in their new order.

        Raises:
            UserError: For other numbers, and where a continuation's first frame would not be first.
        """
        project, saved, model = self._open(link)
        count = len(saved.seeds)
        listed = isinstance(frames, list) and len(frames) > 0
        require(listed, "frames must be a list of the frames that stay, in their new order")
        order = [read_frame("frames", i, count) for i in frames]
        require(len({*order}) == len(order), "frames: one is named twice; name each at most once")
        first = saved.story.first_frame is not None
        require(not first or order[0] == 0, "the story continues frame 0; leave it the first")
        draft, locked = self.form(project).draft, locked_frames(project)
        sentences, flow = draft.sentences, draft.storyflow
        if len(sentences) != count:  # they are being written
            sentences, flow = list(saved.story.sentences), None
        words = {int(i): text for i, text in draft.context.items()}
        project.save(reordered(saved, order, model.config.unet.n_frames))
        project.write_page(
            sentences=[sentences[i] for i in order],
            locked=[i for i, frame in enumerate(order) if frame in locked],
            storyflow=moved_storyflow(flow, order) if flow else None,
            context=as_json({i: words[f] for i, f in enumerate(order) if f in words}),
        )

    def move(self, link: Any, frame: Any, move: str) -> None:
        """Move a frame by one, or remove it: `move` is one of `MOVES`."""
        count = len(self._open(link)[1].seeds)
        self.arrange(link, order_after(move, read_frame("frame", frame, count), count))

    def lock(self, link: Any, frame: Any, locked: bool) -> None:
        """Remember that a frame stays when the story is generated again."""
        project = self.projects.find(link)
        with project.lock:
            saved = project.read()
            read_frame("frame", frame, 0 if saved is None else len(saved.seeds))
            others = {*locked_frames(project)} - {frame}
            project.write_page(locked=sorted(others | ({frame} if locked else set())))

    def step(self, link: Any, by: int) -> None:
        """Undo (-1) or redo (1) the last change. Raises `UserError` where there is none."""
        project = self._idle(self.projects.find(link))
        before, locked = project.read(), locked_frames(project)
        project.step(by)
        after = project.read()
        assert before is not None and after is not None
        sources = sources_of(before.story.sentences, after.story.sentences)
        project.write_page(
            sentences=list(after.story.sentences),
            locked=[i for i, source in enumerate(sources) if source in locked],
            context=as_json(after.story.context),
        )

    def cancel(self, link: Any) -> None:
        """End the generation of a story; it stays as it was before."""
        if job := self._jobs.get(self.projects.find(link).link):
            self.worker.cancel(job)

    def export(self, link: Any, kind: Any, folder: Path) -> list[Path]:
        """Write a story in one format, and return the files.

        Args:
            link: of the story.
            kind: one of `EXPORTS`; `png` is a file for each frame, `json` also the
                files beside it with which `generate --from` makes the same again.
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
        if kind in FORMATS:
            return [folder / FORMATS[kind][0]]
        # In one folder they are what `generate --from` reads.
        others = {file for file, _ in FORMATS.values()}
        files = [path for path in sorted(folder.iterdir()) if path.name not in others]
        return sorted(files, key=lambda path: path.name != JSON)

    def form(self, project: Project) -> Form:
        """Everything on the page as it was last; of a story of `generate`, its own values."""
        saved = project.read()
        return form_of(project, saved, self.model_of(project, saved).config.unet.n_frames)

    def settings(self, link: Any, seed: Any) -> Settings:
        """Those that a story was generated with, and another seed."""
        project = self.projects.find(link)
        form, saved = self.form(project), project.read()
        flow = form.draft.storyflow
        if flow is not None and saved is not None and len(flow) != len(saved.seeds) - 1:
            flow = None  # of sentences that are being written
        return Settings(seed, form.steps, form.guidance, flow)

    def model_of(self, project: Project, saved: SavedStory | None) -> Model:
        """The model that a story is of; the first one where that is not served."""
        name, path = project.read_page().get("model"), saved and saved.checkpoint.get("path", "")
        models = [*self.models.values()]
        of_page = [model for model in models if model.name == name]
        of_story = [model for model in models if saved and checkpoint_path(model) == path]
        return [*of_page, *of_story, *models][0]

    def save_draft(self, link: str, draft: Draft) -> SavedStory | None:
        """Keep what is written and not generated yet, and return the story as it is."""
        if not link:
            return None
        project = self.projects.find(link)
        project.write_page(**draft._asdict())
        return project.read()

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

    def _open(
        self, link: Any, sentences: Any = None, context: Any = None
    ) -> tuple[Project, SavedStory, Model]:
        """A story with frames, perhaps with other sentences, and the model it is of."""
        project = self._idle(self.projects.find(link))
        saved = project.read()
        if saved is None:
            raise UserError("the story has no frames yet; generate it first")
        old = story = saved.story
        if sentences is not None:
            story = story._replace(sentences=read_story(sentences).sentences)
            new, count = story.sentences, len(saved.seeds)
            require(
                len(new) == count,
                f"{len(new)} sentences for {count} frames; generate the story first",
            )
            words = moved_context(old.context, old.sentences, new, range(count))
            story = story._replace(context=words)
        if context is not None:
            story = story._replace(context=read_context(context, len(saved.seeds)))
        return project, dataclasses.replace(saved, story=story), self.model_of(project, saved)

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
        same_model = is_of(saved, model)
        own = saved.options() if same_model else {}
        negative = own.get("negative_prompt")
        options: dict[str, Any] = {
            "sampling": settings.sampling(model, own.get("sampling")),
            "size": read_size(model.config, *saved.images.shape[1:3]),
            "storyflow": read_storyflow(settings.storyflow, model.config.unet, len(keep)),
            "negative_prompt": tuple(negative) if isinstance(negative, list) else negative,
            "shared_noise_seed": shared_seed,
            "window_overlap": OVERLAP,
        }
        check_stories([saved.story], model.config.unet, options["size"])
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
        with self._submitting:
            self._idle(project)  # still, where two requests came at once
            new = not project.folder.exists()
            if page is not None:
                project.write_page(**page)
            try:
                self.worker.submit(job)
            except UserError:
                if new:
                    shutil.rmtree(project.folder)
                raise
            running = {link: job for link, job in self._jobs.items() if not job.done.is_set()}
            self._jobs = {**running, project.link: job}  # without the frames of those before
