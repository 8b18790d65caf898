"""The original's networks, ready to be run: the UNet and SETA alone, in several variants.

Imported by `scripts/benchmark_reference.py` alone, in a Python that has the original's packages and
neither JAX nor this package. The original is used as it is; for the variant `strongest` three of
its lines are exchanged, in memory, for ones that a compiler makes one graph of.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import resource
import sys
import textwrap
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from contextualstory.models import (
    videoldm_transformer_blocks,
    videoldm_unet,
    videoldm_unet_blocks,
)
from einops import rearrange

from contextualstory_jax.testing.parity_weights import torch_weight

# (class, what to look for, what stands for it): a mask over neighbours would be moved to the device
# and looked at each time, and clamping writes parameters; here they are within bounds already.
CLAMP = (r"\S+\.clamp_\(.*\)", "pass")
EDITS = (
    (
        videoldm_transformer_blocks.BasicConditionalTransformerBlock,
        r"(\w+)\[[:, ]+mask\]",
        r"\1.flatten(4)[..., [0, 1, 2, 3, 5, 6, 7, 8]]",
    ),
    (videoldm_transformer_blocks.Transformer2DConditionModel, *CLAMP),
    (videoldm_unet_blocks.TemporalResnetBlock, *CLAMP),
)


Program = Callable[[], list[torch.Tensor]]


def twice(x: torch.Tensor) -> torch.Tensor:
    """Latents for both branches of guidance, in the original's layout."""
    return rearrange(torch.cat([x, x]), "b f h w c -> b c f h w")


def accepted(function: Callable, values: dict[str, Any]) -> dict[str, Any]:
    """The values that a function takes."""
    return {k: v for k, v in values.items() if k in inspect.signature(function).parameters}


def edited(cls: type, old: str, new: str) -> Callable:
    """A module's forward pass with a piece of its text exchanged."""
    source = textwrap.dedent(inspect.getsource(cls.forward))
    source, found = re.subn(old, new, source)
    if found != 1:
        raise ValueError(f"{cls.__name__}.forward has {found} times {old}, not 1: another version")
    names = dict(vars(sys.modules[cls.__module__]))
    exec(source, names)
    return names["forward"]


class Silent(torch.nn.Module):
    """In place of a feed-forward layer: adds nothing."""

    def forward(self, x: torch.Tensor, **_: Any) -> float:
        return 0.0


def attention_alone(block: torch.nn.Module) -> torch.nn.Module:
    """A temporal transformer block that gathers neighbours, attends and adds, and no more."""
    alone = copy.copy(block)
    alone._modules = {
        **block._modules,
        "norm1": torch.nn.Identity(),
        "norm3": torch.nn.Identity(),
        "attn2": None,
        "ff": Silent(),
    }
    return alone


class Original:
    """The original's networks on a device."""

    def __init__(self, config: dict[str, Any], inputs: str, dtype: str, alpha: float):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.dtype, self.alpha = config, getattr(torch, dtype), alpha
        torch.backends.cudnn.benchmark = True
        unet = videoldm_unet.VideoLDMUNet3DConditionModel
        self.programs: dict[tuple[str, str], Program] = {}
        self.unet = self.filled(unet(**accepted(unet.__init__, config["unet"])), "")
        self.inputs = {
            name: torch.from_numpy(array).to(self.device, self.dtype)
            for name, array in np.load(inputs).items()
        }

    def filled(self, network: torch.nn.Module, prefix: str) -> torch.nn.Module:
        """A network with weights by name, ready to be called."""
        with torch.no_grad():
            for key, p in network.named_parameters():
                if key.endswith("alpha"):
                    p.fill_(self.alpha)
                else:
                    p.copy_(torch.from_numpy(torch_weight(prefix + key, tuple(p.shape), 0)))
        return network.to(self.device, self.dtype).eval()

    @functools.cached_property
    def whole(self) -> Any:
        """With VAE, text encoder and schedule: its pipeline, which needs more packages."""
        from scripts.benchmarks.reference_whole import Whole, frozen

        networks = frozen(self.config)
        parts = {part: self.filled(network, f"{part}.") for part, network in networks.items()}
        return Whole(self.config, self.device, parts)

    @functools.cached_property
    def mended(self) -> torch.nn.Module:
        """The UNet as the variant `strongest` has it, not compiled yet."""
        network = copy.deepcopy(self.unet)
        for p in network.parameters():
            if p.dim() == 4:  # which `Module.to` would ask of convolutions over frames, too
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        forwards = {cls: edited(cls, old, new) for cls, old, new in EDITS}
        for module in network.modules():
            if type(module) in forwards:
                module.forward = types.MethodType(forwards[type(module)], module)
        return network

    @functools.cached_property
    def compilers(self) -> dict[str, Callable]:
        """Compilers of a module, by variant; each result is kept."""
        best = functools.partial(torch.compile, mode="max-autotune")
        done = {"eager": lambda module: module, "compile": torch.compile, "strongest": best}
        return {variant: functools.cache(compile_) for variant, compile_ in done.items()}

    def program(self, what: str, variant: str) -> Program:
        """The program that a request names; after its name come SETA's places, or stories."""
        if (what, variant) not in self.programs:
            compile_ = self.compilers[variant]
            network = self.mended if variant == "strongest" else self.unet
            name, *rest = what.split()
            # What was measured before gives its memory back.
            same = {asked: p for asked, p in self.programs.items() if asked[0].split()[0] == name}
            self.programs = same
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if name == "unet":
                program = self.unet_program(compile_(network))
            elif name == "seta":
                program = self.seta_program([(p, network.get_submodule(p)) for p in rest], compile_)
            elif name == "generation":
                motion = self.inputs["motion"]
                program = self.whole.generation_program(compile_(network), int(rest[0]), motion)
            else:
                program = self.whole.training_program(network, int(rest[0]))
            self.programs[what, variant] = program
        return self.programs[what, variant]

    def unet_program(self, unet: Callable) -> Program:
        """A prediction with and without the text, as the sampler asks for at every step."""
        x = self.inputs
        text = rearrange(torch.cat([x["null_text"], x["text"]]), "b f l d -> (b f) l d")
        more = {} if "first_frame" not in x else {"first_frame_latents": twice(x["first_frame"])}

        @torch.no_grad()
        def run() -> list[torch.Tensor]:
            predicted = unet(
                twice(x["sample"]),
                x["timestep"],
                (text, None),
                motion_cond=x["motion"],
                mode="test",
                do_classifier_free_guidance="text",
                **more,
            ).sample
            return [rearrange(predicted, "b c f h w -> b f h w c")]

        return run

    def seta_program(
        self, blocks: list[tuple[str, torch.nn.Module]], compile_: Callable
    ) -> Program:
        """Attention and the residual around it, of one block after the other."""
        alone = [(self.inputs[p], compile_(attention_alone(block))) for p, block in blocks]

        @torch.no_grad()
        def attend(x: torch.Tensor, block: Callable) -> torch.Tensor:
            _, _, h, w, _ = x.shape
            tokens = rearrange(x, "b f h w c -> (b f) (h w) c")
            return block(tokens, input_height=h, input_width=w).view(x.shape)

        return lambda: [attend(x, block) for x, block in alone]

    def run(self, what: str, variant: str) -> tuple[list[torch.Tensor], float]:
        """Run once the program that a request names; also give the seconds that it took."""
        program = self.program(what, variant)
        self.wait()
        began = time.perf_counter()
        out = program()
        self.wait()
        return out, time.perf_counter() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_memory(self) -> int:
        """Bytes, of the device or, on a CPU, of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
