"""Collectives and memory traffic of a compiled program, read from its text.

XLA's own counts take a loop's body once; here it counts as often as it runs: as XLA knows or, where
the number of steps is an input of the program, as `steps` says.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple


class Instruction(NamedTuple):
    """A line of a compiled program."""

    name: str
    result: str  # its type: one array or a tuple
    operation: str
    operands: list[str]  # names; of a constant, its value
    rest: str  # attributes


class Computation(NamedTuple):
    """A function of a compiled program."""

    name: str
    is_entry: bool
    instructions: list[Instruction]


class Collective(NamedTuple):
    """All collectives of a kind: how many run, and the bytes of their arrays."""

    count: int
    bytes: int


COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# They move nothing themselves.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}
FREE |= {"conditional", "after-all", "partition-id", "replica-id", "opt-barrier"}
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|(?:branch|called)_computations|(?:true|false)_computation)="
    r"(\{[^}]*\}|%[\w.-]+)"
)
PARTIAL = {"slice", "dynamic-slice", "gather"}  # they read no more than they give


def computations(hlo: str) -> dict[str, Computation]:
    """The functions of a compiled program's text, by name."""
    found: dict[str, Computation] = {}
    current = None
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            current = Computation(header[2], header[1] is not None, [])
            found[current.name] = current
            continue
        match = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)?(.*)", line)
        if match and current:
            name, result, operation, operands, rest = match.groups()
            names = re.findall(r"%([\w.-]+)", operands) or [operands]
            current.instructions.append(Instruction(name, result, operation, names, rest))
    return found


def loop_length(found: dict[str, Computation], loop: Instruction, steps: int) -> int:
    """How often a loop's body runs, or `steps` where its length is not known.

    A TPU's program does not say it, but its condition compares a counter from 0 with a constant.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%([\w.-]+)", loop.rest)
    if condition is None:
        return steps
    instructions = found[condition[1]].instructions
    values = {i.name: i.operands[0] for i in instructions if i.operation == "constant"}
    compared = instructions[-1]
    if compared.operation != "compare" or "direction=LT" not in compared.rest:
        return steps
    length = values.get(compared.operands[-1], "")
    return int(length) if length.isdigit() else steps


def runs(found: dict[str, Computation], steps: int, *, inside_fusions: bool) -> Counter[str]:
    """How often each function runs."""
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in found[name].instructions:
            if instruction.operation == "while":
                inner = count * loop_length(found, instruction, steps)
            elif inside_fusions or instruction.operation in ("call", "conditional"):
                inner = count
            else:
                continue
            for callees in CALLED.findall(instruction.rest):
                for callee in re.findall(r"%([\w.-]+)", callees):
                    visit(callee, inner)

    for computation in found.values():
        if computation.is_entry:
            visit(computation.name, 1)
    return times


def array_bytes(type_: str, *, in_hbm: bool = False) -> int:
    """The bytes of the arrays in a type; `in_hbm` leaves out those in a TPU's other memories."""
    total = 0
    for name, shape, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", type_):
        if in_hbm and re.search(r"S\([1-9]\d*\)", layout):
            continue
        bits = 8 if name == "pred" else int((re.search(r"\d+", name) or "0")[0])
        sizes = [int(size.lstrip("<=")) for size in shape.split(",") if size]
        total += math.prod(sizes) * bits // 8
    return total


def collectives(hlo: str, steps: int = 1) -> dict[str, Collective]:
    """The collectives that one device takes part in, by kind, in a compiled program's text.

    Bytes are those of the complete array: of an all-gather's result, of a reduce-scatter's operand.
    What is begun and ended apart is counted at its end. TPU programs hold parts of one collective
    in several fusions, known by one channel, and a reduce-scatter as an all-reduce in a fusion of
    that name.
    """
    found = computations(hlo)
    times = runs(found, steps, inside_fusions=True)
    sizes = {i.name: array_bytes(i.result) for c in found.values() for i in c.instructions}
    counted: dict[str, Collective] = {}
    channels = set()
    for computation in found.values():
        for instruction in computation.instructions:
            kind = instruction.operation.removesuffix("-done")
            if kind not in COLLECTIVES or not times[computation.name]:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            if channel and (kind, channel[1]) in channels:
                continue
            channels.add((kind, channel and channel[1]))
            size = array_bytes(instruction.result)
            if kind == "reduce-scatter" and instruction.operation == kind:
                size = sum(sizes.get(name, 0) for name in instruction.operands)
            if computation.name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            before, number = counted.get(kind, Collective(0, 0)), times[computation.name]
            counted[kind] = Collective(before.count + number, before.bytes + number * size)
    return counted


def memory_traffic(hlo: str, steps: int = 1) -> int:
    """The bytes between one device and its memory, in a compiled program's text.

    Each instruction reads its operands and writes its result, and fusions are one instruction. Of
    a TPU, arrays that stay in its vector memory are left out.
    """
    found = computations(hlo)
    times = runs(found, steps, inside_fusions=False)
    total = 0
    for computation in found.values():
        if not times[computation.name]:
            continue
        sizes = {i.name: array_bytes(i.result, in_hbm=True) for i in computation.instructions}
        for instruction in computation.instructions:
            operation = instruction.operation
            read = sum(sizes.get(name, 0) for name in set(instruction.operands))
            written = sizes[instruction.name]
            if operation in FREE:
                continue
            if operation.endswith("-start"):  # its result holds its operands as well
                moved = read
            elif operation.endswith("-done"):
                moved = written
            elif operation in PARTIAL:
                moved = 2 * written
            else:
                moved = read + written
            total += times[computation.name] * moved
    return total


def custom_calls(hlo: str, steps: int = 1) -> Counter[str]:
    """How often each kernel of a library runs, by its target: `__cudnn$fmhaSoftmax`."""
    found = computations(hlo)
    times = runs(found, steps, inside_fusions=False)
    called: Counter[str] = Counter()
    for computation in found.values():
        for instruction in computation.instructions:
            target = re.search(r'custom_call_target="([^"]+)"', instruction.rest)
            if target and times[computation.name]:
                called[target[1]] += times[computation.name]
    return called
