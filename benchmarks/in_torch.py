"""The variants in torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
from coordconv.backends import torch as adapter


class Concat(nn.Module):
    """The definition, with a grid made beforehand, repeated for the batch and for each group."""

    def __init__(self, shape: Shape, grid: Tensor) -> None:
        super().__init__()
        self.groups = shape.groups
        self.conv = getattr(nn, f"Conv{shape.rank}d")(
            shape.all_channels, shape.out, **shape.options
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


def layer(variant: str, shape: Shape, given: Data, device: str) -> nn.Module:
    """A variant; all have the same weights."""
    if variant == CONCAT:
        module = Concat(shape, torch.tensor(given.grid))
        conv = module.conv
    else:
        source, kind = (nn, "Conv") if variant == PLAIN else (adapter, "CoordConv")
        cls = getattr(source, f"{kind}{shape.rank}d")
        module = conv = cls(shape.channels, shape.out, **shape.options)
    arrays = given.weights(variant)
    conv.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    module = module.to(**_like(shape, device))
    return conv.eval().fuse(shape.size) if variant == FUSED else module


def _like(shape: Shape, device: str) -> dict[str, Any]:
    layout = {"memory_format": torch.channels_last} if shape.channels_last else {}
    return {"device": device, "dtype": getattr(torch, shape.dtype), **layout}


class Torch:
    """See :class:`common.Framework`. Compiled, a layer is a block with the ReLU that follows it."""

    def __init__(self, device: str, compiled: bool) -> None:
        self.device, self.compiled = device, compiled

    def modules(self, shape: Shape, variants: Sequence[str]) -> tuple[dict[str, Any], Tensor]:
        """The variants, compiled or not, and the input."""
        given = data(shape)
        modules: dict[str, Any] = {v: layer(v, shape, given, self.device) for v in variants}
        if self.compiled:
            torch.compiler.reset()  # else earlier shapes count against the limit of recompiling
            for name, module in modules.items():
                block = nn.Sequential(module, nn.ReLU())
                modules[name] = torch.compile(block, fullgraph=True, dynamic=False)
        return modules, torch.tensor(given.x).to(**_like(shape, self.device))

    def calls(self, shape: Shape, mode: str, variants: Sequence[str] = VARIANTS) -> dict[str, Call]:
        modules, x = self.modules(shape, variants)
        run: Any = partial(_forward, x=x)
        if mode == TRAINING:
            x.requires_grad_()
            with torch.no_grad():
                dy = torch.randn_like(modules[PLAIN](x))
            run = partial(_step, x=x, dy=dy)
        return {name: forced(name, partial(run, module)) for name, module in modules.items()}

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
