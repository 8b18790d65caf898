"""Costs of training or generation on a TPU slice, or on NVIDIA GPUs, that are not there.

XLA compiles for a slice of which it knows the name alone, and refuses what does not fit a chip's
memory. Of a GPU it needs a description; kernels are not tuned for it, and nothing is refused.
"""

from __future__ import annotations

import importlib.util
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from contextualstory_jax.analysis.hlo import Collective, collectives, custom_calls, memory_traffic
from contextualstory_jax.analysis.tpu_padding import padded_flops
from contextualstory_jax.config.train_config import TrainConfig
from contextualstory_jax.diffusion.denoising import State, make_sampler, padded
from contextualstory_jax.diffusion.guidance import num_branches
from contextualstory_jax.distributed.sharding import BATCH, Placement, batch_ways, make_mesh
from contextualstory_jax.models.flops import (
    DEVICES,
    generation_flops,
    peak_flops,
    training_step_flops,
)
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.models.vae import Moments
from contextualstory_jax.sampling.sample import Inputs, Scales, generation_programs
from contextualstory_jax.training.start_state import abstract_state
from contextualstory_jax.training.train_step import Batch, Encoded, make_train_step
from contextualstory_jax.training.trainer import check_batch
from contextualstory_jax.utils.errors import UserError, require

# XLA's least effort, and one code for equal layers: a fraction of the time and half of the memory,
# for a program of the same operations that fuses and overlaps less.
QUICK = {"exec_time_optimization_effort": -1.0, "xla_tpu_enable_deduplicated_calls": True}
# With no GPU to time them on, Triton's default tiles do not fit some products.
ABSENT_GPU = {"xla_gpu_enable_triton_gemm": False}


def tpu_devices(topology: str) -> list[Any]:
    """The chips of a TPU slice, which need not be there: `v5e:4x4`, `v4:2x2x2`, `v5e:1x1`.

    Raises `UserError` for an unknown name, or without the compiler.
    """
    require(
        importlib.util.find_spec("libtpu") is not None,
        "the TPU compiler, libtpu, is not installed; install the package with the extra [tpu]",
    )
    # Of a v4 chip, users see both cores as one device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if re.fullmatch(r"\w+:1(x1)*", topology):  # without it a host has more chips than the slice
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(
            f"no TPU topology {topology!r}: {str(error).splitlines()[0]}; names are like v5e:4x4, "
            "v6e:16x16, v4:2x2x2, v5p:4x4x4"
        ) from error
    kind = found.devices[0].device_kind
    require(kind in DEVICES, f"{topology}: flops.DEVICES says nothing of {kind}; add it there")
    return list(found.devices)


# A GPU as XLA describes it (`GpuTargetConfigProto`). Source: what XLA finds on an H100 SXM.
GPUS = {
    "h100": """
        gpu_device_info {
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: 233472
          shared_memory_per_block_optin: 232448
          core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          cuda_compute_capability { major: 9 }
        }
        platform_name: "CUDA"
        dnn_version_info { major: 9 minor: 28 }
        runtime_version { major: 12 minor: 9 }
        device_description_str: "NVIDIA H100 80GB HBM3"
    """,
}


def absent_devices(topology: str) -> list[Any]:
    """The chips of a TPU slice, `v5e:4x4`, or GPUs of one machine, `h100` or `h100:8`.

    Raises `UserError` for an unknown name, or without the compiler.
    """
    gpu = re.fullmatch(rf"({'|'.join(GPUS)})(?::([1-9]\d*))?", topology)
    return gpu_devices(gpu[1], int(gpu[2] or 1)) if gpu else tpu_devices(topology)


def gpu_devices(name: str, count: int) -> list[Any]:
    """NVIDIA GPUs of one machine, which need not be there: a name of `GPUS`.

    Raises `UserError` without the compiler.
    """
    require(
        importlib.util.find_spec("jax_cuda12_plugin") is not None,
        "the CUDA compiler is not installed; install the package with the extra [gpu]",
    )
    found = topologies.get_topology_desc(
        platform="cuda", target_config=GPUS[name], topology=f"1x{count}x1"
    )
    return list(found.devices)


def needed_memory(error: Exception) -> tuple[int, int] | None:
    """Bytes that a refused program needs, and that there are; None for other errors."""
    size = r"([\d.]+[KMGT]?)"
    found = re.search(rf"{size}\)? exceeds available HBM \({size}\)", str(error))
    if not found:
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needed, limit = (
        round(float(text.rstrip("KMGT")) * units.get(text[-1], 1)) for text in found.groups()
    )
    return needed, limit


