"""Operations of a TPU for the matrix products of a program, in full tiles.

Features lie along 128 lanes and rows along 8 sublanes; what does not fill them is computed as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax

LANES, SUBLANES = 128, 8


def padded_flops(program: Any, steps: int = 1) -> int:
    """Operations of all matrix products and convolutions of a jaxpr, in full tiles.

    A loop's body counts as often as it runs, `steps` times where that is an input of the program; a
    multiply-add is two operations.
    """
    total = 0
    for equation in getattr(program, "jaxpr", program).eqns:
        if equation.primitive.name == "dot_general":
            total += _product(equation)
        elif equation.primitive.name == "conv_general_dilated":
            total += _convolution(equation)
        loops = {"scan": equation.params.get("length"), "while": steps}
        times = loops.get(equation.primitive.name, 1)
        total += times * sum(padded_flops(inner, steps) for inner in _inner(equation.params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation calls."""
    for value in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(value, "eqns"):
            yield value


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _tiles(rows: int, columns: int, contracted: int) -> int:
    """A product's operations; either side of it may be the one along the lanes."""
    sides = min(
        _up(rows, SUBLANES) * _up(columns, LANES), _up(columns, SUBLANES) * _up(rows, LANES)
    )
    return 2 * sides * _up(contracted, LANES)


def _product(equation: Any) -> int:
    a, b = (variable.aval.shape for variable in equation.invars)
    (contracted, b_contracted), (batch, b_batch) = equation.params["dimension_numbers"]

    def size(shape: tuple[int, ...], without: tuple[int, ...]) -> int:
        return math.prod(n for axis, n in enumerate(shape) if axis not in without)

    one = _tiles(
        size(a, (*contracted, *batch)),
        size(b, (*b_contracted, *b_batch)),
        math.prod(a[axis] for axis in contracted),
    )
    return math.prod(a[axis] for axis in batch) * one


def _convolution(equation: Any) -> int:
    kernel, (out,) = equation.invars[1].aval.shape, (v.aval.shape for v in equation.outvars)
    numbers = equation.params["dimension_numbers"]
    out_batch, out_features, *positions = (out[axis] for axis in numbers.out_spec)
    _, in_features, *taps = (kernel[axis] for axis in numbers.rhs_spec)
    # Features that fill no tile share one with those of the other taps. So does the batch, which is
    # what the gradient of a kernel sums over.
    contracted = math.prod(taps) * (_up(in_features, LANES) if in_features > LANES else in_features)
    return _tiles(out_batch * math.prod(positions), out_features, contracted)
