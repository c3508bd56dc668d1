"""How far 16-bit layers are from the float64 reference, on maps of growing width.

python benchmarks/precision.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from operator import itemgetter

import numpy as np

import common
from common import CONCAT, INFERENCE, OURS, PLAIN, Array, Shape, console
from coordconv import Coordinates
from coordconv.reference import Reference

TARGET = 1.1  # ours, over what is allowed
WIDTHS = (64, 128, 256, 512, 1024, 2048)
SIGNIFICAND = {"bfloat16": 8, "float16": 11}  # bits, the leading one included

# How large the kernel's part for coordinates is beside that for features: as drawn, and where
# position decides.
SCALES = (1.0, 16.0)


@dataclass(frozen=True)
class Error:
    """Errors of one layer's output, by a norm: root mean square, or the largest.

    ``allowed`` is that of the exact result rounded once, and of the plain convolution besides.
    """

    framework: str
    dtype: str
    coord_scale: float
    width: int
    norm: str
    allowed: float
    concat: float
    ours: float


def _rms(array: Array) -> float:
    return float(np.sqrt(np.mean(array**2)))


def _largest(array: Array) -> float:
    return float(np.abs(array).max())


NORMS = {"rms": _rms, "max": _largest}


def rounded(array: Array, dtype: str) -> Array:
    """The nearest values of a floating-point type, none of them subnormal there."""
    mantissa, exponent = np.frexp(array)
    scale = 2.0 ** SIGNIFICAND[dtype]
    return np.ldexp(np.rint(mantissa * scale) / scale, exponent)


@cache
def exact(shape: Shape) -> tuple[Array, Array]:
    """The reference's output with coordinates, and without."""
    given, coords = common.data(shape), Coordinates.resolve(None, shape.rank)
    with_coords, plain = Reference(shape.geometry, coords), Reference(shape.geometry)
    return (
        with_coords.forward(given.x, given.weight, given.bias),
        plain.forward(given.x, given.features, given.bias),
    )


def errors(name: str, device: str, shape: Shape) -> Iterator[Error]:
    """The errors of one layer, by norm."""
    framework = common.framework(name, device)
    calls = framework.calls(shape, INFERENCE)
    outputs = {variant: framework.array(call(), shape) for variant, call in calls.items()}
    reference, plain = exact(shape)
    for norm, size in NORMS.items():
        yield Error(
            name,
            shape.dtype,
            shape.coord_scale,
            shape.size[-1],
            norm,
            size(rounded(reference, shape.dtype) - reference) + size(outputs[PLAIN] - plain),
            size(outputs[CONCAT] - reference),
            size(outputs[OURS] - reference),
        )


def print_errors(found: Sequence[Error]) -> None:
    """The table of one framework and type; ``found`` alternates between the norms."""
    columns = (c for norm in NORMS for c in (f"{norm} allowed", "concat", "ours"))
    title = f"{found[0].framework}, {found[0].dtype}: errors over the allowed one"
    table = common.table(title, "coord scale, width", *columns)
    for i in range(0, len(found), len(NORMS)):
        cells = []
        for e in found[i : i + len(NORMS)]:
            colour = "green" if e.ours <= TARGET * e.allowed else "red"
            cells += [f"{e.allowed:.2e}", f"{e.concat / e.allowed:.2f}"]
            cells += [f"[{colour}]{e.ours / e.allowed:.2f}[/]"]
        table.add_row(f"{e.coord_scale:g}, {e.width}", *cells)
    console.print(table)


def main(
    device: common.DeviceOption = "cpu",
    frameworks: common.FrameworksOption = None,
    json_file: common.JsonOption = None,
) -> None:
    """Compare CoordConv and concatenation in 16 bits with the float64 reference.

    Allowed is the error of rounding the exact result once and that of the plain convolution
    together; the target for CoordConv is at most 1.1 times that. Inputs and weights have few
    bits, so that every type holds them exactly and only the computation differs.
    """
    # A compiled block ends in a ReLU; Paddle convolves in 16 bits on a GPU alone.
    unable = {"torch-compiled"} | ({"paddle-eager"} if device == "cpu" else set())
    names = [n for n in common.chosen_frameworks(frameworks) if n not in unable]
    if not names:
        raise common.fail(f"--frameworks: nothing to compare in {' or '.join(sorted(unable))}")
    shapes = [
        Shape(1, 16, 16, (16, width), 3, dtype=dtype, coord_scale=scale)
        for dtype in SIGNIFICAND
        for scale in SCALES
        for width in WIDTHS
    ]
    found: list[Error] = []
    with common.progress() as progress:
        for name, shape in progress.track([*product(names, shapes)], description="layers"):
            found += errors(name, device, shape)
    for name, dtype in product(names, SIGNIFICAND):
        print_errors([e for e in found if (e.framework, e.dtype) == (name, dtype)])
    for norm in NORMS:
        ratio, worst = max(
            ((e.ours / e.allowed, e) for e in found if e.norm == norm), key=itemgetter(0)
        )
        console.print(
            f"ours/allowed at worst, {norm}: {ratio:.3f}, the target {TARGET} "
            f"({worst.framework}, {worst.dtype}, {worst.width} wide)"
        )
    if json_file is not None:
        common.write_json(json_file, device, found)


if __name__ == "__main__":
    common.run(main)
