"""Options of torch convolutions as :class:`~coordconv.geometry.ConvGeometry`, and back.

Torch pads both ends of an axis alike, but for ``padding="same"``, which takes no stride. Its
convolutions have no ``input_dilation``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from coordconv import windows
from coordconv.geometry import ConvGeometry, check_input
from coordconv.tape import is_distributed
from coordconv.windows import Window

_geometry = lru_cache(maxsize=256)(ConvGeometry)


def check(input: Any, rank: int, channels: int | None = None, coords: int = 0) -> None:
    """Say what is wrong with an input; a tracer's unknown sizes are left to torch."""
    if not isinstance(input, Tensor):
        return
    if not (input.is_floating_point() or input.is_complex()):
        instead = ""
        if input.is_quantized:
            instead = ": eager mode leaves this layer in float, PT2E and prepare_fx quantize it"
        raise TypeError(f"input must be floating-point, got {input.dtype}{instead}")
    if channels is not None and is_distributed(input):
        placements: Any = input.placements  # type: ignore[attr-defined]  # of a DTensor
        axes = [each.dim for each in placements if each.is_shard()]
        if any(axis >= input.dim() - rank for axis in axes):  # torch convolves each part by itself
            raise ValueError(
                "input must not be a DTensor that is split along a spatial axis, got "
                f"{placements}: exchange the rows at the edges yourself, and pass window="
            )
    if all(type(n) is int for n in input.shape):
        axis = -1 - rank
        check_input(
            input.shape, rank=rank, channels=channels, coords=coords, channel_axis=axis, batched=0
        )


windows.TRACERS.append(torch.compiler.is_compiling)


def traced(window: Any) -> Any:
    """A layer's window; of a layer that torch.fx traces by itself, none, which the graph checks."""
    if isinstance(window, torch.fx.Proxy):
        check_no_window(window)
        return None
    return window


@torch.fx.wrap
def check_no_window(window: Any) -> None:
    """Raise ValueError if a graph that was traced without a window is given one."""
    if window is not None:
        raise ValueError("window must be entered where torch.fx traces the layer, got one later")


torch.fx.node.has_side_effect(check_no_window)  # so that nobody takes it out of a graph


def window(given: Window | None, input: Any, rank: int) -> Window | None:
    """The window of an input, checked; None if there is none, or one that is the whole frame."""
    found = windows.current(given)
    if found is None:
        return None
    batch = 1 if input.dim() == rank + 1 else input.shape[0]
    if torch.compiler.is_compiling():
        # One sample goes together with any number, and others with no other number, there, too.
        found.check(rank, 1 if batch == 1 else None)
        return found
    found.check(rank, batch if type(batch) is int else None)
    return None if found.is_whole(rank) else found


def plain_class(layer: Any) -> Any:
    """Torch's own class of a layer, or of a convolution."""
    return getattr(nn, f"Conv{'Transpose' if layer.transposed else ''}{len(layer.kernel_size)}d")


def geometry(layer: Any) -> ConvGeometry:
    """The geometry of a torch convolution, as its attributes are now."""
    make = ConvGeometry if torch.compiler.is_compiling() else _geometry  # compilers warn of caches
    return make(
        layer.kernel_size,
        layer.stride,
        0 if layer.padding == "valid" else layer.padding,
        layer.dilation,
        layer.groups,
        layer.transposed,
        layer.output_padding,
        padding_mode=layer.padding_mode,
    )


def output_padding(layer: Any, shape: Sequence[int], output_size: Sequence[int]) -> tuple[int, ...]:
    """The output padding of a transposed layer that gives an output of that size, or ValueError.

    The ``shape`` is the input's, the whole one; ``output_size`` may be so, too, or be spatial.
    """
    if len(output_size) not in (layer.rank, len(shape)):
        raise ValueError(
            f"output_size must have {layer.rank} or {len(shape)} elements, got {tuple(output_size)}"
        )
    shape, wanted = shape[-layer.rank :], tuple(output_size)[-layer.rank :]
    usual = geometry(layer).lengths(shape)
    least = tuple(n - p for n, p in zip(usual, layer.output_padding, strict=True))
    extra = tuple(m - n for m, n in zip(wanted, least, strict=True))
    if any(not 0 <= e < s for e, s in zip(extra, layer.stride, strict=True)):
        most = tuple(n + s - 1 for n, s in zip(least, layer.stride, strict=True))
        raise ValueError(
            f"output_size must be from {least} to {most} for an input of spatial shape "
            f"{tuple(shape)}, got {wanted}"
        )
    return extra


def arguments(geometry: ConvGeometry) -> dict[str, Any]:
    """The arguments of a torch convolution with this geometry, or NotImplementedError."""
    kernel, stride, dilation, output_padding, holes = geometry.per_axis
    if max(holes) > 1:
        raise NotImplementedError("torch convolutions have no input_dilation")
    padding: Any = geometry.padding
    if padding != "same":
        if any(before != after for before, after in padding):
            raise NotImplementedError("torch convolutions pad both ends of an axis alike")
        padding = tuple(before for before, _ in padding)
        if min(padding) < 0:
            raise NotImplementedError("torch convolutions take no negative padding")
    elif max(stride) > 1:
        raise NotImplementedError("torch convolutions with stride have no padding='same'")
    extra = {"output_padding": output_padding} if geometry.transposed else {}
    return {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": geometry.groups,
        "padding_mode": geometry.padding_mode,
        **extra,
    }
