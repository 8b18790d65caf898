"""Parts of the page that hold stories; everything that a user wrote is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from contextualstory_jax.sampling.saved_story import SavedStory
from contextualstory_jax.studio.limits import MOST_BYTES
from contextualstory_jax.studio.worker import Job

LARGE = 384  # pixels; larger frames are sent as JPEG of at most that size
# Gradio reads HTML as a template of Handlebars and of JavaScript.
TEMPLATE = str.maketrans({c: f"&#{ord(c)};" for c in "${}`\\"})

CSS = """
.story ol { display: flex; flex-wrap: wrap; gap: 12px; list-style: none; margin: 0; padding: 0; }
.story li { width: 162px; max-width: 100%; }
.story figure { margin: 0; }
.story img { width: 162px; max-width: 100%; display: block; border-radius: 6px; }
.story img.small { image-rendering: pixelated; }
.story figcaption { font-size: 14px; line-height: 1.35; margin: 6px 0; overflow-wrap: anywhere; }
.story .actions { display: flex; flex-wrap: wrap; gap: 6px; font-size: 13px; align-items: center; }
.story .actions label { display: inline-flex; gap: 4px; align-items: center; }
.story .actions :is(button, .file) { font-weight: 500; line-height: 1.4;
  border: 1px solid #6b7280; border-radius: 4px; padding: 3px 8px;
  cursor: pointer; font-size: 13px; background: transparent; color: inherit; }
