"""The UNet: its modes and switches, in models as small as can be."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextualstory_jax.config.model_config import UNetConfig, UseTemporal
from contextualstory_jax.models import blocks
from contextualstory_jax.models.embeddings import TimestepEmbedding
from contextualstory_jax.models.network import Network
from contextualstory_jax.models.unet import UNet
from tests.helpers.tiny_networks import FRAMES, TEXT, WIDTH, differ, draw, drawn, random, tiny

STORIES, SIZE = 1, 4


def inputs(config: UNetConfig, dtype=jnp.float32, size=(SIZE, SIZE)) -> tuple:
    """Abstract inputs of `predict`: sample, timesteps, text, StoryFlow, first frame, stride."""

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((STORIES, *shape), dtype)

    given = config.is_continuation
    return (
        array(FRAMES - given, *size, config.in_channels),
        array(dtype=jnp.int32),
        array(FRAMES, TEXT, WIDTH),
        array(FRAMES - 1, dtype=jnp.float32),
        array(*size, config.in_channels) if given else None,
        array(dtype=jnp.int32) if config.use_frame_stride_condition else None,
    )


def predict(unet: UNet, sample, timesteps, text, motion, first_frame, frame_stride):
    """A story's way through all of the UNet's calls."""
    text = unet.text_keys_values(unet.contextualize(text))
    shifts = unet.time_shifts(timesteps, unet.storyflow(motion), frame_stride)
    return unet(sample, shifts, text, first_frame)


def traced(
    config: UNetConfig, dtype=None, size=(SIZE, SIZE)
) -> tuple[set[str], jax.ShapeDtypeStruct]:
    """The names of a UNet's parameters and the shape of what it predicts; nothing is computed."""
    network = Network(lambda: UNet(config))
    out = jax.eval_shape(
        lambda params, *xs: predict(network.bind(params, dtype), *xs),
        network.shapes,
        *inputs(config, dtype or jnp.float32, size),
    )
    return set(network.shapes), out


def having(names: set[str], *parts: str) -> set[str]:
    return {name for name in names if any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("mode", "frames", "first_frame_convs"),
    [("none", 3, 0), ("conv2d", 2, 5), ("concat", 2, 0), ("input_only", 2, 0)],
)
def test_every_first_frame_mode_predicts_the_frames_that_are_not_given(
    mode, frames, first_frame_convs
):
    names, out = traced(tiny(first_frame_condition_mode=mode))

    assert out.shape == (STORIES, frames, SIZE, SIZE, 3)
    assert len(having(names, "first_frame_conv.kernel")) == first_frame_convs  # one a block


@pytest.mark.parametrize("mode", ["none", "conv2d", "concat"])
@pytest.mark.parametrize("size", [(7, 5), (1, 3)])  # where the original's continuation fails
def test_a_prediction_has_the_latents_size_whatever_it_is(mode, size):
    levels = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 32, 32),
    }

    _, out = traced(tiny(first_frame_condition_mode=mode, **levels), size=size)

    assert out.shape[2:4] == size


@pytest.mark.parametrize(
    ("whole", "size", "rows", "columns"),
    [
        ((8, 4), (4, 2), [0, 2, 4, 6], [0, 2]),
        ((5, 7), (3, 4), [0, 1, 3], [0, 1, 3, 5]),
        ((5, 7), (2, 2), [0, 2], [0, 2]),  # by the ratio of the heights
        ((5, 9), (1, 2), [0], [0, 0]),  # its one column is written to both
        ((7, 5), (4, 3), [0, 1, 3, 5], [0, 1, 3]),  # ours, as the next one
        ((1, 8), (1, 4), [0], [0, 2, 4, 6]),
    ],
)
def test_the_first_frame_is_resized_as_the_original_does_where_it_can(whole, size, rows, columns):
    frame = jnp.arange(whole[0] * whole[1]).reshape(1, *whole, 1) * 1.0

    out = blocks.resize_first_frame(frame, *size)

    np.testing.assert_array_equal(out, frame[:, np.array(rows)[:, None], np.array(columns)])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", (False, False, False)),
        ("conv2d", (False, True, True)),
        ("concat", (True, True, True)),
        ("input_only", (False, False, False)),
    ],
)
def test_which_blocks_self_attention_sees_the_first_frame(mode, expected):
    unet = UNet(tiny(first_frame_condition_mode=mode))

    for down, up in zip(unet.down_blocks, unet.up_blocks, strict=True):
        seeing = (down.see_first_frame, unet.mid_block.see_first_frame, up.see_first_frame)
        assert seeing == expected


