"""What a network costs: its layers, parameters and memory, as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coordconv.networks import Conv, Network, ReLU, get


@dataclass(frozen=True)
class SummaryRow:
    """A line of a summary: shapes with the batch first, ``parameters`` the layer's own."""

    layer: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class Summary:
    """A row per layer, and sizes in MB of 2**20 bytes, float32.

    ``forward_backward_mb`` counts the output of every row twice: of the pass forward, and back.
    """

    network: str
    batch: int
    rows: tuple[SummaryRow, ...]
    parameters: int
    input_mb: float
    forward_backward_mb: float
    parameters_mb: float
    total_mb: float


def summary(name: str | Network, batch: int = 1) -> Summary:
    """The per-layer table of a network.

    A CoordConv is two rows: the convolution inside it, whose input has the coordinate channels
    behind the features of each group, and the layer around it. ReLU is not counted. ValueError for
    an unknown network, or a batch below 1.

    Example:
        >>> s = summary("coord_cnn", 64)
        >>> s.parameters, round(s.forward_backward_mb, 2), round(s.total_mb, 2)
        (160065, 26.09, 27.45)
    """
    network = get(name)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    rows = []
    for layer, before, after in network.shapes():
        if isinstance(layer, ReLU):
            continue
        count = sum(map(math.prod, layer.weight_shapes().values()))
        seen, made = (batch, *before), (batch, *after)
        if isinstance(layer, Conv) and layer.coords:
            appended = (batch, before[0] + layer.geometry.groups * len(layer.coords), *before[1:])
            inner = layer.kind.removeprefix("Coord")
            rows.append(SummaryRow(f"{layer.name}.conv", inner, appended, made, count))
            count = 0
        rows.append(SummaryRow(layer.name, layer.kind, seen, made, count))
    parameters = sum(row.parameters for row in rows)
    outputs = sum(math.prod(row.output_shape) for row in rows)
    numbers = (batch * math.prod(network.input_shape), 2 * outputs, parameters)
    given, passed, kept = (4 * number / 2**20 for number in numbers)
    total = given + passed + kept
    return Summary(network.name, batch, tuple(rows), parameters, given, passed, kept, total)
