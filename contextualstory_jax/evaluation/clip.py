"""CLIP from a folder of the Hub, and the unit vectors that it makes of frames and sentences.

::

    FOLDER/config.json                              both encoders
    FOLDER/model.safetensors or pytorch_model.bin   weights of transformers' CLIPModel
    FOLDER/tokenizer_config.json, vocab.json ...    CLIP tokenizer files
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Array, Float, Float32, Int32
from PIL import Image

from contextualstory_jax.config.build import build
from contextualstory_jax.config.model_config import (
    CLIPConfig,
    TextEncoderConfig,
    VisionEncoderConfig,
)
from contextualstory_jax.conversion.diffusers_format import TEXT_ENCODER, read_mapping
from contextualstory_jax.conversion.tensor_files import find_weights
from contextualstory_jax.evaluation.features import Extractor
from contextualstory_jax.evaluation.image_folders import ImageFolder, Item, read_rgb
from contextualstory_jax.evaluation.measurement import Measurement
from contextualstory_jax.evaluation.weights import Weights, read, sha256
from contextualstory_jax.models.clip_vision import CLIPModel
from contextualstory_jax.models.network import Network, Params
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.utils.errors import require

REPOSITORY = "openai/clip-vit-base-patch32"
NAME = REPOSITORY.partition("/")[2]  # of its folder
WEIGHTS = {"safetensors": "model", "bin": "pytorch_model"}

# Of red, green and blue in CLIP's training images.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

T = TypeVar("T")
Vectors = Float32[np.ndarray, "n c"]  # of length one


@dataclasses.dataclass(frozen=True, eq=False)
class CLIP:
    """A model that was read."""

    network: Network[CLIPModel]
    params: Params
    tokenizer: Tokenizer
    side: int  # pixels of a preprocessed image
    sha256: str  # of the weights' file

    def images(self, measurement: Measurement, folder: ImageFolder) -> Vectors:
        """The vectors of a folder's frames."""

        def read(item: Item) -> Float32[np.ndarray, "h w 3"]:
            return preprocess(read_rgb(item), self.side)

        def compute(model: CLIPModel, images: Float[Array, "b h w 3"]) -> Float[Array, "b c"]:
            return model.encode_images(images)

        extractor = Extractor("CLIP images", self.network, self.params, self.sha256, read, compute)
        return measurement.features(extractor, [frame.item for frame in folder.frames])

    def text(self, measurement: Measurement, sentences: Sequence[str]) -> Vectors:
        """The vectors of sentences."""

        def read(sentence: str) -> Int32[np.ndarray, " l"]:
            return self.tokenizer([sentence])[0]

        def compute(model: CLIPModel, ids: Int32[Array, "b l"]) -> Float[Array, "b c"]:
            return model.encode_text(ids)

        extractor = Extractor("CLIP text", self.network, self.params, self.sha256, read, compute)
        return measurement.features(extractor, sentences)


def clip_of(weights: Weights) -> CLIP:
    """The model in a folder of weights, recorded. Raises `UserError` where there is none."""
    found = load_clip(weights.folder / NAME)
    weights.record(NAME, found.sha256, verified=False)
    return found


@functools.lru_cache(maxsize=1)
def load_clip(folder: Path) -> CLIP:
    """Read a folder. Raises `UserError` in one line where it is missing or not CLIP's."""
    require(
        folder.is_dir(),
        f"{folder} is missing; put config.json, model.safetensors (or pytorch_model.bin) and the "
        f"tokenizer's files of https://huggingface.co/{REPOSITORY} there",
    )
    config = read_config(folder / "config.json")
    network = Network(lambda: CLIPModel(config))
    (path, *more), _ = find_weights(folder, WEIGHTS)
    require(not more, f"{folder} holds its weights in several files; give {REPOSITORY}'s one file")
    params = read(path, network)
    tokenizer = Tokenizer(folder, config.text_config.max_position_embeddings)
    return CLIP(network, params, tokenizer, config.vision_config.image_size, sha256(path))


def read_config(path: Path) -> CLIPConfig:
    """The config.json of a CLIP model. Raises `UserError` for another's."""
    values = read_mapping(path)
    require(
        values.get("model_type") == "clip",
        f"{path} is of a model of type {values.get('model_type')!r}; give a folder of CLIP's",
    )
    defaults = dataclasses.asdict(VisionEncoderConfig())
    text = _encoder(path, values, "text_config", TextEncoderConfig, TEXT_ENCODER)
    vision = _encoder(path, values, "vision_config", VisionEncoderConfig, defaults)
    end = (values.get("text_config") or {}).get("eos_token_id", 2)  # 2 means the largest id
    require(
        end in (2, text.vocab_size - 1),
        f"{path}: the end token is {end!r}; CLIP's is the last of the vocabulary",
    )
    return build(
        CLIPConfig,
        {
            "text_config": dataclasses.asdict(text),
            "vision_config": dataclasses.asdict(vision),
            "projection_dim": values.get("projection_dim", 512),
        },
        f"{path}: ",
    )


def _encoder(
    path: Path, values: Mapping[str, Any], name: str, cls: type[T], defaults: Mapping[str, Any]
) -> T:
    """An encoder's part of a config.json, in which old files repeat it as `NAME_dict`."""
    given = {**defaults, **(values.get(name) or {}), **(values.get(f"{name}_dict") or {})}
    fields = cls.__dataclass_fields__  # pyright: ignore[reportAttributeAccessIssue]
    return build(cls, {field: given[field] for field in fields}, f"{path}: {name}.")


def preprocess(image: Image.Image, side: int) -> Float32[np.ndarray, "h w 3"]:
    """An RGB image as CLIP reads it: the short side to `side` pixels, the centre, normalised.

    Source: transformers CLIPImageProcessor, bit for bit.
    """
    short, long = sorted(image.size)
    longer = int(side * long / short)
    width, height = (side, longer) if image.width == short else (longer, side)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    levels = np.asarray(image.crop((left, top, left + side, top + side)), np.float64)
    return ((levels * (1 / 255)).astype(np.float32) - MEAN) / DEVIATION
