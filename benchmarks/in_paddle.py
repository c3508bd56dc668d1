"""The variants in Paddle, eager."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from common import (
    CONCAT,
    FUSED,
    PLAIN,
    TRAINING,
    VARIANTS,
    Array,
    Call,
    Data,
    Shape,
    data,
    event_seconds,
    forced,
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
            shape.all_channels, shape.out, **shape.options, **options
        )
        lead = [shape.batch] if shape.groups == 1 else [shape.batch, shape.groups]
        grid = grid.expand([*lead, *grid.shape])
        self.register_buffer("grid", grid.transpose([0, 2, 3, 1]) if self.last else grid)

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return self.conv(paddle.concat([x, self.grid], -1 if self.last else 1))
        grouped = x.reshape([x.shape[0], self.groups, -1, *x.shape[2:]])
        return self.conv(paddle.concat([grouped, self.grid], 2).flatten(1, 2))


def layer(variant: str, shape: Shape, given: Data) -> nn.Layer:
    """A variant; all have the same weights."""
    options = {"data_format": "NHWC"} if shape.channels_last else {}
    if variant == CONCAT:
        module = Concat(shape, paddle.to_tensor(given.grid), options)
        conv = module.conv
    else:
        source, kind = (nn, "Conv") if variant == PLAIN else (adapter, "CoordConv")
        cls = getattr(source, f"{kind}{shape.rank}D")
        module = conv = cls(shape.channels, shape.out, **shape.options, **options)
    arrays = given.weights(variant)
    for name, parameter in conv.named_parameters():
        parameter.set_value(arrays[name])
    module = module.to(dtype=getattr(paddle, shape.dtype))
    if variant == FUSED:
        module.eval()
        return module.fuse(shape.size)
    return module


class Paddle:
    """See :class:`common.Framework`."""

    def __init__(self, device: str) -> None:
        self.device = device
        paddle.device.set_device("gpu" if device == "cuda" else device)

    def calls(self, shape: Shape, mode: str, variants: Sequence[str] = VARIANTS) -> dict[str, Call]:
        given, dtype = data(shape), getattr(paddle, shape.dtype)
        layers = {v: layer(v, shape, given) for v in variants}
        x = paddle.to_tensor(np.moveaxis(given.x, 1, -1) if shape.channels_last else given.x)
        x = x.astype(dtype)
        run: Any = partial(_forward, x=x)
        if mode == TRAINING:
            x.stop_gradient = False
            dy = paddle.randn(layers[PLAIN](x).shape).astype(dtype)
            run = partial(_step, x=x, dy=dy)
        return {name: forced(name, partial(run, module)) for name, module in layers.items()}

    def seconds(self, call: Call, loops: int) -> float:
        if self.device == "cpu":
            return wall_seconds(call, loops, lambda result: None)
        start, end = (paddle.device.Event(enable_timing=True) for _ in range(2))
        return event_seconds(call, loops, start, end)

    def array(self, output: Tensor, shape: Shape) -> Array:
        array = output.astype("float64").numpy()
        return np.moveaxis(array, -1, 1) if shape.channels_last else array


@paddle.no_grad()
def _forward(layer: nn.Layer, x: Tensor) -> Tensor:
    return layer(x)


def _step(layer: nn.Layer, x: Tensor, dy: Tensor) -> list[Tensor]:
    return paddle.grad(layer(x), [x, *layer.parameters()], dy)


def framework(name: str, device: str) -> Paddle:
    return Paddle(device)
