"""Which attention cuDNN computes, that padding changes nothing, and whole programs with it.

Nothing here needs a GPU or CUDA: programs are lowered, not compiled, with JAX's check of cuDNN's
version replaced.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from contextualstory_jax.analysis.ahead_of_time import Program, generation, training
from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.config.mesh_config import MeshConfig
from contextualstory_jax.distributed.sharding import HEADS, make_mesh
from contextualstory_jax.models import fused_attention as module
from contextualstory_jax.models.attention import attention
from contextualstory_jax.models.fused_attention import (
    attention_on,
    cudnn_head_width,
    fused_attention,
    suits_cudnn,
)
from tests.helpers.devices import environment
from tests.helpers.narrow_config import DEEP, NARROW

ROOT = Path(__file__).parents[2]


def device(platform: str, capability: str | None) -> types.SimpleNamespace:
    """A device as far as the choice looks at it."""
    return types.SimpleNamespace(platform=platform, compute_capability=capability)


@pytest.mark.parametrize(
    ("platform", "capability", "width"),
    [
        ("gpu", "7.5", 0),  # Turing
        ("gpu", "8.0", 128),  # Ampere
        ("gpu", "8.9", 128),  # Ada
        ("gpu", "9.0", 256),  # Hopper
        ("gpu", "10.0", 256),  # Blackwell
        ("gpu", "gfx942", 0),  # AMD
        ("gpu", None, 0),
        ("tpu", "9.0", 0),
        ("cpu", None, 0),
    ],
)
def test_the_widest_head_that_cudnn_takes(monkeypatch, platform, capability, width):
    found = device(platform, capability)
    monkeypatch.setattr(jax, "devices", lambda: [found])

    assert cudnn_head_width(found) == width


def test_for_an_absent_gpu_jax_takes_the_heads_of_all():
    assert cudnn_head_width(device("gpu", "9.0")) == 128


def test_devices_without_a_capability_have_no_cudnn():
    assert cudnn_head_width(jax.devices("cpu")[0]) == 0


BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


@pytest.mark.parametrize(
    ("dtype", "shape", "capabilities", "chosen"),
    [
        (BF16, (1, 256, 2, 64), ["8.0"], True),
        (F16, (1, 1024, 2, 64), ["8.0"], True),
        (BF16, (1, 385, 2, 64), ["8.0"], True),  # odd lengths are padded
        (BF16, (2, 3, 385, 2, 64), ["8.0"], True),
        (F32, (1, 1024, 2, 64), ["8.0"], False),
        (BF16, (1, 255, 2, 64), ["8.0"], False),
        (BF16, (1, 256, 2, 20), ["8.0"], False),
        (BF16, (1, 256, 2, 128), ["8.0"], True),
        (BF16, (1, 256, 2, 136), ["8.0"], False),
        (BF16, (1, 256, 2, 136), ["9.0"], True),
        (BF16, (1, 256, 2, 256), ["9.0"], True),
        (BF16, (1, 256, 2, 264), ["9.0"], False),
        (BF16, (1, 256, 2, 64), ["7.5"], False),
        (BF16, (1, 256, 2, 64), ["9.0", "9.0"], False),  # no mesh says how arrays are split
    ],
)
def test_cudnn_is_chosen_by_dtype_lengths_head_width_and_device(
    monkeypatch, dtype, shape, capabilities, chosen
):
    devices = [device("gpu", capability) for capability in capabilities]
    monkeypatch.setattr(jax, "devices", lambda: devices)

    assert suits_cudnn(jnp.zeros(shape, dtype)) == chosen


def test_a_mesh_says_for_which_devices_a_program_is(monkeypatch):
    queries = jnp.zeros((2, 256, 2, 64), BF16)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(module, "cudnn_head_width", lambda device: 128)

    assert suits_cudnn(queries)
    with attention_on(mesh, HEADS):
        assert suits_cudnn(queries)
    with attention_on(mesh.abstract_mesh, HEADS):  # of no devices
        assert not suits_cudnn(queries)


@pytest.mark.parametrize("queries", [255, 256])
def test_attention_with_a_mask_or_of_few_queries_is_xla_s(lowered_for_cuda, queries):
    x = jax.ShapeDtypeStruct((1, queries, 2, 8), BF16)
    mask = np.ones((queries, queries), bool)

    assert lowered_for_cuda(lambda q: attention(q, q, q, mask), x) == {}
    found = lowered_for_cuda(lambda q: attention(q, q, q), x)
    assert found == ({FORWARD: 1} if queries == 256 else {})


@pytest.mark.parametrize(("queries", "keys"), [(385, 385), (256, 77), (257, 78), (256, 256)])
def test_padding_changes_neither_values_nor_gradients(queries, keys):
    rng = np.random.default_rng(0)
    q, weights = (jnp.asarray(rng.standard_normal((2, queries, 1, 8)), F32) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((2, keys, 1, 8)), F32) for _ in range(2))

    @functools.partial(jax.jit, static_argnums=0)
    def compute(attend, *qkv):
        return jax.value_and_grad(lambda *qkv: (attend(*qkv) * weights).sum(), (0, 1, 2))(*qkv)

    padded = compute(functools.partial(fused_attention, implementation="xla"), q, k, v)
    plain = compute(attention, q, k, v)

    for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


def pretend_cudnn(replace: Callable[[object, str, object], None]) -> None:
    """Lower for a GPU with cuDNN, neither of which need be there."""
    replace(module, "cudnn_head_width", lambda device: 128)
    replace(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, in one test."""
    pretend_cudnn(monkeypatch.setattr)


