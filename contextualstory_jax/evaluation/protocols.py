"""Named protocols: which frames are measured, and how they become inputs of InceptionV3.

Figures of different protocols are not comparable: with equal weights and images pytorch-fid's and
torch-fidelity's FID differ, and each repository of the field resizes and selects in its own way.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from contextualstory_jax.config.build import build
from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.flintstones import FlintstonesSource
from contextualstory_jax.data.loader import held_out_source
from contextualstory_jax.data.pororo import PororoSource
from contextualstory_jax.data.prepared import PreparedSource
from contextualstory_jax.distributed.multihost import is_first
from contextualstory_jax.evaluation.image_folders import ImageFolder
from contextualstory_jax.utils.errors import UserError, require

Resize = Literal["bilinear", "tensorflow1", "clean"]
ClassifierInput = Literal["symmetric", "unit", "imagenet"]
SAMPLES = 10  # of reference frames, where they are random

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How one repository measures.

    Attributes:
        name: of the protocol.
        source: repository and files that it was read from.
        resize: to 299 x 299 pixels. `bilinear` is PyTorch's without antialiasing, with half-pixel
            centres; `tensorflow1` TensorFlow 1's, without; `clean` is Pillow's bicubic on float
            planes, with antialiasing and not quantised.
        side: pixels that frames are resized to before, with Pillow's bilinear filter.
        scale: of the inputs: `unit` is x / 127.5 - 1, `128` is (x - 128) / 128.
        datasets: to which it applies; empty for any.
        random_reference: whether the reference's frame is a random one of each file that holds
            several; those of FlintstonesSV and PororoSV do.
        first_stories: how many stories are measured, by dataset, task and split, where not all.
        clip: FSD's, of frames of 64 x 64 pixels from -1 to 1: `raw` as it is, or `resized` to
            112 x 112.
        classifier_input: of the metric `characters`. `symmetric` is from -1 to 1, as all published
            classifiers are trained and StoryGPT-V measures: ImageNet's normalisation, undone by
            torchvision's `transform_input`. Two repositories build the network without that:
            `imagenet` is normalised, and `unit`, from 0 to 1, is not.
    """

    name: str
    source: str
    resize: Resize = "bilinear"
    side: int | None = None
    scale: Literal["unit", "128"] = "unit"
    datasets: tuple[str, ...] = ()
    random_reference: bool = False
    first_stories: Mapping[tuple[str, str, str], int] = dataclasses.field(default_factory=dict)
    clip: Literal["raw", "resized"] = "raw"
    classifier_input: ClassifierInput = "symmetric"

    def select(self, folder: ImageFolder) -> ImageFolder:
        """The frames that it measures.

        Raises `UserError` where it does not apply to the dataset.
        """
        settings = folder.settings
        if not settings:
            return folder
        dataset = settings["data"]["name"]
        require(
            not self.datasets or dataset in self.datasets,
            f"--protocol {self.name} is for {' and '.join(self.datasets)}, and {folder.path} holds "
            f"stories of {dataset!r}; choose another protocol",
        )
        count = self.first_stories.get((dataset, settings["task"], settings["split"]))
        frames = tuple(frame for story in folder.stories()[:count] for frame in story)
        return folder._replace(frames=frames)


FIELD: dict[str, Any] = {"datasets": ("pororo", "flintstones"), "random_reference": True}
CPCSV = "basiclab/CPCStoryVisualization-Pytorch: fid/vfid_score.py, fid/residual2p1.py, trainer.py"
STORYVIZ: dict[str, Any] = FIELD | {
    "side": 64,
    "first_stories": {
        ("pororo", "visualization", "val"): 2304,
        ("pororo", "continuation", "val"): 2304,
        ("flintstones", "continuation", "test"): 1900,
    },
}
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("pytorch-fid", "mseitzer/pytorch-fid 0.3.0: fid_score.py, inception.py"),
        Protocol(
            "torch-fidelity",
            "toshas/torch-fidelity 0.4.0: feature_extractor_inceptionv3.py",
            resize="tensorflow1",
            scale="128",
        ),
        Protocol(
            "clean-fid",
            "GaParmar/clean-fid 0.1.35: resize.py, inception_torchscript.py",
            resize="clean",
            scale="128",
        ),
        Protocol(
            "storyviz",
            "adymaharana/StoryViz: eval_scripts/eval_vfid.py, vfid/fid_score.py, "
            "dcsgan/pororo_data.py, eval_scripts/eval_classifier.py, classifier/dataloader.py",
            classifier_input="unit",
            **STORYVIZ,
        ),
        Protocol(
            "storydalle",
            "adymaharana/storydalle: story-dalle/eval_fid.py, story-dalle/eval_char_clf.py",
            classifier_input="imagenet",
            **STORYVIZ,
        ),
        Protocol("arldm", "xichenpan/ARLDM: main.py", side=64, **FIELD),
        Protocol("make-a-story", "ubc-vision/Make-A-Story: eval_vfid.py", side=256, **FIELD),
        Protocol("cpcsv", CPCSV, side=64),
        Protocol("cpcsv-resized", CPCSV, side=64, clip="resized"),
    )
}


def random_references(folder: ImageFolder, seed: int) -> list[ImageFolder]:
    """`SAMPLES` times the frames of a folder's originals, each a random image of its file.

    They are read from the dataset itself, which the folder's settings name; empty where its files
    hold one image a frame, and, with a warning, where it is prepared. Equal seeds give equal
    samples.

    Raises `UserError` where the dataset is not there.
    """
    data = build(DataConfig, folder.settings["data"], f"{folder.path / 'settings.json'}: data.")
    try:
        source = held_out_source(data, folder.settings["height"])
    except UserError as error:
        raise UserError(
            f"the protocol takes random images of the dataset, which cannot be read: {error}"
        ) from error
    if isinstance(source, PreparedSource) and is_first():
        logger.warning(
            "%s is prepared: its originals are the only sample of reference frames; generate from "
            "the published folder for %d",
            data.root,
            SAMPLES,
        )
    if not isinstance(source, (PororoSource, FlintstonesSource)):
        return []
    if isinstance(source, PororoSource) and source.captions == "blip2":
        return []
    paths = {}
    for first, *_ in folder.stories():
        number = first.story.partition("-")[0]
        require(
            number.isdecimal() and int(number) < len(source),
            f"{folder.path} has the story {first.story}, which is not in {data.root}; name its "
            "dataset as data.root in settings.json",
        )
        paths[first.story] = source.story(int(number)).paths

    def sample(number: int) -> ImageFolder:
        random = np.random.default_rng([seed, number])
        frames = tuple(
            frame._replace(
                path=paths[frame.story][frame.position], choice=int(random.integers(2**31))
            )
            for frame in folder.frames
        )
        return folder._replace(frames=frames)

    return [sample(number) for number in range(SAMPLES)]
