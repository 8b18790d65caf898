"""`python -m contextualstory_jax.generate`: stories in, images out; `--help` lists the rest."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from contextualstory_jax.commands.generate_arguments import override, parse, read_frameinit
from contextualstory_jax.commands.generate_plan import Plan, read_plan, with_settings
from contextualstory_jax.sampling.export_formats import check_formats, contact_sheet
from contextualstory_jax.sampling.output import read_latents, write_latents
from contextualstory_jax.sampling.prompts import OVERLAP, Story
from contextualstory_jax.sampling.saved_story import SavedStory, versions
from contextualstory_jax.utils.atomic import atomic_path, check_writable, write_json
from contextualstory_jax.utils.cli import run
from contextualstory_jax.utils.interruption import check

if TYPE_CHECKING:
    from contextualstory_jax.sampling.pipeline import StoryPipeline
    from contextualstory_jax.sampling.sample import Generated

PRINTED_STORIES = 8  # whose paths are printed


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m contextualstory_jax.generate"
) -> None:
    """Run the command. Raises `UserError` for bad input, before anything is written."""
    arguments = parse(argv, prog)
    if arguments.about:
        print_about(arguments.checkpoint)
        return
    check_formats(arguments.format)
    saved = SavedStory.read(arguments.source) if arguments.source else None
    plan = read_plan(arguments, saved)
    if saved is not None:
        arguments = with_settings(arguments, saved)
    read_frameinit(arguments)
    initial_latents = arguments.initial_latents and read_latents(arguments.initial_latents)
    check_writable(arguments.out or arguments.source)
    if arguments.save_latents:
        check_writable(arguments.save_latents.parent)
    generate(arguments, plan, initial_latents)
    print_paths(plan.folders)


def generate(arguments: argparse.Namespace, plan: Plan, initial_latents: np.ndarray | None) -> None:
    """Generate the stories and write them."""
    # JAX takes seconds to import, and neither --help nor a mistake need wait for it.
    from contextualstory_jax.sampling.arguments import check_integer, check_stories, read_size
    from contextualstory_jax.sampling.pipeline import StoryPipeline
    from contextualstory_jax.sampling.pretrained import find_checkpoint

    checkpoint = find_checkpoint(arguments.checkpoint)
    dtype = arguments.dtype or "float32"
    pipeline = StoryPipeline.load(checkpoint, weights=arguments.weights, dtype=dtype)
    config = pipeline.model.config
    size = read_size(config, arguments.height, arguments.width)
    fitted = None if arguments.camera_motion else size
    stories = with_frames(plan.stories, fitted)
    check_stories(stories, config.unet, fitted)
    source = describe_checkpoint(pipeline, checkpoint)
    overlap = OVERLAP if arguments.window_overlap is None else arguments.window_overlap
    check_integer("--window-overlap", overlap, 1, config.unet.n_frames - 1)
    warn(pipeline, checkpoint, plan, source, overlap)
    if initial_latents is not None and plan.copies > 1:
        initial_latents = np.concatenate([np.atleast_1d(initial_latents)] * plan.copies)
    negative_prompt = arguments.negative_prompt
    if isinstance(negative_prompt, list) and len(negative_prompt) == 1:
        (negative_prompt,) = negative_prompt
    sampling = override(config.sampling, arguments)
    options = {
        "negative_prompt": negative_prompt,
        "storyflow": arguments.storyflow,
        "frameinit": read_frameinit(arguments),
        "camera_motion": arguments.camera_motion,
        "window_overlap": overlap,
    }
    batches = pipeline.draw_batches(
        stories,
        kept=plan.kept(size, plan.saved is not None and plan.saved.checkpoint == source),
        seed=plan.seeds if len(set(plan.seeds)) > 1 else plan.seeds[0],
        shared_noise_seed=plan.shared_noise_seed,
        sampling=sampling,
        size=size,
        batch_size=max(arguments.batch_size, plan.copies),
        initial_latents=initial_latents,
        **options,
    )
    if arguments.storyflow is None:
        options["storyflow"] = pipeline.storyflow.tolist()
    if options["frameinit"] is not None:
        options["frameinit"] = dataclasses.asdict(options["frameinit"])
    settings = dataclasses.asdict(sampling) | options
    settings |= {"height": size[0], "width": size[1], "dtype": dtype}
    settings["initial_latents"] = arguments.initial_latents and str(arguments.initial_latents)
    of_batch = batch_settings(pipeline, plan, arguments.batch_size)
    write_batches(batches, plan, stories, arguments, source, settings | of_batch)
    if arguments.out is not None:
        settings["weights"] = pipeline.weights
        path_and_step = {"path": str(checkpoint), "step": pipeline.step}
        write_summary(arguments.out, plan, path_and_step, settings)


def batch_settings(pipeline: StoryPipeline, plan: Plan, batch_size: int) -> dict[str, Any]:
    """Other settings that decide a story's bytes: kept frames, the batch's size, the device."""
    from contextualstory_jax.distributed.sharding import batch_ways
    from contextualstory_jax.sampling.sample import bucket

    return {
        "kept": [i for i, kept in enumerate(plan.keep) if kept],
        "shared_noise_seed": plan.shared_noise_seed,
        "batch_size": bucket(
            len(plan.stories), max(batch_size, plan.copies), batch_ways(pipeline.mesh)
        ),
        "device": device_kind(),
    }


def describe_checkpoint(pipeline: StoryPipeline, folder: Path) -> dict[str, Any]:
    """The checkpoint as `story.json` names it; the path of the model that ships is None."""
    from contextualstory_jax.sampling.pretrained import SHIPPED

    path = None if folder == SHIPPED else str(folder.absolute())
    return {"path": path, "step": pipeline.step, "weights": pipeline.weights}


def with_frames(texts: Sequence[Story], size: tuple[int, int] | None) -> list[Story]:
    """Read first frames, cropped and scaled to a size if there is one."""
    from contextualstory_jax.sampling.arguments import read_first_frame

    return [
        text._replace(first_frame=read_first_frame("first frame", text.first_frame, size))
        if text.first_frame is not None
        else text
        for text in texts
    ]


def write_batches(
    batches: Iterable[Generated],
    plan: Plan,
    stories: Sequence[Story],
    arguments: argparse.Namespace,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Write each batch of stories before the next is generated, and then what is of all stories.

    Args:
        batches: in the order of `stories`.
        plan: folders and seeds.
        stories: with first frames.
        arguments: the command's.
        source: the checkpoint.
        settings: all else that decides the images, seeds aside.
    """
    waiting = iter(zip(plan.folders, stories, plan.seeds, strict=False))
    all_latents, all_images = [], []
    with tqdm(
        total=len(plan.folders),
        unit="story",
        delay=0.5,  # seconds, in which bad input is refused: an error stands alone
        disable=len(stories) <= settings["batch_size"],
    ) as bar:
        for batch in batches:
            for images, latents, (folder, story, seed) in zip(*batch, waiting, strict=False):
                seeds, own = plan.frame_seeds(seed), {**settings, "seed": seed}
                saved = SavedStory(story, images, latents, seeds, source, own)
                saved.write(folder, not arguments.no_captions, arguments.format)
                bar.update()
            if arguments.save_latents:
                all_latents.append(batch.latents)
            if arguments.candidates is not None:
                all_images.append(batch.images)
            check()
    if arguments.save_latents:
        write_latents(arguments.save_latents, np.concatenate(all_latents)[: len(plan.folders)])
    if arguments.candidates is not None:
        labels = [f"candidate {i}, seed {seed}" for i, seed in enumerate(plan.seeds)]
        with atomic_path(arguments.out / "candidates.png") as temporary:
            temporary.write_bytes(contact_sheet(np.concatenate(all_images), labels))