SWITCHES = {
    "temporal attention": ({"use_temporal": UseTemporal(temporal_attn=False)}, "tempo_attns."),
    "temporal convolution": ({"use_temporal": UseTemporal(temporal_conv=False)}, "conv3ds."),
    "StoryFlow Adapter": ({"use_motion_condition": False}, "msim_embedding."),
    "Storyline Contextualizer": ({"use_text_cross_attention": ""}, "text_adapter."),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_is_switched_off_has_no_parameters(switch):
    changes, part = SWITCHES[switch]
    whole = set(Network(lambda: UNet(tiny())).shapes)

    names, out = traced(tiny(**changes))

    assert having(whole, part)
    assert names == whole - having(whole, part)
    assert out.shape == (STORIES, FRAMES, SIZE, SIZE, 3)


def test_projections_of_transformers_may_be_convolutions():
    network = Network(lambda: UNet(tiny(use_linear_projection=False)))
    projections = {n: s.shape for n, s in network.shapes.items() if ".proj_" in n and "kernel" in n}

    _, out = traced(tiny(use_linear_projection=False))

    assert set(projections.values()) == {(1, 1, 32, 32)}
    assert out.shape == (STORIES, FRAMES, SIZE, SIZE, 3)


def test_sinusoidal_positions_work_with_seta():
    names, out = traced(tiny(temp_pos_embedding="sinusoidal"))

    assert not having(names - having(names, "text_adapter"), "freqs")
    assert out.shape == (STORIES, FRAMES, SIZE, SIZE, 3)


def test_the_last_down_and_the_first_up_block_of_the_published_model_have_no_attention():
    names = set(Network(lambda: UNet(UNetConfig())).shapes)

    assert not having(having(names, "down_blocks.3.", "up_blocks.0."), "attentions", "tempo_attns")
    assert having(names, "down_blocks.2.tempo_attns", "up_blocks.1.tempo_attns")


def test_the_mid_block_s_temporal_attention_is_the_spatial_one_s_in_heads_and_has_no_rotary():
    unet = UNet(tiny())
    pair = (unet.mid_block, unet.down_blocks[1])
    mid, down = (block.tempo_attns[0].transformer_blocks[0] for block in pair)

    assert (mid.attn1.heads, mid.attn2.heads) == (4, 4)
    assert (down.attn1.heads, down.attn2.heads) == (2, 2)
    assert (mid.attn1.seta, mid.attn1.rotary_emb) == (False, None)
    assert (down.attn1.seta, down.attn2.seta) == (True, False)


def test_the_unet_computes_in_the_dtype_of_its_parameters():
    _, out = traced(tiny(use_frame_stride_condition=True), jnp.bfloat16)

    assert out.dtype == jnp.bfloat16


CONTINUATION = tiny(
    first_frame_condition_mode="conv2d",
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    use_motion_condition=False,
    use_text_cross_attention="",
)


def continued(unet: UNet, first_frame: jax.Array) -> jax.Array:
    sample = random(STORIES, FRAMES - 1, SIZE, SIZE, 3)
    text = random(STORIES, FRAMES, TEXT, WIDTH)
    shifts = unet.time_shifts(jnp.full(STORIES, 10))
    return unet(sample, shifts, unet.text_keys_values(text), first_frame)


@pytest.fixture(scope="module")
def continuation():
    network = Network(lambda: UNet(CONTINUATION))
    return network, draw(network)


def test_the_first_frame_enters_by_its_convolutions_alone(continuation):
    # Every block overwrites frame 0 of its input, and so the stored skip that this input is too.
    network, params = continuation
    silent = {n: p * 0 if "first_frame_conv.kernel" in n else p for n, p in params.items()}
    first_frame = random(STORIES, SIZE, SIZE, 3, seed=1)
    call = jax.jit(lambda params, frame: continued(network.bind(params), frame))

    np.testing.assert_array_equal(call(silent, first_frame), call(silent, first_frame + 1))
    assert np.abs(call(params, first_frame) - call(params, first_frame + 1)).max() > 1e-2


def test_skips_that_are_a_block_s_input_hold_the_first_frame(continuation, monkeypatch):
    network, params = continuation
    first_frame = random(STORIES, SIZE, SIZE, 3, seed=1)
    received = []

    def record(self, x, skips, shifts, text):
        received.append(list(skips))
        return jnp.zeros((STORIES, FRAMES, SIZE, SIZE, 32))

    @jax.jit
    def received_skips(params):
        continued(network.bind(params), first_frame)
        return received[0]

    monkeypatch.setattr(blocks.UpBlock, "__call__", record)

    conv_in, resnet0, downsampled, resnet1 = (skip[:, 0] for skip in received_skips(params))

    unet = network.bind(params)
    down, mid = unet.down_blocks, unet.mid_block
    np.testing.assert_allclose(conv_in, down[0].first_frame_conv(first_frame), 1e-4, 1e-5)
    halved = first_frame[:, ::2, ::2]  # by nearest neighbour
    np.testing.assert_allclose(downsampled, down[1].first_frame_conv(halved), 1e-4, 1e-5)
    np.testing.assert_allclose(resnet1, mid.first_frame_conv(halved), 1e-4, 1e-5)
    assert np.abs(resnet0 - conv_in).max() > 0.1  # what no block begins with is left alone


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"first_frame_condition_mode": "conv2d"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_branches_share_what_comes_before_the_text(changes):
    # Sample and first frame of one story, its null text and its text: as with all given twice.
    config = tiny(**changes)
    network = Network(lambda: UNet(config))
    given = config.is_continuation
    text = random(2 * STORIES, FRAMES, TEXT, WIDTH)
    sample, timesteps = random(STORIES, FRAMES - given, SIZE, SIZE, 3, seed=1), jnp.arange(STORIES)
    first_frame = random(STORIES, SIZE, SIZE, 3, seed=2) if given else None

    @functools.partial(jax.jit, static_argnums=1)
    def predict(params, repeats):
        unet = network.bind(params)
        story = (timesteps, sample, first_frame)
        times, x, frame = jax.tree.map(lambda x: jnp.repeat(x, repeats, axis=0), story)
        shifts = unet.time_shifts(times, unet.storyflow(jnp.ones((1, FRAMES - 1))))
        return unet(x, shifts, unet.text_keys_values(text), frame)

    params = draw(network)
    both = predict(params, 1)

    np.testing.assert_allclose(both, predict(params, 2), 1e-4, 1e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-2
    assert both.shape[0] == 2 * STORIES


def test_only_frame_0_is_overwritten(continuation):
    network, params = continuation
    block = network.bind(params).down_blocks[0]
    x, first_frame = random(STORIES, FRAMES, 2, 2, 32), random(STORIES, SIZE, SIZE, 3, seed=1)

    out = block.put_first_frame(x, first_frame)

    np.testing.assert_array_equal(differ(out, x, axis=1), [True, False, False])


@pytest.fixture(scope="module")
def strided():
    return drawn(lambda: UNet(tiny(use_frame_stride_condition=True)))


def test_the_time_embedding_tells_step_scene_change_and_stride(strided):
    timesteps, stride = jnp.array([10]), jnp.array([1])
    flow = random(1, FRAMES, 128)

    temb = strided.embed_time(timesteps, flow, stride)

    assert temb.shape == (1, FRAMES, 128)
    np.testing.assert_allclose(
        temb - strided.embed_time(timesteps, jnp.zeros_like(flow), stride), flow, atol=1e-5
    )
    for other in (
        strided.embed_time(timesteps + 1, flow, stride),
        strided.embed_time(timesteps, flow, stride + 1),
    ):
        assert np.abs(temb - other).max(axis=-1).min() > 1e-3


def test_frame_stride_and_storyflow_start_silent():
    params = Network(lambda: UNet(tiny(use_frame_stride_condition=True))).init(0)

    for name in ("frame_stride_embedding.linear_2", "msim_embedding.2"):
        assert not params[f"{name}.kernel"].any()
        assert not params[f"{name}.bias"].any()


def test_the_time_embedding_s_mlp_is_linear_silu_linear():
    mlp = drawn(lambda: TimestepEmbedding(4, 8))
    x = random(2, 4)
    hidden = np.asarray(mlp.linear_1(x))

    np.testing.assert_allclose(mlp(x), mlp.linear_2(hidden / (1 + np.exp(-hidden))), 1e-5, 1e-6)


def test_a_missing_condition_is_refused(strided):
    timesteps, flow = jnp.array([10]), jnp.zeros((1, FRAMES, 128))

    with pytest.raises(ValueError, match="use_frame_stride_condition: give frame_stride"):
        strided.embed_time(timesteps, flow)
    with pytest.raises(ValueError, match="use_motion_condition: give the StoryFlow embedding"):
        strided.embed_time(timesteps, None, timesteps)


def test_a_first_frame_is_refused_by_a_visualization_model(strided):
    sample = jnp.zeros((1, FRAMES - 1, SIZE, SIZE, 3))

    with pytest.raises(ValueError, match="first_frame_condition_mode is 'none'"):
        strided(sample, [], [], first_frame=sample[:, 0])


def test_a_continuation_model_asks_for_the_first_frame(continuation):
    network, params = continuation
    unet = network.bind(params)

    with pytest.raises(ValueError, match="first_frame_condition_mode is 'conv2d'"):
        unet(jnp.zeros((1, FRAMES - 1, SIZE, SIZE, 3)), [], [])


# What the backward pass computes again


def loss_of(remat: str):
    """A function of a small UNet's parameters, and the parameters."""
    network = Network(lambda: UNet(tiny(), remat))
    sample, text = random(1, FRAMES, SIZE, SIZE, 3), random(1, FRAMES, TEXT, WIDTH)

    def loss(params):
        unet = network.bind(params)
        shifts = unet.time_shifts(jnp.array([10]), unet.storyflow(jnp.ones((1, FRAMES - 1))))
        return (unet(sample, shifts, unet.text_keys_values(text)) ** 2).mean()

    return loss, draw(network)


@pytest.mark.parametrize(("remat", "parts"), [("none", 0), ("block", 16), ("full", 16)])
def test_each_layer_s_parts_are_recomputed_where_the_recipe_says_so(remat, parts):
    # 8 pairs of a resnet and a temporal convolution: 2 down, 2 in the middle, 4 up. 4 layers of a
    # spatial and a temporal transformer: 1 down, 1 in the middle, 2 up.
    loss, params = loss_of(remat)

    program = jax.make_jaxpr(loss)(params)

    assert sum(equation.primitive.name == "remat2" for equation in program.eqns) == parts


@pytest.mark.slow
def test_recomputing_changes_no_gradient():
    loss, params = loss_of("none")
    kept = jax.jit(jax.grad(loss))(params)

    for remat in ("block", "full"):
        for name, again in jax.jit(jax.grad(loss_of(remat)[0]))(params).items():
            np.testing.assert_allclose(again, kept[name], rtol=1e-4, atol=1e-6, err_msg=name)
