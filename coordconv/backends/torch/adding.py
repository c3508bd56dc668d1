"""Torch's hand in append and map.

Two kinds of inputs are told apart. For a plain tensor of known shape the coordinates are constants
that NumPy made, kept on the tensor's device for the next call. For every other input (a compiler's,
an exporter's, a tracer's, a tensor subclass) torch makes the coordinates in the graph, by the same
formula, so that they follow a size that may be unknown.
"""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from coordconv import position_bias
from coordconv.backends.torch import options
from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array, channel_values
from coordconv.position_bias import MapPlan, of_each, plain
from coordconv.tape import is_distributed, replicated
from coordconv.windows import Window

_CONVOLVE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}
_LOW_PRECISION = (torch.float16, torch.bfloat16)

# Torch 2.4 has no such function, and cannot tell a program that is exported from a compiled one. In
# it a range of floats has a symbolic length that its shapes do not understand.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
_ARANGE_OF_FLOATS = hasattr(torch.compiler, "is_exporting")
# Before, the compiler could not be asked what it knows of a size.
_COMPILER_TELLS = torch.__version__ >= "2.8"


def is_known(x: Any) -> bool:
    """Whether ``x`` is a plain tensor of known shape, outside of a compiler."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]  # which makes shapes tensors
    )


def is_low_precision(kernel: Any, dtype: torch.dtype) -> bool:
    """Whether a convolution with this kernel is computed in 16 bits.

    ``dtype`` is the kernel's; a tracer's stand-in for the kernel does not know it.
    """
    # Autocast leaves float64 and complex numbers alone.
    if dtype != torch.float32 or not isinstance(kernel, Tensor):
        return dtype in _LOW_PRECISION
    device = kernel.device.type
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def _has_autocast(device: str) -> bool:
    # The compiler of torch 2.4 cannot ask; what compilers compile for has it.
    if torch.compiler.is_compiling():
        return device != "meta"
    return torch.amp.is_autocast_available(device)


def has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has values in memory, as those inside of ``torch.func`` have not."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def choose(
    geometry: ConvGeometry, coords: Coordinates, x: Any, channels: int, out: int, low: bool
) -> str:
    """Append or map, for an input ``(N, C, *S)`` or ``(C, *S)``."""
    batch = positions = None
    single = x.dim() == geometry.rank + 1
    compiled = torch.compiler.is_compiling() and not _is_exporting()
    if compiled or is_known(x):
        batch = 1 if single else x.shape[0]
        positions = math.prod(geometry.lengths(x.shape[-geometry.rank :]))
        sizes = channels, out, batch, positions
        if compiled and not _are_compared(*position_bias.costs(geometry, len(coords), *sizes)):
            # One graph for all sizes, but for a batch of one: compilers make another of it anyway.
            batch = 1 if single or x.shape[0] == 1 else position_bias.USUAL_BATCH
            positions = position_bias.USUAL_POSITIONS
    elif _is_exporting() and not geometry.transposed:
        _warn_of_quantizers()
    given = geometry, coords, channels, out
    way = position_bias.choose(*given, batch=batch, positions=positions, low_precision=low)
    if _is_quantizing(x) and (way != position_bias.APPEND or geometry.transposed):
        # Its operators take no convolution of a constant grid, and those of its engine x86 get
        # transposed convolutions of other numbers of channels in and out wrong, plain ones too.
        raise NotImplementedError(
            "prepare_fx quantizes no CoordConv that is transposed, grouped, in 16 bits "
            'or outside="extend": use PT2E, or list its class as "non_traceable_module_class"'
        )
    return way


def _are_compared(append: Any, map: Any) -> bool:
    """Whether a compiler knows which cost is the lower one of the sizes that a program is for.

    Where it does not, to compare them would make the program one for these sizes alone.
    """
    return _COMPILER_TELLS and (
        statically_known_true(append < map) or statically_known_true(append >= map)
    )


def _is_quantizing(x: Any) -> bool:
    """Whether a layer is traced by FX graph mode quantization."""
    tracer = type(x.tracer).__module__ if isinstance(x, torch.fx.Proxy) else ""
    return tracer.startswith("torch.ao.quantization")


def _warn_of_quantizers() -> None:
    """Say so if a layer is exported in a way that torchao's quantizers leave it in float.

    These, X86InductorQuantizer and its subclasses, find convolutions by function in a program of
    strict export, and in any other by the very class of the module.
    """
    strict = torch.compiler.is_dynamo_compiling()
    if not strict and "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer" in sys.modules:
        warnings.warn(
            "X86InductorQuantizer leaves a CoordConv of this program in float: "
            "export with strict=True, or fuse the network first",
            stacklevel=2,
        )


class OwnChannels:
    """Constants for a graph of what NumPy alone computes: functions and given maps.

    A compiler calls this method of a layer, and takes its result for a constant; to a function it
    could not pass coordinates.
    """

    coords: Coordinates

    @torch.compiler.assume_constant_result
    def own_grid(
        self,
        shape: tuple[int, ...],
        lengths: tuple[int, ...] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """What is convolved for a map of ``lengths``, or for None what is appended."""
        plan = plain(self.coords, shape)
        if lengths is not None:
            conv = getattr(self, "conv", self)  # of a fused layer
            plan = MapPlan(options.geometry(conv), self.coords, shape, lengths)
        return _kept(MapPlan.padded_grid, plan, dtype, device)


def _has_own(coords: Coordinates) -> bool:
    """Whether there are functions or given maps.

    By their key, which a compiler then looks at in every call: it compares no functions and no
    maps, and two layers that differ in these alone would get the constants of the first.
    """
    return coords.own_key != ""


def append(layer: Any, x: Any, rank: int, groups: int = 1, window: Window | None = None) -> Any:
    """The input ``(N, C, *S)`` or ``(C, *S)`` with the coordinates behind each group's features."""
    at, coords, known = -1 - rank, layer.coords, is_known(x)
    grid: Any = None
    shape = tuple(x.shape[axis] for axis in range(-rank, 0))
    if known or _has_own(coords) or window is not None:
        grid = _grid_of(layer, shape, x, known, window)
    if window is not None:
        grid = grid[0] if x.dim() == rank + 1 else grid
        grid = grid.unsqueeze(at - 1) if groups > 1 else grid
    if groups > 1:
        x = x.unflatten(at, (groups, -1))
    if grid is not None:
        parts = [grid.expand(*x.shape[:at], len(coords), *shape)]
    else:  # a stack of them makes larger graphs
        zeros = torch.zeros_like(x.narrow(at, 0, 1))  # has the batch, whatever it is
        exact = _wide(zeros)
        values = channel_values(coords, [_arange(n, exact) for n in shape], shape, torch.sqrt)
        if exact is not zeros:
            values = [v.to(x.dtype) for v in values]
        parts = [zeros + v for v in values]
    x = torch.cat([x, *parts], at)
    return x.flatten(at - 1, at) if groups > 1 else x


