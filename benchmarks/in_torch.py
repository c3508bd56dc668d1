"""The variants in torch, eager and compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common import (
    CONCAT,
    INFERENCE,
    MAP,
    OURS,
    PLAIN,
    TRAINING,
    Array,
    Call,
    Data,
    Shape,
    data,
    event_seconds,
    wall_seconds,
)
from coordconv.backends import torch as adapter


class Concat(nn.Module):
    """The definition, with a grid made beforehand, repeated for the batch and for each group."""

    def __init__(self, shape: Shape, grid: Tensor) -> None:
        super().__init__()
        self.groups = shape.groups
        self.conv = getattr(nn, f"Conv{shape.rank}d")(
            shape.fused_channels, shape.out, **shape.options
        )
        lead = (shape.batch,) if shape.groups == 1 else (shape.batch, shape.groups)
        layout = torch.channels_last if shape.channels_last else torch.contiguous_format
        expanded = grid.expand(*lead, *grid.shape)
        self.grid = nn.Buffer(expanded.contiguous(memory_format=layout))

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            z = torch.cat([x, self.grid], 1)
        else:
            z = torch.cat([x.unflatten(1, (self.groups, -1)), self.grid], 2).flatten(1, 2)
        return self.conv(z)


class PositionBias(nn.Module):
    """The map alone: the one place that knows how the adapter makes it."""

    def __init__(self, layer: Any, shape: Shape) -> None:
        super().__init__()
        self.layer = layer
        self.output_shape = shape.geometry.output_shape(shape.size)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        shapes = tuple(x.shape[2:]), self.output_shape
        kernel, options = layer.coord_weight, layer._options
        if torch.compiler.is_compiling():
            grad = torch.is_grad_enabled()
            made_for = options, layer.coords.to_dict(), shapes
            return adapter._traced_position_bias(kernel, *made_for, not grad)
        arrays = adapter._constants(options, layer.coords, *shapes, kernel.dtype, kernel.device)
        return adapter._position_bias(kernel, arrays)


def layers(shape: Shape, given: Data, device: str) -> dict[str, nn.Module]:
    """Plain, concatenated and ours, with the same weights."""
    channels = shape.channels, shape.out
    built: dict[str, tuple[nn.Module, dict[str, Array]]] = {
        PLAIN: (getattr(nn, f"Conv{shape.rank}d")(*channels, **shape.options), given.plain),
        CONCAT: (
            Concat(shape, torch.tensor(given.grid)),
            {f"conv.{name}": array for name, array in given.fused.items()},
        ),
        OURS: (getattr(adapter, f"CoordConv{shape.rank}d")(*channels, **shape.options), given.ours),
    }
    for module, arrays in built.values():
        tensors = {name: torch.tensor(array) for name, array in arrays.items()}
        module.load_state_dict(tensors, strict=False)  # not the grid
    return {name: module.to(**_like(shape, device)) for name, (module, _) in built.items()}


def _like(shape: Shape, device: str) -> dict[str, Any]:
    layout = {"memory_format": torch.channels_last} if shape.channels_last else {}
    return {"device": device, "dtype": getattr(torch, shape.dtype), **layout}


def tensor(shape: Shape, given: Data, device: str) -> Tensor:
    """The input."""
    return torch.tensor(given.x).to(**_like(shape, device))


class Torch:
    """See :class:`common.Framework`. Compiled, a layer is a block with the ReLU that follows it."""

    def __init__(self, device: str, compiled: bool) -> None:
        self.device, self.compiled = device, compiled

    def modules(self, shape: Shape, mode: str = INFERENCE) -> tuple[dict[str, nn.Module], Tensor]:
        """The variants and the input."""
        given = data(shape)
        modules, x = layers(shape, given, self.device), tensor(shape, given, self.device)
        if mode == MAP:
            modules = {PLAIN: modules[PLAIN], MAP: PositionBias(modules[OURS], shape)}
        if self.compiled:
            torch._dynamo.reset()  # else the shapes before count against its limit of recompiling
            for name, module in modules.items():
                block = module if name == MAP else nn.Sequential(module, nn.ReLU())
                modules[name] = torch.compile(block, fullgraph=True, dynamic=False)  # type: ignore[assignment]
        return modules, x

    def calls(self, shape: Shape, mode: str) -> dict[str, Call]:
        modules, x = self.modules(shape, mode)
        if mode != TRAINING:
            return {name: partial(_forward, module, x) for name, module in modules.items()}
        x.requires_grad_()
        with torch.no_grad():
            dy = torch.randn_like(modules[PLAIN](x))
        return {name: partial(_step, module, x, dy) for name, module in modules.items()}

    def seconds(self, call: Call, loops: int) -> float:
        if self.device == "cpu":
            return wall_seconds(call, loops, lambda result: None)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        return event_seconds(call, loops, start, end)

    def array(self, output: Tensor, shape: Shape) -> Array:
        return output.double().cpu().numpy()


@torch.inference_mode()
def _forward(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _step(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Forward, and backward to the input and every parameter; nothing is accumulated."""
    return torch.autograd.grad(module(x), (x, *module.parameters()), dy)


def framework(name: str, device: str) -> Torch:
    return Torch(device, compiled=name == "torch-compiled")
