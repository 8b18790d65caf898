"""The page, and the endpoints of the same actions; Gradio serves both."""

import asyncio
import base64
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from contextualstory_jax.sampling.saved_story import SavedStory
from contextualstory_jax.studio import html
from contextualstory_jax.studio.endpoints import POLL_SECONDS, Endpoints, client_of
from contextualstory_jax.studio.forms import Draft, locked_frames, notes, unclear
from contextualstory_jax.studio.frames import MOVES, next_seed
from contextualstory_jax.studio.inputs import Settings
from contextualstory_jax.studio.studio import EXPORTS, Studio
from contextualstory_jax.studio.worker import Job, Model
from contextualstory_jax.utils.errors import UserError

CANDIDATES = 4  # of a frame, on the page
Update = dict[Any, Any]  # components and their new values

# The address names the story, and the browser remembers those that it has seen. It also keeps the
# sentences of a story that has no address yet.
REMEMBER = """link => {
  if (!link) return;
  const url = new URL(location.href);
  url.searchParams.set('story', link);
  history.replaceState(null, '', url);
  localStorage.removeItem('sentences');
  const known = JSON.parse(localStorage.getItem('stories') || '[]').filter(x => x !== link);
  localStorage.setItem('stories', JSON.stringify([link, ...known].slice(0, 50)));
}"""
WRITE = """text => {
  if (!new URLSearchParams(location.search).get('story')) localStorage.setItem('sentences', text);
}"""
READ = """text => text || new URLSearchParams(location.search).get('story')
  ? text : localStorage.getItem('sentences') || ''"""
RECALL = """() => [new URLSearchParams(location.search).get('story') || '',
  JSON.parse(localStorage.getItem('stories') || '[]')]"""


