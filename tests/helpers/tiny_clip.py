"""A CLIP model small enough to compile in a second, as a folder from the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from contextualstory_jax.data.shapes import TOKENIZER_DIR
from contextualstory_jax.evaluation.clip import NAME, read_config
from contextualstory_jax.models.clip_vision import CLIPModel
from contextualstory_jax.models.network import Network
from contextualstory_jax.testing import parity_weights

LAYERS = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_size": 16,
}


def write_clip(weights: Path) -> Path:
    """A tiny CLIP in a folder of weights, with the tokenizer of the synthetic stories."""
    folder = weights / NAME
    shutil.copytree(TOKENIZER_DIR, folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 77, **LAYERS}
    vision = {"image_size": 8, "patch_size": 4, **LAYERS}
    config = {"text_config": text, "vision_config": vision, "projection_dim": 8}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **config}))
    built = read_config(folder / "config.json")
    tensors = parity_weights.torch_tensors(Network(lambda: CLIPModel(built)), 0)
    tensors["logit_scale"] = np.array(4.6, np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder
