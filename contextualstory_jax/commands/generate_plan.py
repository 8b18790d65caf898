"""The stories that one `generate` command makes, and the frames of theirs that stay."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from contextualstory_jax.config.build import build
from contextualstory_jax.config.model_config import CameraMotion, FrameInitConfig, SamplingConfig
from contextualstory_jax.data.images import read_image
from contextualstory_jax.sampling.prompts import (
    Kept,
    Story,
    check_sentence,
    check_story,
    fit_image,
    folder_name,
    read_jsonl,
    read_txt,
)
from contextualstory_jax.sampling.saved_story import JSON, SavedStory
from contextualstory_jax.utils.errors import brief, require

MOST_COPIES = 1024  # of a story that fill a batch


@dataclasses.dataclass(frozen=True)
class StoredSettings:
    """Settings of a saved story beside `SamplingConfig` and `FrameInitConfig`."""

    negative_prompt: str | tuple[str, ...] | None = None
    height: int | None = None
    width: int | None = None
    storyflow: tuple[float, ...] | None = None
    camera_motion: CameraMotion | None = None
    window_overlap: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    path: str | None = None  # of the checkpoint
    weights: Literal["ema", "raw"] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Stories with their folders; where frames stay, all are versions of one story."""

    stories: list[Story]  # more than folders: those fill the batch
    folders: list[Path]
    seeds: list[int]
    keep: tuple[bool, ...]  # frames that stay
    own: Mapping[int, Image.Image]  # the user's own images, by frame
    saved: SavedStory | None
    shared_noise_seed: int | None
    repeated: bool  # the story's last generation, again

    @property
    def copies(self) -> int:
        """How often each story is generated."""
        return len(self.stories) // len(self.folders)

    def kept(self, size: tuple[int, int], same_model: bool) -> list[Kept] | None:
        """The frames that stay, for each story.

        Args:
            size: Height and width of all frames.
            same_model: Whether the saved latents are of this model; if not, images are encoded.
        """
        if not any(self.keep):
            return None
        latents = None
        if self.saved is None:
            images = np.zeros((len(self.keep), *size, 3), np.uint8)
        else:
            images = self.saved.images.copy()
            latents = self.saved.latents if same_model and not self.own else None
        for frame, image in self.own.items():
            images[frame] = fit_image(np.asarray(image), *size)
        return [Kept(images, latents, self.keep)] * len(self.stories)

    def frame_seeds(self, seed: int) -> tuple[int | None, ...]:
        """The seed of each frame of a story that is generated with `seed`."""
        seeds: list[int | None] = [seed] * len(self.stories[0].sentences)
        for frame, kept in enumerate(self.keep):
            if kept and self.saved is not None:
                seeds[frame] = self.saved.seeds[frame]
        return tuple(None if i in self.own else seed for i, seed in enumerate(seeds))


def read_plan(arguments: argparse.Namespace, saved: SavedStory | None) -> Plan:
    """Read the stories to generate. Raises `UserError` for arguments that are not right."""
    _check_combination(arguments, saved)
    stories = read_stories(arguments, saved)
    for story in stories:
        check_story(story)
    count = len(stories[0].sentences)
    require(
        arguments.save_latents is None or all(len(s.sentences) == count for s in stories),
        "--save-latents is for stories of one length; leave it out, each folder has its latents",
    )
    own = {_frame("--frame-at", i, count): read_image(Path(path)) for i, path in arguments.frame_at}
    require(
        0 not in own or stories[0].first_frame is None,
        "--frame-at 0: that frame is the first frame of a continuation; give it as --first-frame",
    )
    repeated = (
        saved is not None
        and not any(
            value not in (None, [], False)
            for value in (arguments.keep, arguments.sentence_at, arguments.frame_at)
            + (arguments.context_at, arguments.candidates, arguments.near)
        )
        and arguments.seed is None
    )
    latents = saved.settings.get("initial_latents") if saved is not None else None
    require(
        not repeated or latents is None or arguments.initial_latents is not None,
        f"{arguments.source} began from --initial-latents {brief(latents)}; give them, or a --seed",
    )
    keep = _keep(arguments, saved, count, repeated) | own.keys()
    if keep and stories[0].first_frame is not None and saved is not None:
        keep |= {0}
    require(len(keep) < count, f"all {count} frames are kept; leave one to generate out of --keep")
    kept = tuple(i in keep for i in range(count))
    _check_kept(arguments, saved, keep - own.keys())
    seed = _seed(arguments, saved)
    if arguments.candidates is not None:
        stories, seeds = stories * arguments.candidates, range(seed, seed + arguments.candidates)
    else:
        stories = stories * (_copies(saved) if repeated and saved is not None else 1)
        seeds = [seed] * len(stories)
    return Plan(
        stories,
        _folders(arguments, stories),
        list(seeds),
        kept if keep else (),
        own,
        saved,
        _shared_seed(arguments, saved, kept, repeated),
        repeated,
    )