.story .file input { position: absolute; width: 1px; height: 1px; opacity: 0; }
.story :is(button, a, input, summary):focus-visible, .story .file:focus-within {
  outline: 3px solid #c2410c; outline-offset: 1px; }
.story .error { color: #b91c1c; font-weight: 600; }
.story progress { width: 100%; }
.story .preview { display: flex; flex-wrap: wrap; gap: 4px; }
.story .preview img { width: 72px; }
#about pre { white-space: pre-wrap; font-size: 13px; }
.story .context { font-size: 14px; }
.story .context label { display: block; margin: 6px 0; }
.story .context input { width: 100%; border: 1px solid #6b7280; border-radius: 4px;
  padding: 4px 8px; background: transparent; color: inherit; }
.story .flow label { display: flex; gap: 8px; align-items: center; font-size: 14px; }
.story .flow input { flex: 1; min-width: 80px; }
.story .flow span { min-width: 52px; }
.dark .story .error { color: #fca5a5; }
.dark .story a { color: #93c5fd; }
#generate { background: #c2410c; }
footer .show-api { color: #4b5563 !important; }
.dark footer .show-api { color: #d1d5db !important; }
"""

# Buttons and inputs send their action and frame, files as data URLs. Of a file that is too large
# a little too much is sent, so that the server says so.
JS = """
const most = MOST_BYTES;
const all = (kind, value) => [...element.querySelectorAll(`[type=${kind}]`)].map(value);
const send = (target, data) => trigger('click', {
  action: target.dataset.action, frame: Number(target.dataset.frame), data});
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-action]');
  if (button) { event.preventDefault(); send(button, null); }
});
element.addEventListener('change', event => {
  const target = event.target.closest('input[data-action]');
  if (!target) return;
  if (target.type === 'checkbox') return send(target, target.checked);
  if (target.type === 'range') return send(target, all('range', x => Number(x.value)));
  if (target.type === 'text') return send(target, all('text', x => [x.dataset.frame, x.value]));
  const file = target.files[0];
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => send(target, reader.result);
  reader.readAsDataURL(file.slice(0, most + 3));
});
""".replace("MOST_BYTES", str(MOST_BYTES))


def escape(text: str) -> str:
    """Text for HTML, also where that is a template."""
    return html.escape(text).translate(TEMPLATE)


def data_url(image: UInt8[np.ndarray, "h w 3"], exact: bool = True) -> str:
    """An image within a page.

    Args:
        image: Levels 0 to 255.
        exact: Whether all its pixels are wanted, or a large one reduced.
    """
    shown, file, kind = Image.fromarray(image), io.BytesIO(), "png"
    if not exact and max(shown.size) > LARGE:
        shown.thumbnail((LARGE, LARGE))
        kind = "jpeg"
    shown.save(file, kind, **({"quality": 90} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _img(image: UInt8[np.ndarray, "h w 3"], alt: str) -> str:
    small = ' class="small"' if max(image.shape[:2]) < LARGE / 2 else ""
    return f'<img src="{data_url(image, exact=False)}" alt="{escape(alt)}"{small}>'


def _button(action: str, frame: int, text: str, about: str) -> str:
    return (
        f'<button type="button" data-action="{action}" data-frame="{frame}" '
        f'aria-label="{about}">{text}</button>'
    )


def strip(saved: SavedStory | None, locked: Iterable[int]) -> str:
    """The frames of a story with captions and what can be done with each."""
    if saved is None:
        return "<p>Write a sentence for each frame, then generate.</p>"
    kept, sentences = set(locked), saved.story.sentences
    given = saved.story.first_frame is not None  # a continuation's, which stays the first
    items = [
        f"<li><figure>{_img(image, sentence)}<figcaption>{escape(sentence)}</figcaption>"
        f'</figure><div class="actions">{_actions(i, len(sentences), given, i in kept)}</div></li>'
        for i, (image, sentence) in enumerate(zip(saved.images, sentences, strict=True))
    ]
    return f"<ol>{''.join(items)}</ol>"


def _actions(i: int, count: int, given: bool, kept: bool) -> str:
    """Buttons and inputs of one of `count` frames; `given`: the first is a continuation's."""
    number, checked = f"frame {i + 1}", " checked" if kept else ""
    replace = (
        f'<label class="file">Replace<input type="file" accept="image/*" data-action="replace" '
        f'data-frame="{i}" aria-label="Replace {number} by an image of your own"></label>'
    )
    if given and i == 0:
        return replace
    parts = [
        f'<label><input type="checkbox" data-action="lock" data-frame="{i}"{checked} '
        f'aria-label="Lock {number}"> Lock</label>',
        _button("regenerate", i, "Regenerate", f"Regenerate {number}"),
        _button("candidates", i, "Candidates", f"Candidates for {number}"),
        replace,
    ]
    if i > given:
        parts.append(_button("earlier", i, "&larr;", f"Move {number} earlier"))
    if i < count - 1:
        parts.append(_button("later", i, "&rarr;", f"Move {number} later"))
    if count > 1:
        parts.append(_button("remove", i, "Remove", f"Remove {number}"))
    return "".join(parts)


def candidates(stories: Sequence[SavedStory]) -> str:
    """Versions of the frames that differ between them, to choose one."""
    if not stories:
        return ""
    images = np.stack([story.images for story in stories])
    changed = [i for i in range(images.shape[1]) if (images[:, i] != images[:1, i]).any()]
    items = []
    for number, story in enumerate(stories):
        sentences = story.story.sentences
        shown = "".join(_img(story.images[i], sentences[i]) for i in changed or [0])
        button = _button("choose", number, "Choose", f"Choose candidate {number + 1}")
        items.append(f"<li>{shown}<div class='actions'>{button}</div></li>")
    return f"<h3>Candidates</h3><ol>{''.join(items)}</ol>"


def progress(job: Job, position: int) -> str:
    """How far a job is, with a preview."""
    if position > 0:
        return f"<p>Waiting: number {position} in the queue.</p>"
    if job.step == 0:
        return "<p>Starting; a model is compiled when it is first used.</p><progress></progress>"
    step, steps = min(job.step, job.steps), job.steps
    text = f"step {step} of {steps}"
    shown = "" if job.preview is None else "".join(_img(image, "") for image in job.preview)
    return (
        f'<p>Generating, {text}</p><progress max="{steps}" value="{step}" aria-label="{text}">'
        f'</progress><div class="preview" aria-hidden="true">{shown}</div>'
    )


def error(message: str) -> str:
    """A message about what is not right."""
    return f'<p class="error" role="alert">{escape(message)}</p>'


def notes(lines: Iterable[str]) -> str:
    """Warnings, as a list."""
    items = "".join(f"<li style='width:auto'>Note: {escape(line)}</li>" for line in lines)
    return f"<ol>{items}</ol>" if items else ""


def context(sentences: Sequence[str], numbers: Iterable[int], words: Mapping[str, str]) -> str:
    """A line for each sentence that a window begins with, of what the model is to read there."""
    rows = []
    for i in sorted({*numbers, *map(int, words)} & {*range(len(sentences))}):
        rows.append(
            f"<label>For sentence {i + 1}, which begins a window, the model reads"
            f'<input type="text" data-action="context" data-frame="{i}" maxlength="1000" '
            f'placeholder="{escape(sentences[i])}" value="{escape(words.get(str(i), ""))}"></label>'
        )
    return f'<div class="context">{"".join(rows)}</div>' if rows else ""


def flow(values: Sequence[float], most: float) -> str:
    """A slider for each transition, from calm to cut.

    Args:
        values: of each transition.
        most: the value of a cut; 0 for a model without StoryFlow.
    """
    if most <= 0:
        return "<p>This model has no StoryFlow Adapter.</p>"
    rows = []
    for i, value in enumerate(values):
        name = f"{i + 1} to {i + 2}"
        rows.append(
            f'<label><span>{name}</span>calm<input type="range" min="0" max="{most:.3g}" '
            f'step="{most / 100:.3g}" value="{value:.3g}" data-action="flow" data-frame="{i}" '
            f'aria-label="Scene change from frame {name}">cut</label>'
        )
    return f'<div class="flow">{"".join(rows)}</div>'


def stories(rows: Iterable[tuple[str, str]]) -> str:
    """Links to stories, by their first sentences."""
    items = "".join(
        f'<li style="width:auto"><a href="?story={escape(link)}">{escape(text)}</a></li>'
        for link, text in rows
    )
    return f"<ol>{items}</ol>" if items else "<p>No stories yet.</p>"
