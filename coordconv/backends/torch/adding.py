"""Torch's hand in append and map.

Two kinds of inputs are told apart. For a plain tensor of known shape the coordinates are constants
that NumPy made, kept on the tensor's device for the next call. For every other input (a compiler's,
an exporter's, a tracer's, a tensor subclass) torch makes the coordinates in the graph, by the same
formula, so that they follow a size that may be unknown.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coordconv import position_bias
from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array, channel_values, coordinate_grid

_CONVOLVE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}
_LOW_PRECISION = (torch.float16, torch.bfloat16)


def is_known(x: Any) -> bool:
    """Whether ``x`` is a plain tensor of known shape, outside of a compiler."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and all(type(n) is int for n in x.shape)  # torch.jit.trace makes tensors of them
    )


def is_low_precision(kernel: Any, dtype: torch.dtype) -> bool:
    """Whether a convolution with this kernel is computed in 16 bits.

    ``dtype`` is the kernel's; a tracer's stand-in for the kernel does not know it.
    """
    # Autocast leaves float64 and complex numbers alone.
    if dtype != torch.float32 or not isinstance(kernel, Tensor):
        return dtype in _LOW_PRECISION
    device = kernel.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def choose(
    geometry: ConvGeometry, coords: Coordinates, x: Any, channels: int, out: int, low: bool
) -> str:
    """Append or map, for an input ``(N, C, *S)`` or ``(C, *S)``."""
    batch = positions = None
    single = x.dim() == geometry.rank + 1
    if is_known(x):
        batch = 1 if single else x.shape[0]
        positions = math.prod(geometry.lengths(x.shape[-geometry.rank :]))
    elif torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # One graph for all sizes, but for a batch of one, of which compilers make another anyway.
        batch = 1 if single or x.shape[0] == 1 else position_bias.USUAL_BATCH
        positions = position_bias.USUAL_POSITIONS
    return position_bias.choose(
        geometry,
        coords,
        channels,
        out,
        batch=batch,
        positions=positions,
        low_precision=low,
    )


def append(coords: Coordinates, x: Any, rank: int, groups: int = 1) -> Any:
    """The input ``(N, C, *S)`` or ``(C, *S)`` with the coordinates behind each group's features."""
    at = -1 - rank
    if groups > 1:
        x = x.unflatten(at, (groups, -1))
    if is_known(x):
        grid = _grid(coords, tuple(x.shape[-rank:]), x.dtype, x.device)
        parts = [grid.expand(*x.shape[:at], *grid.shape)]
    else:
        zeros = torch.zeros_like(x.narrow(at, 0, 1))  # has the batch, whatever it is
        shape = [x.shape[axis] for axis in range(-rank, 0)]
        positions = [_arange(n, x) for n in shape]
        parts = [zeros + v for v in channel_values(coords, positions, shape, torch.sqrt)]
    x = torch.cat([x, *parts], at)
    return x.flatten(at - 1, at) if groups > 1 else x


def add_map(
    geometry: ConvGeometry,
    coords: Coordinates,
    output: Any,
    x: Any,
    kernel: Any,
    out: int,
    low: bool,
) -> Any:
    """A convolution's output and P, of the coordinates' part ``(out, n, *k)``, rounded once."""
    if low:  # neighbouring coordinates may be the same number in 16 bits
        kernel = kernel.float()
    shape, lengths = (tuple(t.shape[a] for a in range(-geometry.rank, 0)) for t in (x, output))
    with _no_autocast(kernel, low):
        if not (is_known(x) and is_known(output)):
            bias = _traced_map(geometry, coords, shape, lengths, kernel, out)
            return (output + bias).to(output.dtype) if low else output + bias
        axes, others = position_bias.divide(geometry, coords, out, math.prod(lengths))
        if axes and not others and _is_one_without_gradient(output, kernel, low):
            # P would be as large as the output, and is never made.
            tables = _tables(geometry, axes, shape, lengths, kernel.dtype, kernel.device)
            left, right = position_bias.as_product(kernel, tables, torch.einsum)
            output.view(len(left), -1).addmm_(left, right)
            return output
        bias = _known_map(geometry, coords, shape, lengths, kernel)
        if low:
            return (output + bias).to(output.dtype)
        # In place: to allocate another tensor of this size takes longer than to fill it. The
        # gradient of a convolution does not need its output.
        return output.add_(bias)


def is_product(geometry: ConvGeometry, x: Any, kernel: Any, low: bool) -> bool:
    """Whether several samples of a pointwise convolution are computed by :func:`product`.

    On a CPU ``torch.baddbmm``, which adds P as it goes, takes less than a convolution and a pass
    over its output, unless there are many channels: docs/performance.md has the measurements.
    """
    return (
        geometry.pointwise
        and position_bias.FORCED != position_bias.APPEND
        and not low
        and is_known(x)
        and x.dim() == geometry.rank + 2
        and x.shape[0] > 1
        and x.shape[1] <= 64
        and x.device.type == "cpu"
        and x.dtype == kernel.dtype in (torch.float32, torch.float64)
        and x.is_contiguous()
    )