def read_stories(arguments: argparse.Namespace, saved: SavedStory | None) -> list[Story]:
    """The stories to generate. Raises `UserError` for those that are not right."""
    if saved is not None:
        sentences = list(saved.story.sentences)
        for i, sentence in arguments.sentence_at:
            frame = _frame("--sentence-at", i, len(sentences))
            sentences[frame] = check_sentence(sentence, "--sentence-at")
        story = saved.story._replace(sentences=tuple(sentences))
        return [_with_context(story, arguments)]
    if arguments.stories:
        require(
            not arguments.context_at,
            '--context-at goes with --story or --sentence; in --stories a line has "context"',
        )
        require(
            arguments.first_frame is None,
            '--first-frame goes with --story or --sentence; in --stories a line has "first_frame"',
        )
        return read_jsonl(arguments.stories)
    if arguments.story:
        story = read_txt(arguments.story)
    else:
        story = Story(tuple(check_sentence(s, "--sentence") for s in arguments.sentence))
    return [_with_context(story._replace(first_frame=arguments.first_frame), arguments)]


def _with_context(story: Story, arguments: argparse.Namespace) -> Story:
    given = {
        _frame("--context-at", i, len(story.sentences)): check_sentence(words, "--context-at")
        for i, words in arguments.context_at
    }
    return story._replace(context={**story.context, **given})


def with_settings(arguments: argparse.Namespace, saved: SavedStory) -> argparse.Namespace:
    """Arguments in which those that are not given are those of a saved story."""
    values = {**saved.settings, **(saved.checkpoint if arguments.checkpoint is None else {})}
    names = [field.name for field in dataclasses.fields(StoredSettings)]
    known = {name: values[name] for name in names if name in values}
    stored = dataclasses.asdict(build(StoredSettings, known, f"{JSON}: "))
    stored["checkpoint"] = stored.pop("path")
    prompt = stored["negative_prompt"]
    stored["negative_prompt"] = [prompt] if isinstance(prompt, str) else prompt and list(prompt)
    stored["storyflow"] = stored["storyflow"] and list(stored["storyflow"])
    for field in dataclasses.fields(SamplingConfig):
        stored[field.name] = values.get(field.name)
    frameinit = values.get("frameinit")
    if isinstance(frameinit, Mapping):
        stored["frameinit"] = frameinit.get("method")
        for field in dataclasses.fields(FrameInitConfig)[1:]:
            stored[f"frameinit_{field.name}"] = frameinit.get(field.name)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return argparse.Namespace(**(vars(arguments) | stored | given))