def add_map(
    layer: Any,
    geometry: ConvGeometry,
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
    plan, known = MapPlan(geometry, layer.coords, shape, lengths), is_known(x) and is_known(output)
    with _no_autocast(kernel, low):
        # What NumPy alone computes is one constant. Every tool that programs are exported for has a
        # convolution, and not every one an einsum.
        whole = not known and (_has_own(layer.coords) or _is_exported(x))
        divided = (None, plan) if whole else plan.divided(out if known else None)
        if known and not divided[1] and _is_one_without_gradient(output, kernel, low):
            # P would be as large as the output, and is never made.
            tables = _made(MapPlan.tables, plan, kernel, known)
            left, right = plan.as_product(kernel, tables, torch.einsum, out)
            output.view(len(left), -1).addmm_(left, right)
            return output
        return add(output, _position_bias(plan, kernel, divided, out, known, layer), low)


def add_map_of_window(
    layer: Any,
    geometry: ConvGeometry,
    output: Any,
    x: Any,
    kernel: Any,
    low: bool,
    window: Window,
) -> Any:
    """As :func:`add_map`, of inputs that show parts of their frames."""
    kernel = kernel.float() if low else kernel
    shape, lengths = (tuple(t.shape[a] for a in range(-geometry.rank, 0)) for t in (x, output))
    plan, known = MapPlan(geometry, layer.coords, shape, lengths), is_known(x) and is_known(output)
    convolution = _CONVOLVE[geometry.rank]
    with _no_autocast(kernel, low):
        if not plan.is_affine:
            grids = _made(MapPlan.padded_grid, plan, kernel, known, window=window)
            bias = plan.convolve(kernel, grids, convolution)
        else:

            def convolve(channel: int, grids: Any) -> Any:
                return plan.convolve(kernel[:, channel : channel + 1], grids, convolution)

            maps = torch.stack(plan.maps(_made(MapPlan.basis, plan, kernel, known), convolve))
            factors = _made(MapPlan.coefficients, plan, kernel, known, window=window)
            if torch.compiler.is_compiling():
                # A compiler fuses the sum with what P is added to; for a product of matrices it
                # would copy the output into the order of that.
                ones = (1,) * (kernel.dim() - 1)
                parts = zip(factors.unbind(1), maps, strict=True)
                bias = sum(factor.reshape(-1, *ones) * each for factor, each in parts)
            elif not low and output.dim() == kernel.dim() and factors.shape[0] != 1:
                given = output.flatten(1), factors, maps.flatten(1)
                if known and output.is_contiguous() and _is_constant(output, kernel, factors):
                    given[0].addmm_(*given[1:])  # a view
                    return output
                return torch.addmm(*given).view(output.shape)
            else:
                bias = (factors @ maps.flatten(1)).unflatten(1, maps.shape[1:])
        return add(output, bias[0] if output.dim() < kernel.dim() else bias, low)


def add_pointwise(
    layer: Any, x: Any, kernel: Any, bias: Any, low: bool, window: Window | None
) -> Any:
    """An input, and what a pointwise convolution makes of its coordinates, rounded once."""
    kernel, bias = (t.float() if low and t is not None else t for t in (kernel, bias))
    rank = layer.rank
    shape = tuple(x.shape[axis] for axis in range(-rank, 0))
    with _no_autocast(kernel, low):
        grid = _grid_of(layer, shape, kernel, is_known(x), window)
        added = (kernel.flatten(1) @ grid.flatten(-rank)).unflatten(-1, shape)
        added = added if bias is None else added + bias.reshape(-1, *(1,) * rank)
        added = added[0] if window is not None and x.dim() == rank + 1 else added
        return (x + added).to(x.dtype)


def _grid_of(layer: Any, shape: Any, like: Any, known: bool, window: Window | None) -> Any:
    """The coordinates of an input, ``(n, *S)``, in the type and on the device of ``like``.

    In the frame of a window ``(N, n, *S)``, ``N`` being 1 for all samples.
    """
    if known and window is None:
        return _grid(layer.coords, shape, like.dtype, like.device)
    plan = plain(layer.coords, shape)
    if window is None:
        grid = _made(MapPlan.padded_grid, plan, like, known, layer)
        # The compiler does not know the size of a constant.
        return grid.expand(-1, *shape) if _has_own(layer.coords) else grid
    return _made(MapPlan.padded_grid, plan, _wide(like), known, window=window).to(like.dtype)


def _wide(x: Any) -> Any:
    """A tensor in float32 at least, in which coordinates are computed, to be rounded once."""
    return x.float() if isinstance(x, Tensor) and x.dtype in _LOW_PRECISION else x


def _converted(value: Any, like: Tensor) -> Tensor:
    """A number or an array of a window, in the type and on the device of a tensor."""
    if isinstance(value, (int, float)):
        return torch.full((), value, device=like.device, dtype=like.real.dtype)
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return replicated(tensor.to(like.device, like.real.dtype), like)  # type: ignore[no-any-return]


def _is_exported(x: Any) -> bool:
    """Whether a program is made of the layer for another tool, and not for torch's compiler."""
    if torch.compiler.is_compiling():
        return _is_exporting()
    return torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)  # type: ignore[attr-defined]


