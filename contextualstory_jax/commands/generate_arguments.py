"""The command line of `generate`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from contextualstory_jax.config.build import build
from contextualstory_jax.config.model_config import CameraMotion, FrameInitConfig, SamplingConfig
from contextualstory_jax.sampling.export_formats import FORMATS
from contextualstory_jax.sampling.prompts import OVERLAP
from contextualstory_jax.utils.cli import ArgumentParser
from contextualstory_jax.utils.errors import require


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The command's arguments; those that default to the checkpoint's own values are None."""
    words = sys.argv[1:] if argv is None else argv
    about = "--about" in words  # which needs no story
    in_place = any(word.split("=")[0] == "--from" for word in words)
    parser = ArgumentParser(
        prog=prog,
        description="Generate stories: OUT/ID/frame_0.png and so on, grid.png, story.gif and "
        "story.json of each, and OUT/stories.json, which says how. The same command makes the same "
        "images.",
        epilog="Where no default is given it is the checkpoint's own or, with --from, the story's.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR",
        help="a folder or a Hub id, converted once; default: the model that ships",
    )
    add("--about", action="store_true", help="print which sentences the model knows, and exit")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        required=not (about or in_place),
        help="made where it is not there; default with --from: the story is replaced",
    )
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
        "--sentence", action="extend", nargs="+", metavar="S", help="one for each image, 1 to 100"
    )
    add(
        "--first-frame",
        "--image",
        type=Path,
        metavar="IMAGE",
        help="to continue from, with --story or --sentence; cropped in the middle to the shape",
    )
    stories.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="OUT/ID",
        help="a story that was generated before, to make again or to change",
    )
    _add_changes(parser)
    _add_windows(parser)
    add("--seed", type=int, metavar="N", help="with the id it decides a story's noise; default: 0")
    _add_sampling(parser)
    _add_frameinit(parser)
    _add_outputs(parser)
    return parser.parse_args(argv)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
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


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", choices=("ema", "raw"), help="averaged or last; default: ema where it is")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32")
    add("--batch-size", type=int, default=8, metavar="N", help="stories at once; default: 8")
    latents = "float32 (stories, frames, h, w, c)"
    add(
        "--initial-latents",
        "--latents",
        type=Path,
        metavar="FILE.npy",
        help=f"start from these; {latents}",
    )
    add("--no-captions", action="store_true", help="no sentences in grid.png, story.gif and so on")
    add(
        "--format",
        type=_formats,
        default=(),
        metavar="F1,F2",
        help=f"files to write beside the frames: {', '.join(FORMATS)}; strip (grid.png), gif and "
        "json are always written",
    )
    add("--save-latents", type=Path, metavar="FILE.npy", help=f"write the final ones; {latents}")


def _add_changes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "Frames that stay", "Frames are numbered from 0; those that stay keep their bytes."
    ).add_argument
    add(
        "--keep",
        type=_indices,
        metavar="I,J",
        help="with --from: frames to keep; default: if sentences change, the frames of all others",
    )
    add(
        "--sentence-at",
        nargs=2,
        action="append",
        default=[],
        metavar=("I", "S"),
        help="with --from: a new sentence for frame I, which is generated again",
    )
    add(
        "--frame-at",
        nargs=2,
        action="append",
        default=[],
        metavar=("I", "IMAGE"),
        help="an image of your own as frame I, cropped in the middle; the others are to fit it",
    )
    add("--near", action="store_true", help="with --from: stay close to the frames as they were")
    add(
        "--candidates",
        type=int,
        metavar="N",
        help="N versions, with seeds from --seed on: OUT/candidates.png, OUT/candidate_0 and so on",
    )


def _add_windows(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "Stories of any length",
        "More sentences than the model has frames are generated in windows that overlap.",
    ).add_argument
    add(
        "--window-overlap",
        type=int,
        metavar="N",
        help=f"frames that each window keeps of the one before; default: {OVERLAP}",
    )
    add(
        "--context-at",
        nargs=2,
        action="append",
        default=[],
        metavar=("I", "S"),
        help="what the model reads for sentence I where a window begins with it, such as who she "
        'is; in --stories, "context": {"I": "S"}',
    )


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


def read_frameinit(arguments: argparse.Namespace) -> FrameInitConfig | None:
    """FrameInit as the user wants it, None for none.

    Raises `UserError` for values out of range, and where its options stand alone.
    """
    names = [field.name for field in dataclasses.fields(FrameInitConfig) if field.name != "method"]
    given = {name: getattr(arguments, f"frameinit_{name}") for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.frameinit:
        return build(FrameInitConfig, {"method": arguments.frameinit, **given}, "frameinit: ")
    alone = [f"--frameinit-{name}" for name in given]
    alone += ["--camera-motion"] if arguments.camera_motion else []
    require(not alone, f"{', '.join(alone)} without --frameinit; choose its filter too")
    return None


def override(sampling: SamplingConfig, arguments: argparse.Namespace) -> SamplingConfig:
    """The checkpoint's way of sampling, with what the user says."""
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return build(SamplingConfig, dataclasses.asdict(sampling) | given, "sampling: ")


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between") from None


def _indices(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not frames with commas between") from None


def _formats(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    known = ("png", *FORMATS, "json")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return [name for name in names if name in FORMATS]
