"""The complete original: generation by its pipeline, and its training step.

The step is rewritten after its `train.py`, which is one long loop over data: bfloat16 by
autocast over float32 weights, VAE and text encoder in bfloat16, its own optimizer and average.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from contextualstory.pipelines.pipeline_conditional_animation import ConditionalAnimationPipeline
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.training_utils import EMAModel
from einops import rearrange
from transformers import CLIPTextConfig, CLIPTextModel

Program = Callable[[], list[torch.Tensor]]


def frozen(config: dict[str, Any]) -> dict[str, torch.nn.Module]:
    """VAE and text encoder of a model, by our names of the parts."""
    vae = {name: value for name, value in config["vae"].items() if name != "kind"}
    levels = len(vae["block_out_channels"])
    types_ = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    tower = CLIPTextConfig(**config["text_encoder"], eos_token_id=2, projection_dim=512)
    return {"vae": AutoencoderKL(**vae, **types_), "text_encoder": CLIPTextModel(tower)}


class Whole:
    """VAE, text encoder and scheduler, with which the UNet generates and is trained."""

    def __init__(self, config: dict[str, Any], device: torch.device, parts: dict[str, Any]):
        self.config, self.device, self.parts = config, device, parts
        self.frames, self.words = (
            config["unet"]["n_frames"],
            config["text_encoder"]["max_position_embeddings"],
        )
        self.continues = config["unet"]["first_frame_condition_mode"] != "none"
        known = {k: v for k, v in config["scheduler"].items() if k != "skip_prk_steps"}
        self.scheduler = DDIMScheduler(**known)

    def tokens(self, sentences: int) -> torch.Tensor:
        """Token ids; which they are does not matter to the time."""
        return torch.arange(self.words).repeat(sentences, 1) % 200

    def generation_program(self, unet: Any, stories: int, motion: torch.Tensor) -> Program:
        """Its pipeline, from token ids to images on the host."""
        about = self.config
        sampling = about["sampling"]
        pipeline = ConditionalAnimationPipeline(
            vae=self.parts["vae"],
            text_encoder=self.parts["text_encoder"],
            tokenizer=Tokenizer(self.tokens, self.words),
            unet=unet,
            scheduler=self.scheduler,
        )
        pipeline.set_progress_bar_config(disable=True)
        height, width = about["height"], about["width"]
        first = torch.zeros(stories, 3, height, width) if self.continues else None

        def run() -> list[torch.Tensor]:
            drawn = pipeline(
                [""] * self.frames * stories,
                self.frames,
                height,
                width,
                num_inference_steps=sampling["steps"],
                guidance_scale_txt=sampling["guidance_scale"],
                guidance_scale_img=sampling["image_guidance_scale"],
                first_frames=first,
                noise_sampling_method=about["noise"]["kind"],
                noise_alpha=about["noise"]["alpha"],
                motion_cond=motion,
            ).videos
            return [(drawn * 255).to(torch.uint8)]

        return run

    def training_program(self, unet: torch.nn.Module, stories: int) -> Program:
        """A step on images: its loss, backward pass, AdamW and average."""
        unet = copy.deepcopy(unet).float().train().requires_grad_()
        vae, text_encoder = (copy.deepcopy(part).bfloat16() for part in self.parts.values())
        optimizer = torch.optim.AdamW(unet.parameters(), lr=5e-5, weight_decay=1e-2)
        average = EMAModel(unet.parameters(), decay=0.9999)
        size = self.config["height"], self.config["width"]
        pictures = torch.zeros(stories * self.frames, 3, *size).to(self.device, torch.bfloat16)
        ids, null_ids = (
            self.tokens(n).to(self.device) for n in (stories * self.frames, self.frames)
        )
        levels = self.scheduler.alphas_cumprod.to(self.device)

        def run() -> list[torch.Tensor]:
            with torch.no_grad():
                latents = vae.encode(pictures).latent_dist.sample() * vae.config.scaling_factor
                latents = rearrange(latents, "(b f) c h w -> b c f h w", b=stories)
                null_text, (text, *_) = text_encoder(null_ids)[0], text_encoder(ids).to_tuple()
            noise = torch.randn_like(latents)
            steps = torch.randint(0, len(levels), (stories,), device=self.device)
            noisy = self.scheduler.add_noise(latents, noise, steps)
            motion = torch.linalg.vector_norm(latents.diff(dim=2).float(), dim=(1, 3, 4)).long()
            first = {"first_frame_latents": latents[:, :, :1]} if self.continues else {}
            skipped = int(self.continues)
            with torch.autocast(self.device.type, torch.bfloat16):
                predicted = unet(
                    noisy[:, :, skipped:],
                    steps.repeat_interleave(self.frames),
                    (text, None, null_text, [False] * stories),
                    motion_cond=motion,
                    **first,
                ).sample
            difference = predicted.float() - noise[:, :, skipped:].float()
            ratio = levels[steps] / (1 - levels[steps])
            weight = ratio.clamp(max=5) / ratio
            loss = (difference.square().mean(dim=(1, 2, 3, 4)) * weight).mean()
            loss.item()  # as it is logged at each step
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 0.5).item()
            optimizer.step()
            optimizer.zero_grad()
            average.step(unet.parameters())
            return [loss.detach()]

        return run


class Tokenizer:
    """Gives the pipeline ids, whatever the sentences."""

    def __init__(self, tokens: Callable[[int], torch.Tensor], words: int):
        self.tokens, self.model_max_length = tokens, words

    def __call__(self, text: list[str], **_: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(input_ids=self.tokens(len(text)))