def product(
    geometry: ConvGeometry,
    coords: Coordinates,
    x: Tensor,
    features: Tensor,
    bias: Tensor | None,
    coordinates: Tensor,
) -> Tensor:
    """A pointwise layer as a product of matrices for each sample, to which P is added."""
    shape = tuple(x.shape[2:])
    added = _known_map(geometry, coords, shape, shape, coordinates).flatten(1)
    if bias is not None:
        added = added + bias[:, None]
    matrix = features.flatten(1).expand(x.shape[0], -1, -1)
    return torch.baddbmm(added, matrix, x.flatten(2)).unflatten(2, shape)


def _is_one_without_gradient(output: Tensor, kernel: Tensor, low: bool) -> bool:
    """Whether a product can be added to the output of one sample in place.

    With a gradient autograd copies the output's, since the product is added to a view of it.
    """
    return (
        not low
        and output.numel() == len(kernel) * math.prod(output.shape[2 - kernel.dim() :])
        and output.is_contiguous()
        and torch.func.debug_unwrap(output, recurse=False) is output  # vmap has no such product
        and not (torch.is_grad_enabled() and (output.requires_grad or kernel.requires_grad))
    )


def _known_map(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[int, ...],
    lengths: tuple[int, ...],
    kernel: Tensor,
) -> Any:
    axes, others = position_bias.divide(geometry, coords, len(kernel), math.prod(lengths))
    like: tuple[Any, ...] = kernel.dtype, kernel.device
    bias: Any = None
    if axes:
        tables = _tables(geometry, axes, shape, lengths, *like)
        part = position_bias.picked(kernel, coords, axes)
        bias = position_bias.contract(part, tables, torch.einsum)
    if others:
        grid = _padded_grid(geometry, others, shape, lengths, *like)
        part = _convolved(geometry, grid, position_bias.picked(kernel, coords, others))
        bias = part if bias is None else bias.add_(part)
    return bias


def _traced_map(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[Any, ...],
    lengths: tuple[Any, ...],
    kernel: Any,
    out: int,
) -> Any:
    def arange(n: Any) -> Any:
        return _arange(n, kernel)

    axes, others = position_bias.divide(geometry, coords, out, None)
    bias = None
    if axes:
        found = position_bias.axis_tables(geometry, axes, shape, lengths, arange)
        tables = [torch.stack(each).to(kernel.dtype) for each in found]
        part = position_bias.picked(kernel, coords, axes)
        sizes = out, len(axes), *geometry.kernel
        bias = position_bias.contract(part, tables, torch.einsum, sizes)
    if others:
        values = position_bias.padded_values(geometry, others, shape, lengths, arange, torch.sqrt)
        whole = position_bias.padded_shape(geometry, shape, lengths)
        grid = torch.stack([value.expand(whole) for value in values]).to(kernel.dtype)
        part = _convolved(geometry, grid, position_bias.picked(kernel, coords, others))
        bias = part if bias is None else bias + part
    return bias


def _convolved(geometry: ConvGeometry, grid: Any, kernel: Any) -> Any:
    """P as the convolution of a padded grid."""
    rank = geometry.rank
    if geometry.transposed:
        kernel = kernel.flip(tuple(range(-rank, 0)))
    stride, dilation = position_bias.map_stride(geometry), geometry.per_axis.dilation
    return _CONVOLVE[rank](grid[None], kernel, None, stride, 0, dilation)[0]


def _arange(n: Any, like: Any) -> Any:
    ramp = torch.arange(n, dtype=like.real.dtype, device=like.device)
    distributed: Any = sys.modules.get("torch.distributed.tensor")  # slow to import
    if distributed is not None and isinstance(like, distributed.DTensor):
        # Torch refuses to mix the two kinds of tensors. This one is the same on every device.
        return distributed.DTensor.from_local(ramp, like.device_mesh, run_check=False)
    return ramp


def _no_autocast(kernel: Any, low: bool) -> AbstractContextManager[Any]:
    if low and isinstance(kernel, Tensor) and torch.amp.is_autocast_available(kernel.device.type):
        return torch.autocast(kernel.device.type, enabled=False)
    return nullcontext()


def _cached(make: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the last few constants that a function makes, but for a tracer's stand-ins."""
    kept = lru_cache(maxsize=64)(make)

    def get(*args: Any) -> Any:
        found = kept(*args)
        if type(found if isinstance(found, Tensor) else found[0]) is not Tensor:
            kept.cache_clear()
        return found

    get.cache_info, get.cache_clear = kept.cache_info, kept.cache_clear  # type: ignore[attr-defined]
    return get


@_cached
def _grid(
    coords: Coordinates, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return _constant(coordinate_grid(shape, coords, dtype=_exact(dtype)), dtype, device)


@_cached
def _padded_grid(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[int, ...],
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    grid = position_bias.padded_grid(geometry, coords, shape, lengths, _exact(dtype))
    return _constant(grid, dtype, device)


@_cached
def _tables(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[int, ...],
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, ...]:
    tables = position_bias.known_tables(geometry, coords, shape, lengths, _exact(dtype))
    return tuple(_constant(table, dtype, device) for table in tables)


def _exact(dtype: torch.dtype) -> Any:
    return np.float64 if dtype in (torch.float64, torch.complex128) else np.float32


def _constant(array: Array, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made within it is of no use in training
        tensor = torch.from_numpy(array.copy()).to(device=device, dtype=dtype)
    # Inside a transformation of torch.func it is wrapped, and of no use after.
    return torch.func.debug_unwrap(tensor)