def memory_limit(device: Any) -> int:
    """The bytes that programs may take of a chip's memory: the compiler says what it refuses."""
    whole = DEVICES[device.device_kind].hbm_bytes
    if device.platform == "gpu":  # for which it refuses nothing
        return int(whole)
    size = 2 ** math.ceil(math.log2(whole) + 1)
    everything = jax.jit(
        lambda: jnp.zeros(size, jnp.uint8), out_shardings=SingleDeviceSharding(device)
    )
    try:
        everything.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = needed_memory(error)
        if found:
            return found[1]
    return int(whole)


class Part(NamedTuple):
    """A function to compile."""

    traced: jax.stages.Traced
    steps: int = 1  # that its loop takes, where their number is an input


class Program(NamedTuple):
    """Training or generation, for devices that are not there."""

    parts: dict[str, Part]  # that run one after the other
    mesh: Mesh
    dtype: str
    stories: int  # that it takes at once, on all devices
    useful_flops: int  # of all devices

    @property
    def padded_flops(self) -> int:
        """Operations of all devices' matrix products, in full tiles (`analysis/tpu_padding.py`)."""
        return sum(padded_flops(part.traced.jaxpr, part.steps) for part in self.parts.values())


def training(config: TrainConfig, devices: Sequence[Any]) -> Program:
    """A config's training step. Weights, data and a latent cache need not be there.

    Raises `UserError` where the config does not fit the devices.
    """
    mesh = make_mesh(config.mesh, devices)
    check_batch(config, mesh)
    placement = Placement(mesh, config.mesh.rules)
    model = StoryModel(config.model, jnp.dtype(config.compute_dtype), config.remat)
    placement.check(model.shapes)
    state = abstract_state(model, config, placement)
    b, f, tokens = config.batch_size, config.model.unet.n_frames, _words(config)
    batch: Batch | Encoded
    null_ids, null_text = np.zeros(tokens, np.int32), None
    if config.data.latents is None:
        images = _array(mesh, BATCH, (b, f, config.model.height, config.model.width, 3), jnp.uint8)
        batch = Batch(images, _array(mesh, BATCH, (b, f, tokens), jnp.int32))
    else:
        size = config.model.latent_size(config.model.height, config.model.width)
        shape = (b, f, *size, config.model.vae.latent_channels)
        moments = Moments(*(_array(mesh, BATCH, shape, model.dtype) for _ in range(2)))
        width = config.model.text_encoder.hidden_size
        batch = Encoded(moments, _array(mesh, BATCH, (b, f, tokens, width), model.dtype))
        null_text = np.zeros((tokens, width), model.dtype)
    step = make_train_step(model, config, placement, state, null_ids, null_text)
    flops = training_step_flops(config).total()
    return Program({"step": Part(step.trace(state, batch))}, mesh, config.compute_dtype, b, flops)


