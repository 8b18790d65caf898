"""Features of images by FID's InceptionV3, under a protocol."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Num, UInt8
from PIL import Image

from contextualstory_jax.evaluation.features import Extractor
from contextualstory_jax.evaluation.image_folders import Item, read_rgb
from contextualstory_jax.evaluation.protocols import Protocol, Resize
from contextualstory_jax.evaluation.weights import Weights, WeightsFile
from contextualstory_jax.models.inception import FID_CLASSES, SIDE, InceptionV3
from contextualstory_jax.models.network import Network

FID_WEIGHTS = WeightsFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "fid_inception",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
)


@functools.cache
def fid_network() -> Network[InceptionV3]:
    """FID's InceptionV3."""
    return Network(lambda: InceptionV3(FID_CLASSES, fid=True))


def inception(protocol: Protocol, weights: Weights) -> Extractor:
    """The extractor of a protocol's features. Raises `UserError` where weights are missing."""
    network = fid_network()
    params = weights.load(FID_WEIGHTS, network)

    def read(item: Item) -> Num[np.ndarray, "h w 3"]:
        image = read_rgb(item)
        if protocol.side is not None:
            image = image.resize((protocol.side, protocol.side), Image.Resampling.BILINEAR)
        return resize_clean(np.asarray(image)) if protocol.resize == "clean" else np.asarray(image)

    def compute(module: InceptionV3, images: Num[Array, "b h w 3"]) -> Float[Array, "b d"]:
        x = images.astype(jnp.float32)
        if protocol.resize != "clean":
            x = resize_bilinear(x, protocol.resize)
        return module.features(x / 127.5 - 1 if protocol.scale == "unit" else (x - 128) / 128)

    name = f"inception {protocol.resize} {protocol.side} {protocol.scale}"
    return Extractor(name, network, params, weights.digest(FID_WEIGHTS), read, compute)


def resize_clean(image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "299 299 3"]:
    """Pillow's bicubic on float planes, clipped and not quantised.

    Reference: clean-fid resize.py make_resizer.
    """
    planes = [Image.fromarray(image[..., channel].astype(np.float32)) for channel in range(3)]
    resized = [plane.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for plane in planes]
    return np.stack([np.asarray(plane).clip(0, 255) for plane in resized], axis=-1)


def resize_bilinear(x: Float[Array, "b h w 3"], resize: Resize) -> Float[Array, "b 299 299 3"]:
    """Bilinear without antialiasing, as PyTorch or TensorFlow 1 places the pixels.

    Reference: pytorch-fid inception.py InceptionV3.forward; torch-fidelity
    interpolate_compat_tensorflow.py.
    """
    for axis in (2, 1):
        low, high, fraction = sample_points(x.shape[axis], resize)
        weight = jnp.expand_dims(fraction, (0, 2, 3) if axis == 1 else (0, 1, 3))
        before = jnp.take(x, low, axis=axis)
        x = before + (jnp.take(x, high, axis=axis) - before) * weight
    return x


def sample_points(
    size: int, resize: Resize
) -> tuple[Int[np.ndarray, "299"], Int[np.ndarray, "299"], Float32[np.ndarray, "299"]]:
    """For each of 299 pixels the two it lies between, and how far it is from the first."""
    step = np.float32(size / SIDE)
    if resize == "bilinear":
        # Multiplied and added with one rounding, as PyTorch does.
        places = (np.arange(SIDE) + 0.5) * np.float64(step) - 0.5
        places = np.maximum(places, 0).astype(np.float32)
    else:
        places = np.arange(SIDE, dtype=np.float32) * step
    low = places.astype(np.int64)
    return low, np.minimum(low + 1, size - 1), places - low.astype(np.float32)