class Values(NamedTuple):
    """The form's values, as events receive them."""

    link: str
    text: str
    seed: Any
    steps: Any
    guidance: Any
    draft: list[Any]
    model: str
    near: bool
    image: str | None

    @property
    def sentences(self) -> list[str]:
        """The lines of the text that are not blank."""
        return sentences_of(self.text)


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
        continues = self.first.config.unet.is_continuation
        gr.HTML("<h1>Studio</h1>")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                self.text = gr.Textbox(
                    label="Sentences, one a line", lines=6, max_lines=24, elem_id="sentences"
                )
                self.notes = self._html("notes")
                self.context = self._html("context", html.JS)
                self.image = gr.Image(label="First frame", type="filepath", visible=continues)
                with gr.Row():
                    self.seed = gr.Number(0, label="Seed", precision=0, min_width=90)
                    self.steps = gr.Number(sampling.steps, label="Steps", precision=0, min_width=90)
                    self.guidance = gr.Number(
                        sampling.guidance_scale, label="Guidance", min_width=90
                    )
                with gr.Accordion("StoryFlow: how much changes between frames", open=False):
                    self.flow = self._html("flow", html.JS)
                self.draft = gr.State([*Draft()])  # of the sentences as they were last
                self.model = gr.Dropdown(names, value=names[0], label="Model")
                with gr.Accordion("Which sentences the model knows", open=False):
                    about = f"<pre>{html.escape(self.first.about)}</pre>"
                    self.about = gr.HTML(about, elem_id="about")
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
        form = [self.link, self.text, self.seed, self.steps, self.guidance, self.draft]
        form += [self.model, self.near, self.image]
        every = [self.status, self.strip, self.candidates, self.undo, self.redo, self.notes]
        every += [*form[:7], self.context, self.flow, self.about, self.image, self.mine]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.generate.click(self.on_generate, form, every, **hidden)
        for component in (self.strip, self.candidates):
            # Also while another action's answer is on its way, which is dropped otherwise.
            component.click(self.on_action, form, every, trigger_mode="multiple", **hidden)
        self.undo.click(self.on_undo, form, every, **hidden)
        self.redo.click(self.on_redo, form, every, **hidden)
        self.cancel.click(self.on_cancel, self.link, None, queue=False, **hidden)
        self.export.click(self.on_export, [self.link, self.format], self.files, api_name="export")
        self.text.change(None, self.text, None, js=WRITE, **hidden)
        self.text.blur(self.on_text, form, every, **hidden)
        self.model.input(self.on_model, form, every, **hidden)
        for component, action in ((self.flow, self.on_flow), (self.context, self.on_context)):
            component.click(action, form, every, trigger_mode="multiple", **hidden)
        self.link.change(None, self.link, None, js=REMEMBER, **hidden)
        self.blocks.load(None, self.text, self.text, js=READ, **hidden)
        self.blocks.load(self.on_load, [self.link, self.links], every, js=RECALL, **hidden)

    async def on_generate(self, request: gr.Request, *values: Any) -> AsyncIterator[Update]:
        """The button Generate."""
        form = Values(*values)

        def start() -> tuple[str, Job]:
            images = {}
            if form.image and self.studio.model(form.model).config.unet.is_continuation:
                images = {0: base64.b64encode(Path(form.image).read_bytes()).decode()}
            return self.studio.generate(
                form.link,
                form.sentences,
                self._settings(form),
                images=images,
                context=self._draft(form).context,
                model=form.model,
                client=client_of(request),
            )

        async for update in self._run(form.link, start):
            yield update

    async def on_action(
        self, event: gr.EventData, request: gr.Request, *values: Any
    ) -> AsyncIterator[Update]:
        """A button or an input of a frame."""
        form, action = Values(*values), str(event._data.get("action"))
        frame, data = event._data.get("frame"), event._data.get("data")
        studio, link = self.studio, form.link

        def start() -> tuple[str, Job | None]:
            if action == "replace":
                studio.replace(link, frame, data)
            elif action == "choose":
                studio.choose(link, frame)
            elif action in MOVES:
                studio.move(link, frame, action)
            else:
                settings = self._settings(form)
                seed = next_seed(studio.projects.find(link).read(), frame, settings.seed)
                options = {"sentences": form.sentences, "context": self._draft(form).context}
                options |= {"settings": settings._replace(seed=seed), "client": client_of(request)}
                if action == "candidates":
                    return link, studio.candidates(link, [frame], CANDIDATES, **options)
                return link, studio.regenerate(link, [frame], near=bool(form.near), **options)
            return link, None

        if action == "lock":  # which shows itself
            yield {self.status: await asyncio.to_thread(self._lock, link, frame, bool(data))}
            return
        async for update in self._run(link, start, written=action in MOVES):
            yield update

    def _lock(self, link: str, frame: Any, locked: bool) -> str:
        """The status after a frame was locked."""
        try:
            self.studio.lock(link, frame, locked)
        except UserError as error:
            return html.error(str(error))
        return ""

    async def on_undo(self, *values: Any) -> AsyncIterator[Update]:
        """The button Undo."""
        async for update in self._step(Values(*values).link, -1):
            yield update

    async def on_redo(self, *values: Any) -> AsyncIterator[Update]:
        """The button Redo."""
        async for update in self._step(Values(*values).link, 1):
            yield update

    def _step(self, link: str, by: int) -> AsyncIterator[Update]:
        def start() -> tuple[str, None]:
            self.studio.step(link, by)
            return link, None

        return self._run(link, start, written=True)

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

    async def on_text(self, *values: Any) -> Update:
        """After the sentences were edited: what belongs to them, and warnings."""
        form = Values(*values)
        return await self._drafted(form, self._draft(form))

    async def on_flow(self, event: gr.EventData, *values: Any) -> Update:
        """A slider that was moved."""
        form = Values(*values)
        flow = [float(value) for value in event._data["data"]]
        return await self._drafted(form, self._draft(form)._replace(storyflow=flow), "flow")

    async def on_context(self, event: gr.EventData, *values: Any) -> Update:
        """Words that the model is to read where a window begins."""
        form = Values(*values)
        words = {str(frame): text.strip() for frame, text in event._data["data"] if text.strip()}
        return await self._drafted(form, self._draft(form)._replace(context=words), "context")

    async def on_model(self, *values: Any) -> Update:
        """Another model: what it knows, and its own settings."""
        form = Values(*values)
        model = self.studio.model(form.model)
        sampling, draft = model.config.sampling, self._draft(form)
        draft = draft._replace(storyflow=None)  # another's mean
        own = {self.steps: sampling.steps, self.guidance: sampling.guidance_scale}
        return own | self._of_model(model) | await self._drafted(form, draft, "model")

    async def on_load(self, link: str, links: Any) -> AsyncIterator[Update]:
        """A page that is opened: the story of its address, and what is still being generated."""
        known = links if isinstance(links, list) else []
        yield {self.mine: html.stories(self.studio.titles(map(str, known)))}
        if not link:
            return
        try:
            yield await asyncio.to_thread(self._view, link, "", True)
        except UserError as error:
            yield {self.link: "", self.status: html.error(str(error))}
            return
        job = self.studio.running(link)
        if job is not None:
            async for update in self._run(link, lambda: (link, job)):
                yield update

    async def _run(
        self, link: str, start: Callable[[], tuple[str, Job | None]], written: bool = False
    ) -> AsyncIterator[Update]:
        """Start a change, show its progress, and what came of it.

        Args:
            link: of the story.
            start: makes the change, or a job that does.
            written: whether the change is one of the sentences too.
        """
        try:
            link, job = await asyncio.to_thread(start)
            if job is not None:
                # The address and the seed first: the page may be closed meanwhile.
                yield {self.link: link, self.seed: job.seeds[0]}
                while not job.done.is_set():
                    position = self.studio.worker.position(job)
                    yield {self.status: html.progress(job, position)}
                    await asyncio.sleep(POLL_SECONDS)
                if job.error:
                    raise UserError(job.error)
            yield await asyncio.to_thread(self._view, link, "", written)
        except UserError as error:
            yield {self.status: html.error(str(error))}

    def _draft(self, form: Values) -> Draft:
        """Sentences with the context and StoryFlow values that belong to them as they are now."""
        mean = self.studio.model(form.model).storyflow
        return Draft(*form.draft).with_sentences(form.sentences, mean)

    def _settings(self, form: Values) -> Settings:
        flow, seed = self._draft(form).storyflow, form.seed
        return Settings(0 if seed is None else seed, form.steps, form.guidance, flow)

    async def _drafted(self, form: Values, draft: Draft, of: str = "text") -> Update:
        """Keep a draft and show it, but for the inputs that it comes `of`."""
        model = self.studio.model(form.model)
        try:
            saved = await asyncio.to_thread(self.studio.save_draft, form.link, draft)
        except UserError as error:
            return {self.status: html.error(str(error))}
        shown = await asyncio.to_thread(self._shown, draft, model, saved)
        # An input that is written again loses the keyboard's focus.
        same = draft == Draft(*form.draft) and of != "model"
        for component, name in ((self.flow, "flow"), (self.context, "context")):
            if same or name == of:
                shown.pop(component)
        return shown

    def _shown(self, draft: Draft, model: Model, saved: SavedStory | None = None) -> Update:
        """The inputs that belong to the sentences, and warnings."""
        sentences, mean = draft.sentences, model.storyflow
        flow = draft.storyflow
        if flow is None:
            flow = [mean[min(i, len(mean) - 1)] for i in range(len(sentences) - 1)] if mean else []
        starts = unclear(sentences, model)
        return {
            self.draft: [*draft],
            self.notes: html.notes(notes(draft, model, saved)),
            self.flow: html.flow(flow, 2 * max([*mean, *(f / 2 for f in flow)], default=0)),
            self.context: html.context(sentences, starts, draft.context),
        }

    def _of_model(self, model: Model) -> Update:
        continues = model.config.unet.is_continuation
        about = f"<pre>{html.escape(model.about)}</pre>"
        return {self.about: about, self.image: gr.Image(visible=continues)}

    def _view(self, link: str, status: str, written: bool) -> Update:
        """Everything that shows a story; where it was `written`, the form too."""
        project = self.studio.projects.find(link)
        saved = project.read()
        view: Update = {
            self.link: project.link,
            self.status: status,
            self.strip: html.strip(saved, locked_frames(project)),
            self.candidates: html.candidates(project.read_candidates()),
            self.undo: gr.Button(interactive=project.can_step(-1)),
            self.redo: gr.Button(interactive=project.can_step(1)),
        }
        form, model = self.studio.form(project), self.studio.model_of(project, saved)
        if not written:
            return view | {self.notes: html.notes(notes(form.draft, model, saved))}
        view |= {self.text: "\n".join(form.draft.sentences), self.seed: form.seed}
        own = {self.steps: form.steps, self.guidance: form.guidance}
        view |= {component: value for component, value in own.items() if value is not None}
        view |= {self.model: model.name} | self._of_model(model)
        return view | self._shown(form.draft, model, saved)