def generation(config: TrainConfig, devices: Sequence[Any], stories: int | None = None) -> Program:
    """The generation of a batch with a config's model and sampling options, in bfloat16.

    Args:
        stories: by default one for each part of a batch.

    Raises:
        UserError: where they do not fit the devices.
    """
    mesh = make_mesh(config.mesh, devices)
    ways = batch_ways(mesh)
    b = stories or ways
    require(b % ways == 0, f"batch_size = {b} is not divisible by data x fsdp = {ways}")
    placement = Placement(mesh, config.mesh.rules)
    model = StoryModel(config.model, jnp.bfloat16)
    about, sampling = config.model, config.model.sampling
    placement.check(model.shapes)
    params = jax.tree.map(
        lambda p, sharding: jax.ShapeDtypeStruct(p.shape, model.dtype, sharding=sharding),
        model.shapes,
        placement.shardings(model.shapes),
    )
    f, tokens = about.unet.n_frames, _words(config)
    shape = (b, f, *about.latent_size(about.height, about.width), about.unet.in_channels)
    keys = _array(mesh, BATCH, (b,), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    picture = (b, 1, about.height, about.width, 3)
    inputs = Inputs(
        _array(mesh, BATCH, (b, f, tokens), jnp.int32),
        _array(mesh, BATCH, shape, jnp.float32),
        keys,
        keys,
        _array(mesh, BATCH, picture, jnp.uint8) if about.unet.is_continuation else None,
        _array(mesh, BATCH, (b, f), jnp.bool_),
        _array(mesh, BATCH, shape, jnp.float32),
    )
    everywhere = PartitionSpec()
    solver = make_sampler(about.scheduler, sampling)
    steps = len(solver.timesteps)
    scales = Scales(*(_array(mesh, everywhere, (), jnp.float32) for _ in Scales._fields))
    null_ids = _array(mesh, everywhere, (1, tokens), jnp.int32)
    motion = _array(mesh, everywhere, (f - 1,), jnp.float32)
    number = _array(mesh, everywhere, (), jnp.int32)
    branches = num_branches(sampling.guidance_scale, sampling.image_guidance_scale)
    programs = generation_programs(model, placement)
    sigma = _array(mesh, everywhere, (), jnp.float32)
    prepare = programs.prepare.trace(
        branches, params, inputs, null_ids, motion, scales, sigma, None
    )
    given, latents = prepare.out_info
    sampler = jax.tree.map(
        lambda x: _array(mesh, everywhere, x.shape, x.dtype),
        jax.tree.map(jnp.asarray, padded(solver)),
    )
    state = State(latents, (latents,) * solver.memory)
    denoise = programs.steps.trace(branches, params, given, sampler, state, number, number)
    decode = programs.decode.trace(params, given.clean_first, latents)
    parts = {"prepare": Part(prepare), "steps": Part(denoise, steps), "decode": Part(decode)}
    useful = b * generation_flops(about, steps, branches).total()
    return Program(parts, mesh, "bfloat16", b, useful)


def report(program: Program, *, quick: bool = False) -> dict[str, Any]:
    """Compile, and report the program's costs on each device; `fits`, whether it has the memory.

    Memory is that of the part that takes most. Operations are XLA's count, which passes over zero
    padding, the project's (`models/flops.py`), and those of matrix products in full tiles
    (`analysis/tpu_padding.py`).
    The prediction is the roofline: all operations of the larger of the first two, at the device's
    peak, or all memory traffic, at its bandwidth, whichever takes longer, and no collective. With
    `quick` the compiler takes its least effort: memory, traffic and collectives are another
    program's than that which would run.
    """
    chips, device = program.mesh.size, program.mesh.devices.flat[0]
    is_gpu = device.platform == "gpu"
    require(not (is_gpu and quick), "--quick is of TPUs alone; leave it out")
    useful = program.useful_flops // chips
    values: dict[str, Any] = {
        "device": device.device_kind,
        "chips": chips,
        "mesh": dict(program.mesh.shape),
        "batch_size": program.stories,
        "useful_flops_per_chip": useful,
        "padded_flops_per_chip": program.padded_flops // chips,
        "hbm_limit": memory_limit(device),
    }
    began = time.monotonic()
    try:
        used = total_use(program, ABSENT_GPU if is_gpu else QUICK if quick else None)
    except jax.errors.JaxRuntimeError as error:
        found = needed_memory(error)
        if found is None:
            raise
        values["compile_seconds"] = round(time.monotonic() - began, 1)
        return {"fits": False, "hbm_bytes_per_chip": {"total": found[0]}, **values}
    values["compile_seconds"] = round(time.monotonic() - began, 1)
    values |= {
        "flops_per_chip": used.flops,
        "memory_traffic_per_chip": used.traffic,
        "collectives": {kind: c._asdict() for kind, c in sorted(used.collectives.items())},
        "custom_calls": dict(sorted(used.custom_calls.items())),
    }
    peak = peak_flops(device.device_kind, program.dtype)
    if peak:
        bandwidth = DEVICES[device.device_kind].bandwidth
        seconds = max(max(used.flops, useful) / peak, used.traffic / bandwidth)
        values["predicted_seconds"] = seconds
        values["predicted_stories_per_second"] = program.stories / seconds
    fits = used.memory["total"] <= values["hbm_limit"]
    return {"fits": fits, "hbm_bytes_per_chip": used.memory, **values}


class Use(NamedTuple):
    """Memory, traffic and operations of compiled programs on one device."""

    memory: dict[str, int]
    flops: int
    traffic: int  # bytes
    collectives: dict[str, Collective]
    custom_calls: Counter[str]


def total_use(program: Program, options: dict[str, Any] | None = None) -> Use:
    """The use of all parts, compiled: the largest memory, and the sum of everything else."""
    uses = []
    for part in program.parts.values():
        compiled = part.traced.lower().compile(options)
        cost: Any = compiled.cost_analysis() or {}  # none of a GPU
        hlo = compiled.as_text() or ""
        # XLA counts a loop of unknown length once, and all operations of that part are in it.
        flops = part.steps * int(cost.get("flops", 0))
        moved = memory_traffic(hlo, part.steps), collectives(hlo, part.steps)
        uses.append(Use(memory_use(compiled), flops, *moved, custom_calls(hlo, part.steps)))
    together: dict[str, Collective] = {}
    for kind, c in (item for use in uses for item in use.collectives.items()):
        before = together.get(kind, Collective(0, 0))
        together[kind] = Collective(before.count + c.count, before.bytes + c.bytes)
    return Use(
        max((use.memory for use in uses), key=lambda memory: memory["total"]),
        sum(use.flops for use in uses),
        sum(use.traffic for use in uses),
        together,
        sum((use.custom_calls for use in uses), Counter()),
    )


def memory_use(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on each device; what is written over donated arguments counts as argument."""
    stats: Any = compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    return {**memory, "total": sum(memory.values())}


def _words(config: TrainConfig) -> int:
    return config.model.text_encoder.max_position_embeddings


def _array(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