def add(output: Any, bias: Any, low: bool) -> Any:
    """A convolution's own output and P, rounded once."""
    if low:
        return (output + bias).to(output.dtype)
    # In place: to allocate another tensor of this size takes longer than to fill it. The gradient
    # of a convolution does not need its output.
    return output.add_(bias) if is_known(output) else output + bias


def constant_map(plan: MapPlan, kernel: Tensor, low: bool) -> Tensor:
    """P of a known shape, for a layer whose kernel does not change."""
    with torch.inference_mode(False), torch.no_grad(), _no_autocast(kernel, low):
        kernel = kernel.float() if low else kernel
        out = len(kernel)
        return _position_bias(plan, kernel, plan.divided(out), out, known=True)


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
    shape, out = tuple(x.shape[2:]), len(coordinates)
    plan = MapPlan(geometry, coords, shape, shape)
    added = _position_bias(plan, coordinates, plan.divided(out), out, known=True)
    return multiplied(x, features, bias, added)


def multiplied(x: Tensor, features: Tensor, bias: Tensor | None, added: Tensor) -> Tensor:
    """The product of :func:`product`, with P ``(out, *S)`` as it is ``added``."""
    added = added.flatten(1) if bias is None else added.flatten(1) + bias[:, None]
    matrix = features.flatten(1).expand(x.shape[0], -1, -1)
    return torch.baddbmm(added, matrix, x.flatten(2)).unflatten(2, x.shape[2:])


def _is_one_without_gradient(output: Tensor, kernel: Tensor, low: bool) -> bool:
    """Whether a product can be added to the output of one sample in place.

    With a gradient autograd copies the output's, since the product is added to a view of it.
    """
    return (
        not low
        and output.numel() == len(kernel) * math.prod(output.shape[2 - kernel.dim() :])
        and output.is_contiguous()
        and _is_constant(output, kernel)
    )


def _is_constant(*tensors: Tensor) -> bool:
    """Whether a product of tensors can be added to the first in place: none takes a gradient."""
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return has_storage(tensors[0]) and not differentiable  # vmap has no such product


