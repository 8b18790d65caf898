"""Collectives and memory traffic, of programs' texts as XLA prints them."""

from __future__ import annotations

import pytest

from contextualstory_jax.analysis.hlo import array_bytes, collectives, custom_calls, memory_traffic

# A loop of five; XLA prints one line for each instruction, with more attributes than these.
LOOP = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (carry: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %carry = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %h = bf16[4,8]{1,0} get-tuple-element(%carry), index=1
  %all-reduce.1 = bf16[4,8]{1,0} all-reduce(%h), channel_id=7, to_apply=%add
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%i, %all-reduce.1)
}

%condition (carry.1: (s32[], bf16[4,8])) -> pred[] {
  %carry.1 = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (p: bf16[1,8], q: f32[16]) -> bf16[4,8] {
  %p = bf16[1,8]{1,0} parameter(0), sharding={devices=[4,1]<=[4]}
  %q = f32[16]{0} parameter(1)
  %all-gather.2 = bf16[4,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}
  %reduce-scatter.3 = f32[4]{0} reduce-scatter(%q), channel_id=2, dimensions={0}, to_apply=%add
  %zero = s32[] constant(0)
  %start = (s32[], bf16[4,8]{1,0}) tuple(%zero, %all-gather.2)
  %loop = (s32[], bf16[4,8]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %end = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""

# As a TPU has it: parts of one all-gather in two fusions, a reduce-scatter as a fusion, what is
# begun and ended apart, and arrays in memory space 1, which is not HBM.
TPU = """
%async_collective_fusion.1 (p.1: bf16[1,8]) -> bf16[4,8] {
  %p.1 = bf16[1,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.5 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=3
}

%async_collective_fusion.2 (p.2: bf16[1,8]) -> bf16[4,8] {
  %p.2 = bf16[1,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.6 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=3
}

%all-reduce-scatter.4 (p.3: f32[16], p.4: f32[]) -> f32[4] {
  %p.3 = f32[16]{0:T(1024)} parameter(0)
  %p.4 = f32[]{:T(128)} parameter(1)
  %all-reduce.9 = (f32[16]{0:T(1024)}, f32[]{:T(128)}) all-reduce(%p.3, %p.4), channel_id=4
  ROOT %custom-call = f32[4]{0:T(128)} custom-call(%all-reduce.9), custom_call_target="Scatter"
}

ENTRY %main.1_spmd (a: bf16[1,8], b: f32[16], c: f32[]) -> f32[4] {
  %a = bf16[1,8]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[16]{0:T(1024)} parameter(1)
  %c = f32[]{:T(128)} parameter(2)
  %fusion.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} fusion(%a), calls=%async_collective_fusion.1
  %fusion.2 = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%a), calls=%async_collective_fusion.2
  %fusion.3 = f32[4]{0:T(128)} fusion(%b, /*index=1*/%c), calls=%all-reduce-scatter.4
  %permute-start = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}) collective-permute-start(%fusion.3), \
channel_id=5
  ROOT %permute-done = f32[4]{0} collective-permute-done(%permute-start)
}
"""


def test_collectives_of_a_loop_count_as_often_as_it_runs():
    assert collectives(LOOP) == {
        "all-gather": (1, 64),  # its result
        "all-reduce": (5, 5 * 64),
        "reduce-scatter": (1, 64),  # its operand
    }


def test_collectives_of_a_tpu_count_once():
    assert collectives(TPU) == {
        "all-gather": (1, 64),
        "reduce-scatter": (1, 68),
        "collective-permute": (1, 16),
    }


def test_a_loop_whose_length_is_an_input_counts_as_often_as_there_are_steps():
    endless = LOOP.replace("known_trip_count", "other")

    assert collectives(endless)["all-reduce"] == (1, 64)
    assert collectives(endless, 50)["all-reduce"] == (50, 50 * 64)
    assert collectives(LOOP, 50) == collectives(LOOP)
    body = memory_traffic(endless, 2) - memory_traffic(endless, 1)
    assert memory_traffic(endless, 50) == memory_traffic(endless, 1) + 49 * body


def test_a_loop_on_a_tpu_runs_as_long_as_its_condition_says():
    counted = LOOP.replace("known_trip_count", "other").replace(
        "ROOT %less = pred[] constant(true)",
        "%n = s32[]{:T(128)} constant(20)\n"
        "  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0\n"
        "  ROOT %less = pred[]{:T(512)} compare(%i.1, %n), direction=LT",
    )

    assert collectives(counted)["all-reduce"] == (20, 20 * 64)


def test_memory_traffic_is_what_instructions_read_and_write():
    gather, scatter, loop = 16 + 64, 64 + 16, 5 * (64 + 64)
    assert memory_traffic(LOOP) == gather + scatter + loop
    fusions = 16 + (16 + 64) + (64 + 4 + 16)  # what is in vector memory does not count
    assert memory_traffic(TPU) == fusions + 16 + 16


@pytest.mark.parametrize(
    ("type_", "size"),
    [
        ("f32[3,5]{1,0:T(8,128)}", 60),
        ("bf16[]", 2),
        ("pred[7]{0}", 7),
        ("s4[8]{0}", 4),
        ("(u8[2,2]{1,0}, /*index=1*/f8e4m3fn[3]{0}, token[])", 7),
        ("f32[<=4]{0}", 16),
    ],
)
def test_sizes_of_types(type_, size):
    assert array_bytes(type_) == size


def test_kernels_of_libraries_count_as_often_as_they_run():
    kernel = '  %attention = f32[4]{0} custom-call(), custom_call_target="__cudnn$fmhaSoftmax"\n'
    hlo = LOOP
    for line in ("  %i = ", "  %zero = "):  # in the loop, and before it
        hlo = hlo.replace(line, kernel + line)

    assert custom_calls(hlo) == {"__cudnn$fmhaSoftmax": 5 + 1}
    assert custom_calls(TPU) == {}  # within a fusion it is no kernel of its own
