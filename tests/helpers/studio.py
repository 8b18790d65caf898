"""Stories of a studio, and a model for it of which nothing is compiled."""

from __future__ import annotations

import time
import zlib

import jax.numpy as jnp
import numpy as np

from contextualstory_jax.sampling.pipeline import StoryPipeline
from contextualstory_jax.sampling.sample import Generated
from contextualstory_jax.studio.inputs import Settings

SENTENCES = ["Mia sits.", "Otto comes.", "They wave.", "Mia naps.", "Otto leaves."]
SETTINGS = Settings(seed=3, steps=2)


class QuickPipeline(StoryPipeline):
    """A pipeline without a network: sentence and seed decide a frame's colour."""

    def __init__(self):
        self.storyflow, self.step, self.weights = np.full(4, 5, np.float32), 0, "ema"

    def draw_batches(self, stories, *, kept, seed, size, sampling, callback_on_step_end, **options):
        self.interrupt = False
        shape = len(stories), len(stories[0].sentences)
        latents = np.zeros((*shape, size[0] // 4, size[1] // 4, 48), np.float32)
        for step in range(sampling.steps):
            time.sleep(0.001)
            callback_on_step_end(self, step, 0, {"latents": jnp.asarray(latents)})
            if self.interrupt:
                return
        images = np.zeros((*shape, *size, 3), np.uint8)
        for i, (story, number, stays) in enumerate(zip(stories, seed, kept, strict=True)):
            for j, sentence in enumerate(story.sentences):
                colour = zlib.crc32(f"{number} {j} {sentence} {options}".encode())
                images[i, j] = np.frombuffer(colour.to_bytes(4, "big")[:3], np.uint8)
                latents[i, j] = images[i, j, 0, 0, 0]
                if stays is not None and stays.keep[j]:
                    images[i, j] = stays.images[j]
                    if stays.latents is not None:
                        latents[i, j] = stays.latents[j]
        yield Generated(images, latents)

    def preview(self, latents):
        return np.zeros((*latents.shape[:2], 16, 16, 3), np.uint8)


def made(studio, *, link="", sentences=SENTENCES, settings=SETTINGS, **options):
    """The link of a story that is generated, and its content."""
    link, job = studio.generate(link, sentences, settings, **options)
    return link, done(studio, link, job)


def done(studio, link, job):
    """A story's content after a job."""
    assert job.done.wait(60) and not job.error, job.error
    return studio.projects.find(link).read()
