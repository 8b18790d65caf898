"""`python -m contextualstory_jax.generate`: stories in, images out; `--help` lists the rest."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from contextualstory_jax import __version__
from contextualstory_jax.config.model_config import CameraMotion, FrameInitConfig, SamplingConfig
from contextualstory_jax.sampling.output import read_latents, write_latents, write_story
from contextualstory_jax.sampling.prompts import (
    Story,
    check_sentence,
    folder_name,
    read_jsonl,
    read_txt,
)
from contextualstory_jax.utils.atomic import check_writable, write_json
from contextualstory_jax.utils.cli import ArgumentParser, run
from contextualstory_jax.utils.errors import require
from contextualstory_jax.utils.interruption import check

if TYPE_CHECKING:
    from contextualstory_jax.sampling.sample import Generated

PRINTED_STORIES = 8  # whose paths are printed


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The command's arguments; those that default to the checkpoint's own values are None."""
    about = "--about" in (sys.argv[1:] if argv is None else argv)  # which needs no story
    parser = ArgumentParser(
        prog=prog,
        description="Generate stories: OUT/ID/frame_0.png and so on, grid.png and story.gif of "
        "each, and OUT/stories.json, which says how. The same command makes the same images.",
        epilog="Where no default is given it is the checkpoint's own.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR",
        help="a folder or a Hub id, converted once; default: the model that ships",
    )
    add("--about", action="store_true", help="print which sentences the model knows, and exit")
    add("--out", type=Path, metavar="DIR", required=not about, help="made where it is not there")
    stories = parser.add_mutually_exclusive_group(required=not about)
    stories.add_argument("--story", type=Path, metavar="FILE.txt", help="a sentence a line")
    stories.add_argument(
        "--stories",
        type=Path,
        metavar="FILE.jsonl",
        help='a story a line, {"id": "...", "sentences": ["...", ...]}, and "first_frame": "path", '
        "from the file's folder, for continuation; a folder is named by the id, "
        "with _ for all but letters, digits, '.', '_' and '-'",
    )
    stories.add_argument(
        "--sentence", action="extend", nargs="+", metavar="S", help="one for each picture"
    )
    add(
        "--first-frame",
        "--image",
        type=Path,
        metavar="IMAGE",
        help="to continue from, with --story or --sentence; cropped in the middle to the shape",
    )
    add("--seed", type=int, default=0, metavar="N", help="with the id it decides a story's noise")
    hints = typing.get_type_hints(SamplingConfig)
    add("--scheduler", choices=typing.get_args(hints["scheduler"]), help="solver of the denoising")
    add("--steps", "--num-inference-steps", type=int, metavar="N", help="denoising steps")
    add("--guidance-scale", type=float, metavar="G", help="how much text counts; up to 1: unguided")
    add(
        "--negative-prompt",
        nargs="+",
        metavar="S",
        help="text that guidance leads away from: one for all frames, or one each; default: empty",
    )
    add("--image-guidance-scale", type=float, metavar="G", help="the same for the first frame")
    add("--guidance-rescale", type=float, metavar="R", help="0 to 1, against overexposure")
    add("--eta", type=float, metavar="E", help="ddim's share of new noise in each step, 0 to 1")
    add("--height", type=int, metavar="H", help="pixels")
    add("--width", type=int, metavar="W", help="pixels")
    add(
        "--storyflow",
        type=_numbers,
        metavar="M1,M2,M3,M4",
        help="how much the scene changes from each frame to the next; default: as in training",
    )
    _add_frameinit(parser)
    add("--weights", choices=("ema", "raw"), help="averaged or last; default: ema where it is")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--batch-size", type=int, default=8, metavar="N", help="stories at once; default: 8")
    latents = "float32 (stories, frames, h, w, c)"
    add(
        "--initial-latents",
        "--latents",
        type=Path,
        metavar="FILE.npy",
        help=f"start from these; {latents}",
    )
    add("--no-captions", action="store_true", help="no sentences in grid.png and story.gif")
    add("--save-latents", type=Path, metavar="FILE.npy", help=f"write the final ones; {latents}")
    return parser.parse_args(argv)


