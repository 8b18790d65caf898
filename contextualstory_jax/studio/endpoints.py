"""The studio's HTTP interface: named endpoints, which Gradio serves and describes."""

import asyncio
import functools
from asyncio import to_thread
from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr
from gradio.events import api

from contextualstory_jax.sampling.prompts import Story
from contextualstory_jax.studio import html
from contextualstory_jax.studio.forms import as_json, locked_frames
from contextualstory_jax.studio.inputs import Settings
from contextualstory_jax.studio.studio import Studio
from contextualstory_jax.studio.worker import Job
from contextualstory_jax.utils.errors import UserError

POLL_SECONDS = 0.2


def client_of(request: gr.Request) -> str:
    """The address whose requests are limited together: sessions cost a client nothing."""
    return request.client.host if request.client else ""


def describe(studio: Studio, link: str) -> dict[str, Any]:
    """A story as the endpoints return it."""
    project = studio.projects.find(link)
    saved, page = project.read(), project.read_page()
    story = Story(page.get("sentences", [])) if saved is None else saved.story
    return {
        "story": project.link,
        "sentences": list(story.sentences),
        "context": as_json(story.context),
        "seeds": [] if saved is None else list(saved.seeds),
        "locked": locked_frames(project),
        "frames": [] if saved is None else [html.data_url(image) for image in saved.images],
    }


async def finished(job: Job) -> None:
    """Wait for a job. Raises `UserError` with its error."""
    while not job.done.is_set():
        await asyncio.sleep(POLL_SECONDS)
    if job.error:
        raise UserError(job.error)


def answering(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """An endpoint whose `UserError` is its answer's error, in the same words."""

    @functools.wraps(function)
    async def answer(*arguments: Any, **named: Any) -> Any:
        try:
            return await function(*arguments, **named)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return answer


class Endpoints:
    """The endpoints, each named as its method."""

    NAMES = ("generate", "regenerate", "candidates", "choose", "replace", "arrange")
    NAMES += ("undo", "redo", "cancel", "projects")

    def __init__(self, studio: Studio):
        self.studio = studio

    def add(self) -> None:
        """Add them to the Gradio app that is being built."""
        for name in self.NAMES:
            api(answering(getattr(self, name)), api_name=name, concurrency_limit=None)

    async def generate(
        self,
        request: gr.Request,
        sentences: list[str],
        story: str = "",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        storyflow: list[float] | None = None,
        keep: list[int] | None = None,
        images: dict[str, str] | None = None,
        context: dict[str, str] | None = None,
        model: str = "",
    ) -> dict:
        """Generate a story, or the frames of one that are not kept."""
        settings = Settings(seed, steps, guidance, storyflow)
        link, job = await to_thread(
            self.studio.generate,
            story,
            sentences,
            settings,
            keep=keep,
            images=images,
            context=context,
            model=model,
            client=client_of(request),
        )
        await finished(job)
        return await to_thread(describe, self.studio, link)

    async def regenerate(
        self,
        request: gr.Request,
        story: str,
        frames: list[int],
        seed: int = 0,
        near: bool = False,
        sentences: list[str] | None = None,
        context: dict[str, str] | None = None,
    ) -> dict:
        """Generate some frames of a story again; the others stay."""
        changes = {"sentences": sentences, "context": context, "near": near}
        job = await self._again(self.studio.regenerate, request, story, frames, seed, **changes)
        await finished(job)
        return await to_thread(describe, self.studio, story)

    async def candidates(
        self, request: gr.Request, story: str, frames: list[int], count: int = 4, seed: int = 0
    ) -> list:
        """Generate versions of some frames, for `choose`."""
        candidates = self.studio.candidates
        job = await self._again(candidates, request, story, frames, seed, count=count)
        await finished(job)
        return await to_thread(self._candidates, story)

    async def choose(self, story: str, number: int) -> dict:
        """Take one of the candidates into the story."""
        return await self._changed(self.studio.choose, story, number)

    async def replace(self, story: str, frame: int, image: str) -> dict:
        """Put one's own image, a data URL, in place of a frame."""
        return await self._changed(self.studio.replace, story, frame, image)

    async def arrange(self, story: str, frames: list[int]) -> dict:
        """Put frames in another order, without those that are left out."""
        return await self._changed(self.studio.arrange, story, frames)

    async def undo(self, story: str) -> dict:
        """Take back the last change."""
        return await self._changed(self.studio.step, story, -1)

    async def redo(self, story: str) -> dict:
        """Make again what was taken back."""
        return await self._changed(self.studio.step, story, 1)

    async def cancel(self, story: str) -> None:
        """End the generation of a story."""
        self.studio.cancel(story)

    async def projects(self, stories: list[str]) -> list:
        """The stories of some links."""
        return [await to_thread(describe, self.studio, link) for link in stories]

    async def _again(
        self,
        function: Callable[..., Job],
        request: gr.Request,
        story: str,
        frames: Any,
        seed: Any,
        **changes: Any,
    ) -> Job:
        """A job for some frames, with the settings that the story was generated with."""

        def start() -> Job:
            settings = self.studio.settings(story, seed)
            return function(story, frames, settings=settings, client=client_of(request), **changes)

        return await to_thread(start)

    async def _changed(self, function: Callable[..., None], story: str, *arguments: Any) -> dict:
        """The story after a change."""
        await to_thread(function, story, *arguments)
        return await to_thread(describe, self.studio, story)

    def _candidates(self, story: str) -> list[list[str]]:
        found = self.studio.projects.find(story).read_candidates()
        return [[html.data_url(image) for image in version.images] for version in found]
