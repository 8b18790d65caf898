"""Arguments of a pipeline call: what is refused, and in which words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Run in a process of its own, because the run-time type checks of the tests would come first.
SCRIPT = """
import json, sys
import numpy as np
from PIL import Image
from contextualstory_jax import Story, StoryPipeline
from contextualstory_jax.config.model_config import FrameInitConfig, SamplingConfig

checkpoint, continuation = sys.argv[1:3]
pipe = StoryPipeline.load(checkpoint)
more = StoryPipeline.load(continuation)
S = ["A cat sits.", "It runs.", "It jumps.", "It eats.", "It sleeps."]
IMAGE = np.zeros((16, 16, 3), np.uint8)
NOISE = np.zeros((5, 4, 4, 48), np.float32)
caught = []
for call in json.load(sys.stdin):
    try:
        eval(call)
        caught.append(["nothing", ""])
    except Exception as error:
        caught.append([[kind.__name__ for kind in type(error).__mro__], str(error)])
print(json.dumps(caught))
"""

LIST = "must be a list of sentences or of stories; got "
IMAGES = "must be a PIL image, a path or a uint8 array of shape height x width x 3; got "
REFUSED = [
    ("pipe('A cat.')", f"sentences {LIST}'A cat.'"),
    ("pipe(None)", f"sentences {LIST}None"),
    ("pipe({'a': 'b'})", f"sentences {LIST}{{'a': 'b'}}"),
    ("pipe([])", "story 'story' has 0 sentences; write 1 to 100"),
    ("pipe(S * 21)", "story 'story' has 105 sentences; write 1 to 100"),
    ("pipe(S, window_overlap=5)", "window_overlap must be an integer in 1..4; got 5"),
    ("pipe([Story(S, 'a'), Story(S * 2, 'b')])", "stories of a call are of one length"),
    ("pipe([*S[:4], 3])", "sentences[4]: a sentence must be a string; got 3"),
    ("pipe([S, 3])", f"sentences[1] {LIST}3"),
    ("pipe([S, [*S[:4], None]])", "story 'story_1': a sentence must be a string; got None"),
    ("pipe([*S[:4], '\\ud800'])", "is not Unicode text"),
    ("pipe([Story('A cat.')])", f"story 'story': sentences {LIST}'A cat.'"),
    ("pipe([Story(S, 3)])", "a story's id must be a string; got 3"),
    ("pipe(S, seed=1.5)", "seed must be an integer in 0..4294967295; got 1.5"),
    ("pipe(S, seed=None)", "seed must be an integer in 0..4294967295; got None"),
    ("pipe(S, seed=True)", "seed must be an integer in 0..4294967295; got True"),
    ("pipe(S, seed=-1)", "seed must be an integer in 0..4294967295; got -1"),
    ("pipe(S, seed=2**32)", "seed must be an integer in 0..4294967295; got 4294967296"),
    ("pipe(S, batch_size=0)", "batch_size must be an integer of at least 1; got 0"),
    (
        "pipe(S, scheduler='heun')",
        "scheduler must be one of ddim, euler, euler_ancestral",
    ),
    ("pipe(S, scheduler='heun')", "pndm, lms, unipc; got 'heun'"),
    ("SamplingConfig(scheduler=['ddim'])", "unipc; got ['ddim']"),
    ("pipe(S, num_inference_steps=0)", "num_inference_steps must be an integer in 1..1000; got 0"),
    ("pipe(S, num_inference_steps=1001)", "num_inference_steps must be an integer in 1..1000"),
    ("pipe(S, num_inference_steps=2.0)", "num_inference_steps must be an integer in 1..1000"),
    ("pipe(S, num_inference_steps='2')", "num_inference_steps must be an integer in 1..1000"),
    ("SamplingConfig(steps=2.5)", "steps must be an integer, at least 1; got 2.5"),
    ("SamplingConfig(steps=0)", "steps must be at least 1; got 0"),
    ("pipe(S, sampling=SamplingConfig(steps=1001))", "steps must be in 1..1000"),
    ("pipe(S, sampling=2)", "sampling must be a SamplingConfig; got 2"),
    ("pipe(S, guidance_scale=float('nan'))", "guidance_scale must be finite, at least 0; got nan"),
    ("pipe(S, guidance_scale=float('inf'))", "guidance_scale must be finite, at least 0; got inf"),
    ("pipe(S, guidance_scale='7')", "guidance_scale must be a number, at least 0; got '7'"),
    ("pipe(S, image_guidance_scale=-1)", "image_guidance_scale must be at least 0; got -1"),
    (
        "pipe(S, image_guidance_scale=1.5)",
        "image_guidance_scale above 1 needs a continuation",
    ),
    ("pipe(S, guidance_rescale=1.1)", "guidance_rescale must be in [0, 1]; got 1.1"),
    ("pipe(S, eta=-0.1)", "eta must be in [0, 1]; got -0.1"),
    ("pipe(S, eta=0.5, scheduler='lms')", "eta = 0.5 is for scheduler ddim, not lms"),
    ("pipe(S, height=18)", "multiples of 4 for this model; got 18 x 16"),
    ("pipe(S, size=(16, 18))", "multiples of 4 for this model; got 16 x 18"),
    ("pipe(S, height=16.0)", "height must be an integer of at least 1; got 16.0"),
    ("pipe(S, width=0)", "width must be an integer of at least 1; got 0"),
    ("pipe(S, output_type='pt')", "output_type must be one of np, pil, latent; got 'pt'"),
    ("pipe(S, image=IMAGE)", "has a first frame, but the model needs sentences alone"),
    ("pipe(S, storyflow=[1.0] * 3)", "storyflow must be 4 finite numbers"),
    ("pipe(S, storyflow='fast')", "storyflow must be 4 finite numbers"),
    ("pipe(S, storyflow=[1, 1, 1, float('nan')])", "storyflow must be 4 finite numbers"),
    ("pipe(S, storyflow=[1, 1, 1, -1])", "at least 0; got [1, 1, 1, -1]"),
    ("pipe(S, negative_prompt=3)", "negative_prompt must be a string or a list of 5, one a frame"),
    ("pipe(S, negative_prompt=['x'])", "a list of 5, one a frame; got ['x']"),
    ("pipe(S, negative_prompt=[1] * 5)", "negative_prompt: a sentence must be a string; got 1"),
    ("pipe(S, callback_on_step_end=3)", "callback_on_step_end must be a function; got 3"),
    ("pipe(S, frameinit=FrameInitConfig())", "frameinit needs a first frame, but the model needs"),
    ("pipe(S, frameinit='box')", "frameinit must be a FrameInitConfig; got 'box'"),
    ("pipe(S, latents=NOISE[:, :2])", "latents must be float32 of shape (1, 5, 4, 4, 48)"),
    ("pipe(S, latents=NOISE[:, :2])", "got float32 of shape (1, 5, 2, 4, 48)"),
    ("pipe([S, S], latents=NOISE)", "latents must be float32 of shape (2, 5, 4, 4, 48)"),
    ("pipe(S, latents=NOISE.astype(float))", "got float64 of shape (1, 5, 4, 4, 48)"),
    ("pipe(S, latents=[[1], [2, 3]])", "got [[1], [2, 3]]"),
    ("pipe(S, initial_latents=NOISE + np.inf)", "latents must be finite"),
    ("more(S)", "has no first frame, but the model continues from one; give an image"),
    ("more(S, frameinit=FrameInitConfig())", "has no first frame"),
    ("more(S, image=3)", f"image {IMAGES}3"),
    ("more(S, image='none.png')", "cannot read none.png"),
    ("more(S, image=IMAGE[..., 0])", f"image {IMAGES}uint8 of shape (16, 16)"),
    ("more(S, image=IMAGE / 255)", f"image {IMAGES}float64 of shape (16, 16, 3)"),
    ("more(S, image=IMAGE[:0])", f"image {IMAGES}uint8 of shape (0, 16, 3)"),
    ("more([S, S], image=IMAGE)", "image must be a list of 2 images, one a story"),
    ("more([S, S], image=[IMAGE])", "image must be a list of 2 images, one a story"),
    ("more([S, S], image=[IMAGE, 3])", f"image[1] {IMAGES}3"),
    ("more([Story(S, 'a', IMAGE[:8])])", "must be a uint8 array of shape 16 x 16 x 3"),
    ("more(S, image=IMAGE, camera_motion='zoom_in')", "starts from; choose its filter too"),
    ("more(S, image=IMAGE, camera_motion='roll')", "zoom_in, zoom_out; got 'roll'"),
    ("more(S, image=IMAGE, frameinit=FrameInitConfig(level=1000))", "0..999; got 1000"),
    ("StoryPipeline.load(checkpoint, dtype='float16')", "dtype must be one of float32, bfloat16"),
    ("StoryPipeline.load(checkpoint, weights='last')", "weights must be ema or raw; got 'last'"),
]


@pytest.fixture(scope="module")
def caught(tiny_checkpoint: Path, tiny_continuation_checkpoint: Path) -> dict[str, list]:
    """The exception of each call: the names of its classes, and its message."""
    calls = sorted({call for call, _ in REFUSED})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tiny_checkpoint, tiny_continuation_checkpoint],
        input=json.dumps(calls),
        capture_output=True,
        check=True,
        text=True,
    )
    return dict(zip(calls, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_bad_arguments_are_refused_by_name_on_one_line(caught, call, message):
    classes, found = caught[call]

    assert message in found
    assert {"UserError", "ValueError"} <= set(classes)
    assert not re.search("\n|Tracer|jax", found)