def _check_combination(arguments: argparse.Namespace, saved: SavedStory | None) -> None:
    needs_saved = {
        "--keep": arguments.keep,
        "--sentence-at": arguments.sentence_at,
        "--near": arguments.near,
    }
    for option, value in needs_saved.items():
        require(saved is not None or not value, f"{option} without --from; name the story's folder")
    require(
        saved is None or arguments.first_frame is None,
        "--first-frame goes with --story or --sentence; a story of --from has its own",
    )
    candidates = arguments.candidates
    for option, value in (("--frame-at", arguments.frame_at), ("--candidates", candidates)):
        require(
            not arguments.stories or value in (None, []),
            f"{option} is for one story, and --stories names many; give it as --story",
        )
    if candidates is None:
        return
    require(candidates >= 1, f"--candidates must be at least 1; got {candidates}")
    require(arguments.out is not None, "--candidates needs --out, the folder to write them to")
    require(
        arguments.initial_latents is None,
        "--candidates differ in their noise; leave out --initial-latents",
    )


def _frame(option: str, number: Any, count: int) -> int:
    """The number of one of `count` frames. Raises `UserError` for anything else."""
    fits = str(number).isdecimal() and int(number) < count
    require(fits, f"{option}: no frame {brief(number)}; they are numbered from 0 to {count - 1}")
    return int(number)


def _keep(
    arguments: argparse.Namespace, saved: SavedStory | None, count: int, repeated: bool
) -> set[int]:
    """The frames of a saved story that stay."""
    if saved is None:
        return set()
    if arguments.keep is not None:
        return {_frame("--keep", i, count) for i in arguments.keep}
    if arguments.sentence_at:
        return set(range(count)) - {int(i) for i, _ in arguments.sentence_at}
    if repeated:
        kept = saved.settings.get("kept", [])
        require(isinstance(kept, list), f"{JSON}: settings.kept is {brief(kept)}, not a list")
        return {_frame(f"{JSON}: settings.kept", i, count) for i in kept}
    return {i for i, seed in enumerate(saved.seeds) if seed is None}


def _check_kept(
    arguments: argparse.Namespace, saved: SavedStory | None, frames: Collection[int]
) -> None:
    """Raise `UserError` where saved frames cannot be kept at the size asked for."""
    if saved is None or not frames:
        return
    height, width = saved.images.shape[1:3]
    require(
        arguments.height in (None, height) and arguments.width in (None, width),
        f"the frames of {arguments.source} have {height} x {width} pixels and can be kept at that "
        "size alone; leave out --height and --width",
    )


def _seed(arguments: argparse.Namespace, saved: SavedStory | None) -> int:
    if arguments.seed is not None or saved is None:
        return arguments.seed or 0
    seed = saved.settings.get("seed", 0)
    require(type(seed) is int, f"{JSON}: settings.seed is {brief(seed)}, not an integer")
    return seed


def _shared_seed(
    arguments: argparse.Namespace,
    saved: SavedStory | None,
    kept: tuple[bool, ...],
    repeated: bool,
) -> int | None:
    """The seed of the noise that frames share, where it is not that of the frames' own noise."""
    if saved is None or not (arguments.near or repeated):
        return None
    stored = saved.settings.get("shared_noise_seed")
    if repeated or stored is not None:
        return stored
    seeds = [seed for seed, stays in zip(saved.seeds, kept, strict=True) if not stays]
    require(
        seeds[0] is not None,
        "--near: an image of your own has no noise to stay near to; leave --near out",
    )
    return seeds[0]


def _copies(saved: SavedStory) -> int:
    """How often a story is to be in its batch, so that the batch has its former size."""
    size = saved.settings.get("batch_size", 1)
    require(
        type(size) is int and 1 <= size <= MOST_COPIES,
        f"{JSON}: settings.batch_size is {brief(size)}, not in 1..{MOST_COPIES}",
    )
    return size


def _folders(arguments: argparse.Namespace, stories: Sequence[Story]) -> list[Path]:
    if arguments.out is None:
        return [arguments.source]
    if arguments.candidates is not None:
        return [arguments.out / f"candidate_{i}" for i in range(arguments.candidates)]
    ids = dict.fromkeys(story.id for story in stories)
    return [arguments.out / folder_name(story_id) for story_id in ids]
