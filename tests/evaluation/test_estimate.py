"""The estimate of time and memory that is printed before test stories are generated."""

from __future__ import annotations

import pytest

from contextualstory_jax.evaluation.estimate import duration, lines, story_flops, weight_bytes
from contextualstory_jax.models.flops import generation_flops
from contextualstory_jax.sampling.pipeline import StoryPipeline


def test_operations_are_those_of_all_steps_with_guidance(tiny_model_config):
    assert tiny_model_config.sampling.steps == 2

    assert story_flops(tiny_model_config) == generation_flops(tiny_model_config, 2, 2).total()


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_weights_are_counted_in_the_dtype_they_are_kept_in(dtype, size, tiny_checkpoint):
    pipeline = StoryPipeline.load(tiny_checkpoint, dtype=dtype)
    arrays = [array for part in pipeline.params.values() for array in part.values()]

    assert weight_bytes(pipeline) == sum(array.nbytes for array in arrays)
    assert weight_bytes(pipeline) == size * sum(array.size for array in arrays)


def test_the_estimate_in_words():
    found = lines(2208, 10**15, 1e14, "1 H200 (bfloat16)", 2_850_000_000, 8)

    assert "2,208 stories of 1e+15 floating-point operations, 2.21e+18 in all" in found[0]
    assert "time: at least 6.13 hours" in found[1] and "1 H200 (bfloat16)" in found[1]
    assert "memory: 2.9 GB of weights" in found[2]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.5 seconds"), (90.0, "1.5 minutes"), (7200.0, "2 hours"), (2e5, "2.31 days")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
