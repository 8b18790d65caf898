"""Everything that a user writes and chooses on the page, as it is kept beside a story's frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from contextualstory_jax.data.vocabulary import warnings
from contextualstory_jax.sampling.prompts import OVERLAP, Story
from contextualstory_jax.sampling.saved_story import SavedStory
from contextualstory_jax.sampling.windows import unclear_starts
from contextualstory_jax.studio.frames import is_of, moved_context, sources_of
from contextualstory_jax.studio.inputs import read_frame
from contextualstory_jax.studio.projects import Project
from contextualstory_jax.studio.worker import Model
from contextualstory_jax.utils.errors import brief, require


class Draft(NamedTuple):
    """Sentences with all that belongs to one of them; JSON as the page holds it."""

    sentences: list[str] = []
    storyflow: list[float] | None = None  # from each frame to the next; None: the model's mean
    context: dict[str, str] = {}  # by a sentence's number, its words where a window begins with it

    def with_sentences(self, sentences: list[str], mean: Sequence[float]) -> Draft:
        """The draft with other sentences; context and StoryFlow of those that stay, stay.

        Args:
            sentences: the new ones.
            mean: StoryFlow of sentences that are added, the model's; empty where it has none.
        """
        old, flow = self.sentences, self.storyflow
        words = {int(i): text for i, text in self.context.items()}
        moved = moved_context(words, old, sentences, sources_of(old, sentences))
        if flow is not None and mean:
            missing = range(len(flow), len(sentences) - 1)
            flow = flow[: max(len(sentences) - 1, 0)] + [
                mean[min(i, len(mean) - 1)] for i in missing
            ]
        return Draft(sentences, flow if flow and mean else None, as_json(moved))


class Form(NamedTuple):
    """The page's values of a story."""

    draft: Draft = Draft()
    seed: int = 0
    steps: Any = None
    guidance: Any = None


def form_of(project: Project, saved: SavedStory | None, frames: int) -> Form:
    """The values that the page had last; of a story that `generate` wrote, its own.

    Args:
        project: the story.
        saved: its frames, if any.
        frames: the model's, at once.
    """
    values: dict[str, Any] = {}
    if saved is not None:
        stored, count = saved.settings, len(saved.seeds)
        flow = stored.get("storyflow") or []
        # A short story's values are of its padding too, and those of each window are no frames'.
        fits = len(flow) == count - 1 or count <= len(flow) == frames - 1
        values = {
            "sentences": list(saved.story.sentences),
            "storyflow": flow[: count - 1] if fits and count > 1 else None,
            "context": as_json(saved.story.context),
            "seed": stored.get("seed", 0),
            "steps": stored.get("steps"),
            "guidance": stored.get("guidance_scale"),
        }
    values |= project.read_page()
    draft = Draft(**{name: values[name] for name in Draft._fields if name in values})
    names = [name for name in Form._fields if name in values]
    return Form(draft, **{name: values[name] for name in names})


def locked_frames(project: Project) -> list[int]:
    """Frames that stay when the story is generated again; at first those of one's own images."""
    page = project.read_page()
    saved = None if "locked" in page else project.read()
    own = [i for i, seed in enumerate(saved.seeds) if seed is None] if saved else []
    return page.get("locked", own)


def kept_frames(project: Project | None, sources: Sequence[int | None], keep: Any) -> set[int]:
    """Frames that stay, of those that were there.

    Args:
        project: the story; None for a new one.
        sources: the frame that each sentence had, if any.
        keep: a list of their numbers now; None for those that are locked.

    Raises:
        UserError: For what is no such list.
    """
    if keep is None:
        locked = [] if project is None else locked_frames(project)
        return {i for i, source in enumerate(sources) if source is not None and source in locked}
    require(isinstance(keep, list), f"keep must be a list of frames; got {brief(keep)}")
    numbers = {read_frame("keep", i, len(sources)) for i in keep}
    return {i for i in numbers if sources[i] is not None}


def as_json(context: Mapping[int, str]) -> dict[str, str]:
    """A story's context as JSON has it, whose keys are strings."""
    return {str(i): words for i, words in context.items()}


def notes(draft: Draft, model: Model, saved: SavedStory | None = None) -> list[str]:
    """Warnings of unknown words, of pronouns that nothing explains, and of another model."""
    lines = warnings(draft.sentences, model.vocabulary) if model.vocabulary else []
    for i in unclear(draft.sentences, model):
        if str(i) not in draft.context:
            word = draft.sentences[i].split()[0]
            lines.append(f"sentence {i + 1} begins a window: say below who {word!r} is")
    if saved is not None and not is_of(saved, model):
        lines.append("the frames are of another model; this one encodes those that are kept")
    return lines


def unclear(sentences: Sequence[str], model: Model) -> list[int]:
    """The sentences that begin a window with a pronoun."""
    if not sentences:
        return []
    return unclear_starts(Story(sentences), model.config.unet.n_frames, OVERLAP)