def write_summary(
    out: Path, plan: Plan, checkpoint: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Write `stories.json`: the stories, and all that decides their images."""
    stories = zip(plan.stories, plan.folders, strict=False)
    values = {
        "checkpoint": checkpoint,
        "versions": versions(),
        "seed": plan.seeds[0],
        "settings": settings,
        "stories": [describe(story, folder) for story, folder in stories],
    }
    write_json(out / "stories.json", values)


def describe(story: Story, folder: Path) -> dict[str, Any]:
    """A story's entry in `stories.json`."""
    first_frame = story.first_frame
    if isinstance(first_frame, np.ndarray):  # of a saved story
        first_frame = folder / "first_frame.png"
    return {
        "id": story.id,
        "folder": folder.name,
        "sentences": story.sentences,
        "context": {str(i): words for i, words in story.context.items()},
        "first_frame": None if first_frame is None else str(first_frame),
    }


def print_paths(folders: Sequence[Path]) -> None:
    """Print where the first stories are, and how many there are."""
    for folder in folders[:PRINTED_STORIES]:
        print(f"{folder / 'grid.png'}  {folder / 'story.gif'}")
    count = f"{len(folders)} {'story' if len(folders) == 1 else 'stories'}"
    print(f"{count} in {folders[0].parent}")


def warn(
    pipeline: StoryPipeline, checkpoint: Path, plan: Plan, source: Mapping[str, Any], overlap: int
) -> None:
    """Print warnings of words and sentences that the model cannot use, and of other versions."""
    from contextualstory_jax.sampling.windows import unclear_starts

    texts = list({story.id: story for story in plan.stories}.values())
    warn_of_unknown_words(checkpoint, texts)
    notes = [pipeline.tokenizer.truncation_note(s for text in texts for s in text.sentences)]
    length = pipeline.model.config.unet.n_frames
    for text in texts:
        notes += [
            f"story {text.id!r}: sentence {i} begins a window, which does not know whom "
            f"{text.sentences[i].split()[0]!r} means; say it with --context-at {i} '...'"
            for i in unclear_starts(text, length, overlap)
        ]
    if plan.saved is not None and any(plan.keep) and plan.saved.checkpoint != source:
        notes.append("the kept frames are of another model, and are encoded by this one")
    if plan.saved is not None and plan.repeated:
        notes.append(changed(plan.saved))
    for note in filter(None, notes):
        print("warning:", note, file=sys.stderr)


def device_kind() -> str:
    """The device that images are generated on."""
    import jax

    return jax.local_devices()[0].device_kind


def changed(saved: SavedStory) -> str:
    """A note where a saved story was made with other versions or on another device."""
    now = versions() | {"device": device_kind()}
    then = dict(saved.versions) | {"device": saved.settings.get("device")}
    others = [f"{name} {then.get(name)}" for name in now if then.get(name) != now[name]]
    return f"the story was made with {', '.join(others)}; bytes may differ" if others else ""


def print_about(checkpoint: str | None) -> None:
    """Print the sentences that a model, by default the one that ships, understands.

    Raises `UserError` where there is none.
    """
    from contextualstory_jax.checkpoints.layout import read_model
    from contextualstory_jax.data.vocabulary import read_vocabulary
    from contextualstory_jax.sampling.model_summary import about
    from contextualstory_jax.sampling.pretrained import find_checkpoint

    folder = find_checkpoint(checkpoint)
    print(about(read_model(folder), read_vocabulary(folder)))


def warn_of_unknown_words(checkpoint: Path, texts: Sequence[Story]) -> None:
    """Print a warning for each word that the checkpoint's training stories do not contain."""
    from contextualstory_jax.data.vocabulary import read_vocabulary, warnings

    vocabulary = read_vocabulary(checkpoint)
    sentences = [sentence for text in texts for sentence in text.sentences]
    for line in warnings(sentences, vocabulary) if vocabulary else ():
        print("warning:", line, file=sys.stderr)


if __name__ == "__main__":
    run(main)