def _position_bias(
    plan: MapPlan, kernel: Any, divided: Any, out: int, known: bool, layer: Any = None
) -> Any:
    """P, of what :func:`_made` makes."""

    def contract(axes: MapPlan, part: Any) -> Any:
        tables = _made(MapPlan.tables, axes, kernel, known)
        return axes.contract(part, tables, torch.einsum, out)

    def convolve(others: MapPlan, part: Any) -> Any:
        grid = _made(MapPlan.padded_grid, others, kernel, known, layer)
        return others.convolve(part, grid[None], _CONVOLVE[plan.geometry.rank])[0]

    return plan.position_bias(kernel, divided, contract, convolve, _picked)


def _made(
    method: Callable[..., Any],
    plan: MapPlan,
    like: Any,
    known: bool,
    layer: Any = None,
    window: Window | None = None,
) -> Any:
    """What a method of a plan makes, in the type and on the device of ``like``.

    Kept if the size is ``known``, and else made in the graph. Channels that NumPy alone computes
    are a constant of the graph, for which the ``layer`` is asked; with a window they refuse it.
    """
    frame: tuple[Any, ...] = ()
    if window is not None:
        if known and _has_own(plan.coords):
            return torch.from_numpy(method(plan, np.arange, np, window.in_frame)).to(like)
        frame = (partial(window.in_frame, convert=partial(_converted, like=like)),)
    elif known:
        return _kept(method, plan, like.dtype, like.device)
    elif _has_own(plan.coords):
        lengths = None if plan.geometry.pointwise else _fixed(plan.lengths)
        given = _fixed(plan.shape), lengths, like.dtype, like.device
        return replicated(layer.own_grid(*given), like)
    made = method(plan, lambda n: _arange(n, like), torch, *frame)
    return of_each(lambda tensor: tensor.to(like.dtype), made)


def _fixed(lengths: Sequence[Any]) -> tuple[int, ...]:
    """Lengths as ints, which a graph is then made for alone: NumPy makes constants of them."""
    # torch.jit would fix them and say nothing; torch.fx does not know them.
    if torch.jit.is_tracing() or isinstance(lengths[0], torch.fx.Proxy):  # type: ignore[attr-defined]
        raise ValueError(
            "torch.jit.trace and torch.fx take no coordinates that are functions or given maps, "
            "which NumPy computes for a size that is known: use torch.export"
        )
    return tuple(operator.index(n) for n in lengths)


def _arange(n: Any, like: Any) -> Any:
    # The older exporter to ONNX has no ``real``; torch.fx does not know what it is.
    dtype = like.dtype
    if not isinstance(like, Tensor) or like.is_complex():
        dtype = like.real.dtype
    if isinstance(n, torch.fx.Proxy) and not _ARANGE_OF_FLOATS:
        raise NotImplementedError(
            "this release of torch.fx traces no range of unknown length: a newer torch does"
        )
    if _ARANGE_OF_FLOATS:
        ramp = torch.arange(n, dtype=dtype, device=like.device)
    else:
        ramp = torch.arange(n, device=like.device).to(dtype)
    return replicated(ramp, like)


def _picked(kernel: Any, channels: list[int]) -> Any:
    if is_distributed(kernel):  # which takes no list as an index
        return torch.cat([kernel.narrow(1, channel, 1) for channel in channels], 1)
    return kernel[:, channels]


def _no_autocast(kernel: Any, low: bool) -> AbstractContextManager[Any]:
    if low and isinstance(kernel, Tensor) and _has_autocast(kernel.device.type):
        return torch.autocast(kernel.device.type, enabled=False)
    return nullcontext()


@lru_cache(maxsize=64)
def _kept(
    method: Callable[..., Any], plan: MapPlan, dtype: torch.dtype, device: torch.device
) -> Any:
    # The tensors alone are kept, and not NumPy's arrays as well.
    made = position_bias.computed(method, plan, _exact(dtype))
    return of_each(partial(_constant, dtype=dtype, device=device), made)


@lru_cache(maxsize=64)
def _grid(
    coords: Coordinates, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A grid that is kept, and found without a plan: small layers append it in every call."""
    return _kept(MapPlan.padded_grid, plain(coords, shape), dtype, device)  # type: ignore[no-any-return]


def _exact(dtype: torch.dtype) -> Any:
    return np.float64 if dtype in (torch.float64, torch.complex128) else np.float32


def _constant(array: Array, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The array as a tensor that may be kept.

    Made in a thread of its own, where none of the caller's modes and transformations is on: a
    tensor of inference_mode is of no use in training, and one of torch.func's of none afterwards.
    """

    def make() -> Tensor:
        return torch.from_numpy(array.copy()).to(dtype).to(device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