def calls(traced: jax.stages.Traced) -> Counter[str]:
    """How often each of cuDNN's kernels stands in a function's program for CUDA."""
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return Counter(re.findall(r"@(__cudnn[\w$]+)", text))


def all_calls(program: Program) -> Counter[str]:
    """Those of all parts of a program."""
    return sum((calls(part.traced) for part in program.parts.values()), Counter())


@pytest.fixture
def lowered_for_cuda(cudnn):
    """The calls of a function's program."""
    return lambda function, *arguments: calls(jax.jit(function).trace(*arguments))


def test_every_pair_of_published_lengths_can_be_differentiated(lowered_for_cuda):
    # Storyline tokens; pixels to pixels, to a sentence, and with the first frame's beside them.
    lengths = [(385, 385), (1024, 1024), (1024, 77), (1024, 2048), (256, 256), (256, 77)]

    def total(heads):
        pairs = [
            (heads[: 2 * q].reshape(1, q, 2, 8), heads[: 2 * k].reshape(1, k, 2, 8))
            for q, k in lengths
        ]
        return sum(attention(q, k, k).astype(F32).sum() for q, k in pairs)

    # No bias: with one, JAX's calls have other names.
    expected = {FORWARD: len(lengths), BACKWARD: len(lengths)}
    assert lowered_for_cuda(jax.grad(total), jax.ShapeDtypeStruct((4096, 8), BF16)) == expected


@pytest.mark.parametrize("task", ["visualization", "continuation"])
def test_programs_of_both_tasks_call_cudnn(cudnn, task):
    # From encoded batches: training of images would encode them before the same step.
    config = load_config(f"configs/pororo_{task}.py", [*NARROW, "data.latents=cache"])
    one = jax.devices()[:1]

    # Self- and cross-attention of four transformers, and the contextualizer's.
    assert all_calls(training(config, one)) == {FORWARD: 9, BACKWARD: 9}
    assert all_calls(generation(config, one)) == {FORWARD: 9}


# On 4 x 2 of 8 devices: how far values and gradients of attention split over them are from those of
# one, by heads that the last axis divides or not; and the calls of programs on 8, as lowered.
PROGRAM = """
import functools, json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding
from contextualstory_jax.analysis.ahead_of_time import generation, training
from contextualstory_jax.config.mesh_config import MeshConfig
from contextualstory_jax.models import fused_attention
from contextualstory_jax.config.config_files import load_config
from contextualstory_jax.distributed.sharding import BATCH, HEADS, make_mesh
from tests.helpers.narrow_config import NARROW
from tests.models.test_fused_attention import all_calls, pretend_cudnn

mesh = make_mesh(MeshConfig(data=4, tensor=2))
attend = functools.partial(fused_attention.fused_attention, implementation="xla")

def difference(heads):
    shapes = [(8, 9, heads, 8)] + [(8, 5, heads, 8)] * 2
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    compute = lambda *x: jax.value_and_grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2))(*x)
    split = jax.jit(fused_attention.attention_on(mesh, HEADS)(compute))
    # Queries are split, keys and values are copied.
    found = split(jax.device_put(q, NamedSharding(mesh, BATCH)), k, v)
    whole = jax.jit(compute)(q, k, v)
    apart = jax.tree.map(lambda a, b: abs(a - b).max() / abs(b).max(), found, whole)
    return max(float(x) for x in jax.tree.leaves(apart))

found = {"differences": [difference(2), difference(3)]}
pretend_cudnn(setattr)
for name, axes in {"data": ["mesh.data=8"], "heads": ["mesh.data=4", "mesh.tensor=2"]}.items():
    changes = [*NARROW, "data.latents=cache", "batch_size=8", *axes]
    config = load_config("configs/pororo_visualization.py", changes)
    found[name] = [all_calls(f(config, jax.devices())) for f in (training, generation)]
print(json.dumps(found))
"""


@pytest.mark.multiprocess
def test_on_eight_devices_each_computes_its_part():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment(devices=8),
        stdout=subprocess.PIPE,
        check=True,
        timeout=600,
    )

    found = json.loads(done.stdout)

    assert max(found["differences"]) < 1e-5
    assert found["data"] == found["heads"] == [{FORWARD: 9, BACKWARD: 9}, {FORWARD: 9}]


@pytest.mark.heavy
def test_a_training_step_of_the_published_layers_calls_cudnn(cudnn):
    config = load_config("configs/pororo_visualization.py", [*NARROW, *DEEP])

    found = all_calls(training(config, jax.devices()[:1]))

    assert found == {FORWARD: 24, BACKWARD: 24}
