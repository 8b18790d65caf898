"""The page, and the endpoints of the same actions; Gradio serves both."""

import asyncio
import base64
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr

from contextualstory_jax.studio import html
from contextualstory_jax.studio.endpoints import POLL_SECONDS, Endpoints, client_of
from contextualstory_jax.studio.inputs import Settings
from contextualstory_jax.studio.studio import EXPORTS, Studio
from contextualstory_jax.studio.worker import Job
from contextualstory_jax.utils.errors import UserError

CANDIDATES = 4  # of a frame, on the page

# The address names the story, and the browser remembers those that it has seen.
REMEMBER = """link => {
  if (!link) return;
  const url = new URL(location.href);
  url.searchParams.set('story', link);
  history.replaceState(null, '', url);
  const known = JSON.parse(localStorage.getItem('stories') || '[]').filter(x => x !== link);
  localStorage.setItem('stories', JSON.stringify([link, ...known].slice(0, 50)));
}"""
RECALL = """() => [new URLSearchParams(location.search).get('story') || '',
  JSON.parse(localStorage.getItem('stories') || '[]')]"""


def sentences_of(text: str) -> list[str]:
    """The lines of a text that are not blank."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


class Page:
    """The components, and what their events do."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.first = next(iter(studio.models.values()))
        self.blocks = gr.Blocks(
            title="ContextualStory studio", analytics_enabled=False, delete_cache=(3600, 3600)
        )
        with self.blocks:
            self._lay_out()
            self._connect()
            Endpoints(studio).add()
        self.blocks.queue(default_concurrency_limit=None)

    def _lay_out(self) -> None:
        sampling, names = self.first.config.sampling, list(self.studio.models)
        continues = any(m.config.unet.is_continuation for m in self.studio.models.values())
        gr.HTML("<h1>Studio</h1>")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                self.text = gr.Textbox(
                    label="Sentences, one a line", lines=6, max_lines=24, elem_id="sentences"
                )
                self.notes = self._html("notes")
                self.image = gr.Image(label="First frame", type="filepath", visible=continues)
                with gr.Row():
                    self.seed = gr.Number(0, label="Seed", precision=0, min_width=90)
                    self.steps = gr.Number(sampling.steps, label="Steps", precision=0, min_width=90)
                    self.guidance = gr.Number(
                        sampling.guidance_scale, label="Guidance", min_width=90
                    )
                with gr.Accordion("StoryFlow: how much changes between frames", open=False):
                    self.flow = self._html("flow", html.JS)
                    self.flow_values = gr.State(None)
                self.model = gr.Dropdown(names, value=names[0], label="Model")
                with gr.Accordion("Which sentences the model knows", open=False):
                    self.about = gr.HTML(f"<pre>{html.escape(self.first.about)}</pre>")
                with gr.Row():
                    self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    self.cancel = gr.Button("Cancel", elem_id="cancel")
            with gr.Column(scale=3, min_width=300):
                self.status = self._html("status")
                self.strip = self._html("strip", html.JS, html.strip(None, ()))
                self.candidates = self._html("candidates", html.JS)
                with gr.Row():
                    self.undo = gr.Button("Undo", interactive=False, elem_id="undo", min_width=80)
                    self.redo = gr.Button("Redo", interactive=False, elem_id="redo", min_width=80)
                    self.near = gr.Checkbox(
                        False, label="Regenerate near the old frame", min_width=120
                    )
                with gr.Row():
                    self.format = gr.Dropdown(
                        list(EXPORTS), value="strip", label="Format", min_width=120
                    )
                    self.export = gr.Button("Export", elem_id="export", min_width=80)
                self.files = gr.File(label="Exported files", file_count="multiple", visible=False)
                self.link = gr.Textbox(
                    label="Link of this story: keep it, there is no other way to it",
                    interactive=False,
                    elem_id="link",
                )
                with gr.Accordion("My stories", open=False):
                    gr.HTML('<p><a href="?">New story</a></p>', elem_classes="story")
                    self.mine = self._html("mine")
                    self.links = gr.JSON([], visible=False)

    def _html(self, name: str, js: str | None = None, value: str = "") -> gr.HTML:
        return gr.HTML(value, elem_id=name, elem_classes="story", js_on_load=js)

    def _connect(self) -> None:
        form = [self.link, self.text, self.seed, self.steps, self.guidance, self.flow_values]
        form += [self.model, self.near, self.image]
        view = [self.link, self.status, self.strip, self.candidates, self.undo, self.redo]
        view += [self.seed, self.notes]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.generate.click(self.on_generate, form, view, **hidden)
        for component in (self.strip, self.candidates):
            # Also while another action's answer is on its way, which is dropped otherwise.
            component.click(self.on_action, form, view, trigger_mode="multiple", **hidden)
        self.undo.click(self.on_undo, form, [*view, self.text], **hidden)
        self.redo.click(self.on_redo, form, [*view, self.text], **hidden)
        self.cancel.click(self.on_cancel, self.link, None, queue=False, **hidden)
        self.export.click(self.on_export, [self.link, self.format], self.files, api_name="export")
        flow = [self.flow, self.flow_values, self.notes]
        self.text.blur(self.on_text, [self.text, self.model, self.flow_values], flow, **hidden)
        self.model.change(
            self.on_model, self.model, [self.about, self.steps, self.guidance], **hidden
        )
        self.flow.click(
            self.on_flow, None, self.flow_values, queue=False, trigger_mode="multiple", **hidden
        )
        self.link.change(None, self.link, None, js=REMEMBER, **hidden)
        opened = [*view, self.text, self.steps, self.guidance, self.mine, *flow[:2]]
        self.blocks.load(self.on_load, [self.link, self.links], opened, js=RECALL, **hidden)

    async def on_generate(self, request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        """The button Generate."""
        link, text, _, _, _, _, model, _, image = values

        def start() -> tuple[str, Job]:
            images = {0: base64.b64encode(Path(image).read_bytes()).decode()} if image else {}
            return self.studio.generate(
                link,
                sentences_of(text),
                self._settings(values),
                images=images,
                model=model,
                client=client_of(request),
            )

        async for update in self._run(link, start, values):
            yield update

    async def on_action(
        self, event: gr.EventData, request: gr.Request, *values: Any
    ) -> AsyncIterator[Any]:
        """A button or a checkbox of a frame."""
        link, client = values[0], client_of(request)
        action, frame = str(event._data.get("action")), int(event._data.get("frame") or 0)
        data, settings = event._data.get("data"), self._settings(values)

        def start() -> tuple[str, Job | None]:
            studio = self.studio
            if action == "lock":
                studio.lock(link, frame, bool(data))
            elif action == "replace":
                studio.replace(link, frame, data)
            elif action == "choose":
                studio.choose(link, frame)
            else:
                new = settings._replace(seed=studio.next_seed(link, frame, settings.seed))
                if action == "candidates":
                    return link, studio.candidates(link, [frame], CANDIDATES, new, client=client)
                sentences = sentences_of(values[1])
                near = bool(values[7])
                return link, studio.regenerate(
                    link, [frame], new, sentences=sentences, near=near, client=client
                )
            return link, None

        if action == "lock":  # which shows itself
            try:
                start()
                yield [gr.skip()] * 8
            except UserError as error:
                yield self._view(link, html.error(str(error)))
            return
        async for update in self._run(link, start, values):
            yield update

    async def on_undo(self, *values: Any) -> Any:
        """The button Undo."""
        return self._step(values[0], -1)

    async def on_redo(self, *values: Any) -> Any:
        """The button Redo."""
        return self._step(values[0], 1)

    def _step(self, link: str, by: int) -> list[Any]:
        try:
            self.studio.step(link, by)
        except UserError as error:
            return [*self._view(link, html.error(str(error))), gr.skip()]
        sentences = self.studio.projects.find(link).read_page().get("sentences", [])
        return [*self._view(link, ""), "\n".join(sentences)]

    async def on_cancel(self, link: str) -> None:
        """The button Cancel."""
        if link:
            self.studio.cancel(link)

    async def on_export(self, link: str, format: str) -> AsyncIterator[Any]:
        """The button Export, and the endpoint `export`."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                paths = await asyncio.to_thread(
                    self.studio.export, link, format, Path(folder) / "s"
                )
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from error
            yield gr.File([str(path) for path in paths], visible=True)

    async def on_text(self, text: str, model: str, flow: list[float] | None) -> list[Any]:
        """After the sentences were edited: a slider for each transition, and warnings."""
        sentences, chosen = sentences_of(text), self.studio.model(model)
        notes = html.notes(self.studio.notes(sentences, chosen))
        if flow is not None and len(flow) == max(len(sentences) - 1, 0):
            return [gr.skip(), gr.skip(), notes]
        return [self._flow(len(sentences), None), None, notes]

    async def on_flow(self, event: gr.EventData) -> list[float]:
        """A slider that was moved: the values of all."""
        return [float(value) for value in event._data["data"]]

    async def on_model(self, name: str) -> list[Any]:
        """Another model: what it knows, and its own settings."""
        model = self.studio.model(name)
        sampling = model.config.sampling
        about = f"<pre>{html.escape(model.about)}</pre>"
        return [about, sampling.steps, sampling.guidance_scale]

    async def on_load(self, link: str, links: list[str] | None) -> AsyncIterator[Any]:
        """A page that is opened: the story of its address, and what is still being generated."""
        known = links if isinstance(links, list) else []
        mine = html.stories(self.studio.titles(map(str, known)))
        nothing = [gr.skip()] * 3
        if not link:
            yield [*[gr.skip()] * 8, *nothing, mine, gr.skip(), gr.skip()]
            return
        try:
            project = self.studio.projects.find(link)
            saved, page = project.read(), project.read_page()
        except UserError as error:
            message = html.error(str(error))
            yield ["", message, *[gr.skip()] * 6, *nothing, mine, gr.skip(), gr.skip()]
            return
        sentences = page.get("sentences") or (list(saved.story.sentences) if saved else [])
        form = ["\n".join(sentences), page.get("steps"), page.get("guidance")]
        form[1:] = [gr.skip() if value is None else value for value in form[1:]]
        flow = page.get("storyflow")
        rest = [*form, mine, self._flow(len(sentences), flow), flow]
        view = self._view(link, "")
        view[6] = page.get("seed", 0)
        yield [*view, *rest]
        job = self.studio.running(link)
        if job is not None:
            async for status in self._watched(job):
                yield [gr.skip(), status, *[gr.skip()] * 12]
            yield [*self._view(link, html.error(job.error) if job.error else ""), *[gr.skip()] * 6]

    async def _run(
        self, link: str, start: Callable[[], tuple[str, Job | None]], values: tuple[Any, ...]
    ) -> AsyncIterator[Any]:
        """Start a change, show its progress, and what came of it."""
        try:
            link, job = await asyncio.to_thread(start)
            if job is not None:
                # The address and the locks first: the page may be closed meanwhile.
                yield [link, html.progress(job, 0), *[gr.skip()] * 4, job.seeds[0], gr.skip()]
                async for status in self._watched(job):
                    yield [gr.skip(), status, *[gr.skip()] * 6]
                if job.error:
                    raise UserError(job.error)
        except UserError as error:
            yield [gr.skip(), html.error(str(error)), *[gr.skip()] * 6]
            return
        yield self._view(link, "")

    async def _watched(self, job: Job) -> AsyncIterator[str]:
        while not job.done.is_set():
            yield html.progress(job, self.studio.worker.position(job))
            await asyncio.sleep(POLL_SECONDS)

    def _settings(self, values: tuple[Any, ...]) -> Settings:
        _, _, seed, steps, guidance, flow, *_ = values
        return Settings(0 if seed is None else seed, steps, guidance, flow)

    def _flow(self, count: int, values: list[float] | None) -> str:
        mean = self.first.storyflow
        shown = values or [mean[min(i, len(mean) - 1)] for i in range(count - 1)]
        return html.flow(shown, 2 * max(mean))

    def _view(self, link: str, status: str) -> list[Any]:
        """Everything that shows a story, in the order of the events' outputs."""
        project = self.studio.projects.find(link)
        saved, page = project.read(), project.read_page()
        sentences = [] if saved is None else saved.story.sentences
        model = self.studio.models.get(page.get("model", ""), self.first)
        return [
            project.link,
            status,
            html.strip(saved, page.get("locked", [])),
            html.candidates(project.read_candidates()),
            gr.Button(interactive=project.can_step(-1)),
            gr.Button(interactive=project.can_step(1)),
            gr.skip(),
            html.notes(self.studio.notes(sentences, model)),
        ]