def _add_frameinit(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "FrameInit, for continuation",
        "The initial noise takes low frequencies from the first frame, for steadier frames.",
    )
    default = FrameInitConfig()
    hints = typing.get_type_hints(FrameInitConfig)
    motions = typing.get_args(CameraMotion)
    add = group.add_argument
    add("--frameinit", choices=typing.get_args(hints["method"]), help="filter; default: none")
    for name, kind, letter, text in (
        ("level", int, "T", "timestep to whose noise level the first frame is brought"),
        ("spatial", float, "S", "stop frequency in height and width, 0 to 1"),
        ("temporal", float, "S", "the same over frames"),
        ("order", int, "N", "steepness of butterworth"),
    ):
        text = f"{text}; default: {getattr(default, name)}"
        add(f"--frameinit-{name}", type=kind, metavar=letter, help=text)
    add(
        "--camera-motion",
        choices=motions,
        help="over the complete first frame; default: it is held still",
    )


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m contextualstory_jax.generate"
) -> None:
    """Run the command. Raises `UserError` for bad input, before anything is written."""
    arguments = parse(argv, prog)
    if arguments.about:
        print_about(arguments.checkpoint)
        return
    texts = read_stories(arguments)
    frameinit = read_frameinit(arguments)
    initial_latents = arguments.initial_latents and read_latents(arguments.initial_latents)
    check_writable(arguments.out)
    if arguments.save_latents:
        check_writable(arguments.save_latents.parent)
    # JAX takes seconds to import, and neither --help nor a mistake need wait for it.
    from contextualstory_jax.sampling.arguments import check_stories, read_size
    from contextualstory_jax.sampling.pipeline import StoryPipeline
    from contextualstory_jax.sampling.pretrained import find_checkpoint

    checkpoint = find_checkpoint(arguments.checkpoint)
    pipeline = StoryPipeline.load(checkpoint, weights=arguments.weights, dtype=arguments.dtype)
    config = pipeline.model.config
    size = height, width = read_size(config, arguments.height, arguments.width)
    fitted = None if arguments.camera_motion else size
    stories = with_frames(texts, fitted)
    check_stories(stories, config.unet, fitted)
    warn_of_unknown_words(checkpoint, texts)
    if note := pipeline.tokenizer.truncation_note(s for text in texts for s in text.sentences):
        print(f"warning: {note}", file=sys.stderr)
    negative_prompt = arguments.negative_prompt
    if negative_prompt and len(negative_prompt) == 1:
        (negative_prompt,) = negative_prompt
    batches = pipeline.draw_batches(
        stories,
        seed=arguments.seed,
        sampling=override(config.sampling, arguments),
        size=size,
        negative_prompt=negative_prompt,
        storyflow=arguments.storyflow,
        batch_size=arguments.batch_size,
        initial_latents=initial_latents,
        frameinit=frameinit,
        camera_motion=arguments.camera_motion,
    )
    latents = write_batches(batches, texts, arguments)
    if arguments.save_latents:
        write_latents(arguments.save_latents, np.concatenate(latents))
    settings = {
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "storyflow": arguments.storyflow or pipeline.storyflow.tolist(),
        "frameinit": frameinit and dataclasses.asdict(frameinit),
        "weights": pipeline.weights,
    }
    settings = dataclasses.asdict(override(config.sampling, arguments)) | settings
    source = {"path": str(checkpoint), "step": pipeline.step}
    write_summary(arguments, texts, source, settings)
    print_paths(arguments.out, texts)


def print_paths(out: Path, texts: Sequence[Story]) -> None:
    """Print where the first stories are, and how many there are."""
    for text in texts[:PRINTED_STORIES]:
        folder = out / folder_name(text.id)
        print(f"{folder / 'grid.png'}  {folder / 'story.gif'}")
    print(f"{len(texts)} {'story' if len(texts) == 1 else 'stories'} in {out}")


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
    batches: Iterable[Generated], texts: Sequence[Story], arguments: argparse.Namespace
) -> list[np.ndarray]:
    """Write each batch of stories before the next is generated; returns the latents to save."""
    waiting, latents = iter(texts), []
    with tqdm(
        total=len(texts),
        unit="story",
        delay=0.5,  # seconds, in which bad input is refused: an error stands alone
        disable=len(texts) <= arguments.batch_size,
    ) as bar:
        for batch in batches:
            for images, text in zip(batch.images, waiting, strict=False):
                folder = arguments.out / folder_name(text.id)
                captions = not arguments.no_captions
                write_story(folder, images, text.sentences, arguments.seed, captions)
                bar.update()
            if arguments.save_latents:
                latents.append(batch.latents)
            check()
    return latents


def write_summary(
    arguments: argparse.Namespace,
    texts: Sequence[Story],
    checkpoint: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Write `stories.json`: the stories, and all that decides their images."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
    write_json(
        arguments.out / "stories.json",
        {
            "checkpoint": checkpoint,
            "versions": {"contextualstory_jax": __version__, **versions},
            "seed": arguments.seed,
            "settings": {
                **settings,
                "camera_motion": arguments.camera_motion,
                "dtype": arguments.dtype,
                "initial_latents": arguments.initial_latents and str(arguments.initial_latents),
            },
            "stories": [describe(text) for text in texts],
        },
    )


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


def read_stories(arguments: argparse.Namespace) -> list[Story]:
    """The stories to generate. Raises `UserError` for those that are not right."""
    if arguments.stories:
        require(
            arguments.first_frame is None,
            '--first-frame goes with --story or --sentence; in --stories a line has "first_frame"',
        )
        return read_jsonl(arguments.stories)
    if arguments.story:
        story = read_txt(arguments.story)
    else:
        story = Story(tuple(check_sentence(s, "--sentence") for s in arguments.sentence))
    return [story._replace(first_frame=arguments.first_frame)]


def read_frameinit(arguments: argparse.Namespace) -> FrameInitConfig | None:
    """FrameInit as the user wants it, None for none.

    Raises `UserError` for values out of range, and where its options stand alone.
    """
    names = [field.name for field in dataclasses.fields(FrameInitConfig) if field.name != "method"]
    given = {name: getattr(arguments, f"frameinit_{name}") for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.frameinit:
        return FrameInitConfig(arguments.frameinit, **given)
    alone = [f"--frameinit-{name}" for name in given]
    alone += ["--camera-motion"] if arguments.camera_motion else []
    require(not alone, f"{', '.join(alone)} without --frameinit; choose its filter too")
    return None


def override(sampling: SamplingConfig, arguments: argparse.Namespace) -> SamplingConfig:
    """The checkpoint's way of sampling, with what the user says."""
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    given = {name: getattr(arguments, name) for name in names}
    return dataclasses.replace(sampling, **{k: v for k, v in given.items() if v is not None})


def describe(story: Story) -> dict[str, Any]:
    """A story's entry in `stories.json`."""
    return {
        "id": story.id,
        "folder": folder_name(story.id),
        "sentences": story.sentences,
        "first_frame": None if story.first_frame is None else str(story.first_frame),
    }


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between") from None


if __name__ == "__main__":
    run(main)
