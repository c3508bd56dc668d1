"""The variants in Paddle, eager."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from common import (
    CONCAT,
    MAP,
    OURS,
    PLAIN,
    TRAINING,
    Array,
    Call,
    Shape,
    data,
    event_seconds,
    wall_seconds,
)
from coordconv.backends import paddle as adapter

import paddle  # isort: skip  # after the adapter, which keeps its warning quiet
from paddle import Tensor, nn  # isort: skip


class Concat(nn.Layer):
    """The definition, with a grid made beforehand, repeated for the batch and for each group."""

    def __init__(self, shape: Shape, grid: Tensor, options: dict[str, Any]) -> None:
        super().__init__()
        self.groups, self.last = shape.groups, shape.channels_last
        self.conv = getattr(nn, f"Conv{shape.rank}D")(
            shape.fused_channels, shape.out, **shape.options, **options
        )
        lead = [shape.batch] if shape.groups == 1 else [shape.batch, shape.groups]
        grid = grid.expand([*lead, *grid.shape])
        self.register_buffer("grid", grid.transpose([0, 2, 3, 1]) if self.last else grid)

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return self.conv(paddle.concat([x, self.grid], -1 if self.last else 1))
        grouped = x.reshape([x.shape[0], self.groups, -1, *x.shape[2:]])
        return self.conv(paddle.concat([grouped, self.grid], 2).flatten(1, 2))


class PositionBias(nn.Layer):
    """The map alone: the one place that knows how the adapter makes it."""

    def __init__(self, layer: Any, shape: Shape) -> None:
        super().__init__()
        self.layer, self.size = layer, shape.size

    def forward(self, x: Tensor) -> Tensor:
        geometry = self.layer._conv_geometry(self.size)
        made = self.layer._map_arguments(geometry, self.size)
        return self.layer._position_bias(*made, x.dtype)


class Paddle:
    """See :class:`common.Framework`."""

    def __init__(self, device: str) -> None:
        self.device = device
        paddle.device.set_device("gpu" if device == "cuda" else device)

    def calls(self, shape: Shape, mode: str) -> dict[str, Call]:
        given, dtype = data(shape), getattr(paddle, shape.dtype)
        channels = shape.channels, shape.out
        options = {"data_format": "NHWC"} if shape.channels_last else {}
        plain = getattr(nn, f"Conv{shape.rank}D")(*channels, **shape.options, **options)
        concat = Concat(shape, paddle.to_tensor(given.grid), options)
        ours = getattr(adapter, f"CoordConv{shape.rank}D")(*channels, **shape.options, **options)
        _set(plain, given.plain)
        _set(concat.conv, given.fused)
        _set(ours, given.ours)
        layers = {PLAIN: plain, CONCAT: concat, OURS: ours}
        if mode == MAP:
            layers = {PLAIN: plain, MAP: PositionBias(ours, shape)}
        x = paddle.to_tensor(np.moveaxis(given.x, 1, -1) if shape.channels_last else given.x)
        x = x.astype(dtype)
        for layer in layers.values():
            layer.to(dtype=dtype)
        if mode != TRAINING:
            return {name: partial(_forward, layer, x) for name, layer in layers.items()}
        x.stop_gradient = False
        dy = paddle.randn(plain(x).shape).astype(dtype)
        return {name: partial(_step, layer, x, dy) for name, layer in layers.items()}

    def seconds(self, call: Call, loops: int) -> float:
        if self.device == "cpu":
            return wall_seconds(call, loops, lambda result: None)
        start, end = (paddle.device.Event(enable_timing=True) for _ in range(2))
        return event_seconds(call, loops, start, end)

    def array(self, output: Tensor, shape: Shape) -> Array:
        array = output.astype("float64").numpy()
        return np.moveaxis(array, -1, 1) if shape.channels_last else array


def _set(layer: nn.Layer, arrays: dict[str, Array]) -> None:
    for name, parameter in layer.named_parameters():
        parameter.set_value(arrays[name])


@paddle.no_grad()
def _forward(layer: nn.Layer, x: Tensor) -> Tensor:
    return layer(x)


def _step(layer: nn.Layer, x: Tensor, dy: Tensor) -> list[Tensor]:
    return paddle.grad(layer(x), [x, *layer.parameters()], dy)


def framework(name: str, device: str) -> Paddle:
    return Paddle(device)
