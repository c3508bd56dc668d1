"""CoordConv for PyTorch: subclasses of ``torch.nn``'s own convolutions.

Each layer takes what its base class takes, in the same order and with the same defaults, and has
one parameter more: ``coord_weight`` of shape ``(out_channels, n, *kernel_size)``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache, partial, reduce
from io import BytesIO
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coordconv import networks
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.geometry import ConvGeometry, check_input
from coordconv.grid import Array, coordinate_grid
from coordconv.position_bias import MOST_SUMS, Share, factors, position_bias, shares
from coordconv.recording import (
    Model,
    Names,
    Recording,
    given_gradients,
    in_order,
    input_names,
)
from coordconv.weights import Weights, checked, replace_file, split_channels, split_state

_PLAIN = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_CONVOLVE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}

_AS_IT_IS: AbstractContextManager[Any] = nullcontext()  # one for all calls

COMPILED = False  # what most users do


class _CoordConv(nn.modules.conv._ConvNd):
    """What every CoordConv adds to the convolution it is mixed into.

    Args:
        coords: the coordinate channels: tokens such as ``"xyr"``, a
            :class:`~coordconv.Coordinates`, or None for all axes. Keyword only.
        coord_init: ``"fan_in"`` draws both kernels as the base class draws one over
            ``in_channels + n`` channels; ``"zeros"`` draws the feature kernel as the base class
            does and starts the coordinate kernel at zero. Keyword only.

    ``load_state_dict`` takes the layer's own state, and another implementation's: one kernel over
    features and coordinates, of each group if there are groups, under ``weight`` or
    ``conv.weight``. A plain convolution's loads with ``strict=False`` and leaves ``coord_weight``
    alone. A lazy layer cannot tell these two apart before its first input, and takes the latter.

    Raises:
        TypeError, ValueError: as :class:`~coordconv.Coordinates`, and from ``forward``: an input
            that is not floating-point, or of the wrong rank, channels or an empty axis.
    """

    rank: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        *args: Any,
        coords: CoordinatesLike = None,
        coord_init: str = "fan_in",
        **kwargs: Any,
    ) -> None:
        coordinates = Coordinates.resolve(coords, self.rank)
        check_coord_init(coord_init)
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        self.coords = coordinates
        self.coord_init = coord_init
        shape = (out_channels, len(coordinates), *self.kernel_size)
        self.coord_weight = nn.Parameter(self.weight.new_empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, as ``coord_init`` says."""
        if "coord_weight" not in self._parameters or not self.in_channels:
            return  # called by the base constructor, or of a lazy layer: too early to draw
        if self.coord_init == "zeros":
            super().reset_parameters()
            nn.init.zeros_(self.coord_weight)
            return
        plain: Any = next(base for base in type(self).__mro__ if base in _PLAIN)
        drawn = plain(
            self.in_channels + self.groups * len(self.coords),
            self.out_channels,
            self.kernel_size,
            groups=self.groups,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            features = self.in_channels // self.groups
            weight, coord_weight = split_channels(
                drawn.weight, features, self.groups, self.transposed
            )
            self.weight.copy_(weight)
            self.coord_weight.copy_(coord_weight)
            if self.bias is not None:
                self.bias.copy_(drawn.bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        weight = self._parameters.get("weight")  # None if parametrized
        if weight is not None and not nn.parameter.is_lazy(weight):
            split_state(
                state_dict,  # a copy of the caller's
                prefix,
                weight.shape,
                len(self.coords),
                self.groups,
                self.transposed,
                nested="conv" not in self._modules,
                copy=torch.clone,  # for assign=True
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The convolution of ``input (N, C, *S)``, or ``(C, *S)``, and of the coordinates."""
        _check_dtype(input)
        shape = check_input(
            input.shape,
            rank=self.rank,
            channels=self.in_channels,
            coords=len(self.coords),
            channel_axis=-1 - self.rank,
            batched=0,
        )
        options = self._options
        if torch.compiler.is_compiling():
            return self._traced(input, shape, options, *args, **kwargs)
        kernel = _at_least_float32(self.coord_weight)
        like = kernel.dtype, kernel.device
        if input.shape[0] > 1 and self._is_product(input, kernel):
            arrays = _constants(options, self.coords, shape, shape, *like)
            return _product(input, self.weight, self.bias, _position_bias(kernel, arrays))
        output = super().forward(input, *args, **kwargs)
        shapes = shape, output.shape[-self.rank :]
        return _add(output, kernel, _constants(options, self.coords, *shapes, *like))

    def _traced(
        self,
        input: Tensor,
        shape: tuple[int, ...],
        options: tuple[Any, ...],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """``forward`` for a compiler, which fuses what it is given."""
        kernel = self.coord_weight
        made_for = kernel, options, self.coords.to_dict()
        trained = torch.is_grad_enabled() and kernel.requires_grad
        sums = not torch.is_grad_enabled() and self.in_channels <= MOST_SUMS
        # A product of one sample is the slower way without gradients, and the faster one with them.
        if (trained or sums or input.shape[0] > 1) and self._is_product(input, kernel):
            bias = _traced_position_bias(*made_for, (shape, shape), not trained)
            return (_sums if sums else _product)(input, self.weight, self.bias, bias)
        output = super().forward(input, *args, **kwargs)
        # In training, to compute sums for each of several samples is the slower.
        fused = not trained or output.dim() == self.rank + 1 or output.shape[0] == 1
        shapes = shape, output.shape[-self.rank :]
        return (output + _traced_position_bias(*made_for, shapes, fused)).to(output.dtype)

    @property
    def _options(self) -> tuple[Any, ...]:
        """What :func:`_geometry` takes."""
        return (
            self.kernel_size,
            self.stride,
            0 if self.padding == "valid" else self.padding,
            self.dilation,
            self.groups,
            self.transposed,
            self.padding_mode,
        )

    def _is_product(self, input: Tensor, kernel: Tensor) -> bool:
        """Whether a pointwise convolution of several samples is faster as a product of matrices.

        On a CPU, ``torch.baddbmm``, which adds the map as it goes, was the faster unless there are
        many channels, or many beside the positions: docs/performance.md.
        """
        return (
            max(self.kernel_size) == 1  # first, what most layers are not
            and 0 < self.in_channels <= min(512, 2 * math.prod(input.shape[2:]))
            and _pointwise(self._options)
            and input.device.type == "cpu"
            and input.dim() == self.rank + 2
            and input.dtype == kernel.dtype in (torch.float32, torch.float64)
            and input.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
            # torch.func's tensors may lack an axis that it maps over, but not where it is compiled
            and (torch.compiler.is_compiling() or not _within_func())
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, coords={self.coords!r}"

    def export_weights(self) -> Weights:
        """The canonical weights: ``weight``, ``coord_weight`` and, if there is one, ``bias``."""
        arrays = {"weight": self.weight, "coord_weight": self.coord_weight, "bias": self.bias}
        return Weights(
            {name: _numpy(tensor) for name, tensor in arrays.items() if tensor is not None},
            {"": self.coords},
        )

    def import_weights(self, mapping: Mapping[str, Array]) -> None:
        """Take canonical weights.

        Raises:
            ValueError: arrays are missing, unexpected or wrongly shaped, or were made for other
                coordinates; all are listed and nothing is changed.
        """
        _import(self, mapping, {"": self.coords})


def _check_dtype(input: Tensor) -> None:
    if not (input.is_floating_point() or input.is_complex()):
        raise TypeError(f"input must be floating-point, got {input.dtype}")


def _at_least_float32(kernel: Tensor) -> Tensor:
    return kernel.float() if kernel.dtype in (torch.float16, torch.bfloat16) else kernel


def _product(input: Tensor, weight: Tensor, bias: Tensor | None, map: Tensor) -> Tensor:
    """A convolution of one tap, and the ``map`` that is added to each sample."""
    map = map.flatten(1) if bias is None else map.flatten(1) + bias[:, None]
    matrix = weight.flatten(1).expand(input.shape[0], -1, -1)
    return torch.baddbmm(map, matrix, input.flatten(2)).unflatten(2, input.shape[2:])


def _sums(input: Tensor, weight: Tensor, bias: Tensor | None, map: Tensor) -> Tensor:
    """As :func:`_product`, for few channels, in one pass that a compiler makes of it."""
    if bias is not None:
        map = map + bias.reshape(-1, *(1,) * (map.dim() - 1))
    channels = range(input.shape[1])
    return reduce(add, (weight[:, c] * input[:, c, None] for c in channels), map)


def _within_func() -> bool:
    """Whether ``torch.func`` transforms this, so that tensors may lack the axes it maps over."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _add(output: Tensor, kernel: Tensor, arrays: tuple[Share, ...]) -> Tensor:
    """A convolution's ``output``, and what the coordinates add to it, rounded once.

    In place, since another tensor as large costs more to allocate than to fill; the convolution's
    gradient does not need its output.
    """
    with _no_autocast(kernel.device.type):
        if _within_func():
            return (output + _position_bias(kernel, arrays)).to(output.dtype)
        if _is_one_large_map(output, kernel, arrays):
            return _AddProduct.apply(output, *factors(kernel, arrays[0]), arrays[0].where)  # type: ignore[no-any-return]
        return output.add_(_position_bias(kernel, arrays))


def _is_one_large_map(output: Tensor, kernel: Tensor, arrays: tuple[Share, ...]) -> bool:
    """Whether a map would be as large as the output, and is a product that can be added to it.

    Of 4 MiB and more, allocating the map costs more than the rest; below, calling Python in the
    backward pass does.
    """
    return (
        output.numel() >= 2**20
        and output.numel() == len(kernel) * math.prod(arrays[0].shape)
        and len(arrays) == 1
        and arrays[0].last is not None
        and output.is_contiguous()
        and output.dtype == kernel.dtype
    )


class _AddProduct(torch.autograd.Function):
    """``output + left @ right``, in place; autograd's own would copy gradients for the view.

    ``where`` says between which columns each row of ``right`` is not zero. To add row by row, only
    there, takes less than a product of so few terms, up to about four passes over the output; each
    row of the output that is begun costs as much as 64 of its values: docs/performance.md.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, left: Tensor, right: Tensor, where: Sequence[tuple[int, int]]
    ) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(right)
        ctx.save_for_forward(right)
        flat = output.view(len(left), -1)
        if sum(stop - start + 64 for start, stop in where) > 4 * right.shape[1]:
            flat.addmm_(left, right)
            return output
        for j, (start, stop) in enumerate(where):
            flat[:, start:stop].addcmul_(left[:, j, None], right[j, start:stop])
        return output

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (right,) = ctx.saved_tensors
        output, left, *_ = tangents  # the output's in place, too, which autograd requires
        output.view(len(left), -1).addmm_(left, right)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (right,) = ctx.saved_tensors
        (gradient,) = gradients
        left = gradient.reshape(-1, right.shape[1]) @ right.T if ctx.needs_input_grad[1] else None
        return gradient, left, None, None


def _position_bias(kernel: Tensor, arrays: tuple[Share, ...], **options: bool) -> Tensor:
    """What the coordinates add to each sample, in the dtype of ``kernel``."""
    return position_bias(kernel, arrays, convolve=_convolve, **options)  # type: ignore[no-any-return]


# A compiler takes the graph of this from running it, so that the arrays become constants of the
# graph; NumPy and the caches, which it could not read, stay out of its sight. What it is given, a
# compiler can take: the options as plain data.
@torch._dynamo.nonstrict_trace
def _traced_position_bias(
    coord_weight: Tensor,
    options: tuple[Any, ...],
    coords: dict[str, Any],
    shapes: tuple[Sequence[int], Sequence[int]],
    fused: bool,
) -> Tensor:
    kernel = _at_least_float32(coord_weight)
    shape, output_shape = (tuple(map(int, s)) for s in shapes)  # compiled anew for each
    made_for = options, Coordinates.from_dict(coords), shape, output_shape
    with _no_autocast(kernel.device.type):
        arrays = _constants(*made_for, kernel.dtype, kernel.device)
        return _FusedMap.apply(kernel, arrays) if fused else _position_bias(kernel, arrays)  # type: ignore[no-any-return]


class _FusedMap(torch.autograd.Function):
    """The map as sums of products, for a compiler to fuse with what follows.

    Its gradient is that of products, which are products, too, and take less.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, arrays: tuple[Share, ...]) -> Tensor:
        ctx.arrays = arrays
        ctx.save_for_backward(kernel)
        # The compiler has a 2-D convolution's output channels last, and a product's as it is.
        last = len(arrays[0].shape) == 2 and any(share.fusible for share in arrays)
        last = last and not ctx.needs_input_grad[0]  # in training this was the slower
        bias = _position_bias(kernel, arrays, channels_last=last, fused=True)
        return bias.movedim(-1, 0) if last else bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (kernel,) = ctx.saved_tensors
        with torch.enable_grad():
            kernel = kernel.detach().requires_grad_()
            bias = _position_bias(kernel, ctx.arrays)
        return *torch.autograd.grad(bias, kernel, gradients), None


def _constants(*made_for: Any) -> tuple[Share, ...]:
    """The arrays of a position bias as tensors, kept for the next call if they are plain ones."""
    if torch._C._len_torch_dispatch_stack():  # tracing, which would have its own tensors kept
        return _convert(*made_for)
    return _kept(*made_for)


@lru_cache(maxsize=64)
def _kept(*made_for: Any) -> tuple[Share, ...]:
    with torch.inference_mode(False):  # what is made within it is of no use in training
        return _convert(*made_for)


def _convert(
    options: tuple[Any, ...],
    coords: Coordinates,
    shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Share, ...]:
    exact = np.float64 if dtype in (torch.float64, torch.complex128) else np.float32
    geometry = _geometry(*options).for_output(shape, tuple(output_shape))
    return tuple(
        share.converted(lambda array: torch.tensor(array, dtype=dtype, device=device))
        for share in shares(geometry, coords, shape, exact)
    )


@lru_cache(maxsize=256)
def _geometry(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: Any,
    dilation: tuple[int, ...],
    groups: int,
    transposed: bool,
    padding_mode: str,
) -> ConvGeometry:
    return ConvGeometry(
        kernel, stride, padding, dilation, groups, transposed, padding_mode=padding_mode
    )


@torch.compiler.assume_constant_result
def _pointwise(options: tuple[Any, ...]) -> bool:
    return _geometry(*options).pointwise


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    # Not on every kind of device, "meta" for one; and where it is off, this costs more than asking.
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return _AS_IT_IS


def _convolve(share: Share, kernel: Tensor) -> Tensor:
    rank = len(share.stride)
    if share.flip:
        kernel = kernel.flip(tuple(range(-rank, 0)))
    return _CONVOLVE[rank](share.padded[None], kernel, None, share.stride, 0, share.dilation)[0]


class CoordConv1d(_CoordConv, nn.Conv1d):
    """``torch.nn.Conv1d`` that sees its coordinates.

    Takes every argument of ``torch.nn.Conv1d``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        input ``(N, C, L)`` or ``(C, L)``; output as ``torch.nn.Conv1d``.

    Example:
        >>> layer = CoordConv1d(3, 8, 3, padding=1, coords="xr")
        >>> layer(torch.zeros(2, 3, 16)).shape
        torch.Size([2, 8, 16])
        >>> layer.coord_weight.shape
        torch.Size([8, 2, 3])

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank = 1


class CoordConv2d(_CoordConv, nn.Conv2d):
    """``torch.nn.Conv2d`` that sees its coordinates.

    Takes every argument of ``torch.nn.Conv2d``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        input ``(N, C, H, W)`` or ``(C, H, W)``; output as ``torch.nn.Conv2d``.

    Example:
        >>> layer = CoordConv2d(3, 8, 3, padding=1, coords="xyr")
        >>> layer(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
        >>> layer.coord_weight.shape
        torch.Size([8, 3, 3, 3])

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank = 2


class CoordConv3d(_CoordConv, nn.Conv3d):
    """``torch.nn.Conv3d`` that sees its coordinates.

    Takes every argument of ``torch.nn.Conv3d``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        input ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output as ``torch.nn.Conv3d``.

    Example:
        >>> layer = CoordConv3d(3, 8, 3, padding=1, coords="xyzr")
        >>> layer(torch.zeros(2, 3, 4, 8, 8)).shape
        torch.Size([2, 8, 4, 8, 8])
        >>> layer.coord_weight.shape
        torch.Size([8, 4, 3, 3, 3])

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank = 3


class CoordConvTranspose1d(_CoordConv, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` that sees its coordinates, those of its input.

    Takes every argument of ``torch.nn.ConvTranspose1d``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        input ``(N, C, L)`` or ``(C, L)``; output as ``torch.nn.ConvTranspose1d``.

    Example:
        >>> layer = CoordConvTranspose1d(3, 8, 3, coords="xr")
        >>> layer(torch.zeros(2, 3, 16)).shape
        torch.Size([2, 8, 18])
        >>> layer.coord_weight.shape
        torch.Size([8, 2, 3])

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank = 1


class CoordConvTranspose2d(_CoordConv, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` that sees its coordinates, those of its input.

    Takes every argument of ``torch.nn.ConvTranspose2d``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        input ``(N, C, H, W)`` or ``(C, H, W)``; output as ``torch.nn.ConvTranspose2d``.

    Example:
        >>> layer = CoordConvTranspose2d(3, 8, 3, coords="xyr")
        >>> layer(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 8, 18, 18])
        >>> layer.coord_weight.shape
        torch.Size([8, 3, 3, 3])

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank = 2


class CoordConvTranspose3d(_CoordConv, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` that sees its coordinates, those of its input.

    Takes every argument of ``torch.nn.ConvTranspose3d``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        input ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output as ``torch.nn.ConvTranspose3d``.

    Example:
        >>> layer = CoordConvTranspose3d(3, 8, 3, coords="xyzr")
        >>> layer(torch.zeros(2, 3, 4, 8, 8)).shape
        torch.Size([2, 8, 6, 10, 10])
        >>> layer.coord_weight.shape
        torch.Size([8, 4, 3, 3, 3])

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank = 3


class _LazyCoordConv(nn.modules.conv._LazyConvXdMixin):
    """What makes a CoordConv take its ``in_channels`` from its first input, as torch's do."""

    rank: int

    def __init__(
        self, out_channels: int, kernel_size: Any, *args: Any, bias: bool = True, **kwargs: Any
    ) -> None:
        # Without a bias at first: like the weight, it is made when the channels are known.
        super().__init__(0, out_channels, kernel_size, *args, bias=False, **kwargs)  # type: ignore[misc]
        made: Any = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.weight = nn.UninitializedParameter(**made)
        if bias:
            self.bias = nn.UninitializedParameter(**made)

    def initialize_parameters(self, input: Tensor, *args: Any, **kwargs: Any) -> None:
        super().initialize_parameters(input, *args, **kwargs)
        if not self.in_channels:  # nothing was left to initialise: a state was loaded
            groups = 1 if self.transposed else self.groups
            self.in_channels = self.weight.shape[0 if self.transposed else 1] * groups

    def _get_num_spatial_dims(self) -> int:
        return self.rank


class LazyCoordConv1d(_LazyCoordConv, CoordConv1d):  # type: ignore[misc]
    """:class:`CoordConv1d` whose first input says ``in_channels``."""

    cls_to_become = CoordConv1d


class LazyCoordConv2d(_LazyCoordConv, CoordConv2d):  # type: ignore[misc]
    """:class:`CoordConv2d` whose first input says ``in_channels``."""

    cls_to_become = CoordConv2d


class LazyCoordConv3d(_LazyCoordConv, CoordConv3d):  # type: ignore[misc]
    """:class:`CoordConv3d` whose first input says ``in_channels``."""

    cls_to_become = CoordConv3d


class LazyCoordConvTranspose1d(_LazyCoordConv, CoordConvTranspose1d):  # type: ignore[misc]
    """:class:`CoordConvTranspose1d` whose first input says ``in_channels``."""

    cls_to_become = CoordConvTranspose1d


class LazyCoordConvTranspose2d(_LazyCoordConv, CoordConvTranspose2d):  # type: ignore[misc]
    """:class:`CoordConvTranspose2d` whose first input says ``in_channels``."""

    cls_to_become = CoordConvTranspose2d


class LazyCoordConvTranspose3d(_LazyCoordConv, CoordConvTranspose3d):  # type: ignore[misc]
    """:class:`CoordConvTranspose3d` whose first input says ``in_channels``."""

    cls_to_become = CoordConvTranspose3d


class AddCoords(nn.Module):
    """Append the coordinate channels to an input, for layers that have no CoordConv.

    Args:
        coords: tokens, a :class:`~coordconv.Coordinates`, or None for all axes of the input.

    Shape:
        input ``(N, C, *S)`` with one to three spatial axes; output ``(N, C + n, *S)``.

    Raises:
        TypeError: the input is not floating-point.
        ValueError: the input has no spatial axes or an empty one, or lacks an axis of ``coords``.

    Example:
        >>> AddCoords("x")(torch.zeros(1, 1, 3))
        tensor([[[ 0.,  0.,  0.],
                 [-1.,  0.,  1.]]])
    """

    def __init__(self, coords: CoordinatesLike = None) -> None:
        super().__init__()
        self.coords = coords if coords is None else Coordinates.resolve(coords, 3)

    def forward(self, input: Tensor) -> Tensor:
        _check_dtype(input)
        grid = coordinate_grid(input.shape[2:], self.coords, dtype=np.float64)
        channels = torch.tensor(grid, dtype=input.dtype, device=input.device)
        return torch.cat([input, channels.expand(len(input), *channels.shape)], dim=1)

    def extra_repr(self) -> str:
        return f"coords={self.coords!r}"


class Network(nn.Sequential):
    """A :class:`coordconv.networks.Network` as a module; input ``(N, C, *S)``."""

    def __init__(self, network: networks.Network) -> None:
        super().__init__(
            OrderedDict(
                (layer.name or f"{layer.kind.lower()}{i}", _layer(layer))
                for i, layer in enumerate(network.layers)
            )
        )
        self.network = network

    def export_weights(self) -> Weights:
        """The canonical weights under dotted names."""
        arrays = {name: _numpy(tensor) for name, tensor in self.named_parameters()}
        return self.network.weights(arrays)

    def import_weights(self, mapping: Mapping[str, Array]) -> None:
        """Take canonical weights; errors as a layer's ``import_weights``, nothing changed."""
        _import(self, mapping, self.network.coordinates())


def build(
    network: networks.Network, weights: Mapping[str, Array], dtype: str = "float32"
) -> Network:
    """Build a network with these weights."""
    module = Network(network).to(getattr(torch, dtype))
    module.import_weights(weights)
    return module


def evaluate(
    module: Network,
    weights: Mapping[str, Array],
    x: Array,
    dy: Array | None = None,
    *,
    compiled: bool = COMPILED,
) -> tuple[Array, dict[str, Array]]:
    """Output and gradients; see :mod:`coordconv.backends`."""
    module.import_weights(weights)
    names, parameters = zip(*module.named_parameters(), strict=True)
    like: Any = {"dtype": parameters[0].dtype, "device": parameters[0].device}
    run: Callable[[Tensor], Tensor] = module
    if compiled:
        torch.compiler.reset()  # else what was compiled before counts towards a limit
        run = torch.compile(module, fullgraph=True)
    if dy is None:
        with torch.no_grad():
            return _numpy(run(torch.tensor(x, **like))), {}
    given = torch.tensor(x, requires_grad=True, **like)
    try:
        output = run(given)
        gradients = torch.autograd.grad(output, (given, *parameters), torch.tensor(dy, **like))
    except AssertionError as error:  # the compiled code's, of strides that it did not expect
        if "replication_pad" in str(error):
            raise NotImplementedError(
                "torch.compile fails on the gradient of replicate padding, without coordinates too"
            ) from error
        raise
    found = zip(("x", *names), gradients, strict=True)
    return _numpy(output), {name: _numpy(gradient) for name, gradient in found}


def trainer(
    module: Network, weights: Mapping[str, Array], optimizer: str = "adam", epsilon: float = 1e-8
) -> tuple[Callable[[Array, Array, float], float], Callable[[], Weights]]:
    """A training step and the weights it leaves; see :mod:`coordconv.backends`."""
    module.import_weights(weights)
    kinds: dict[str, Any] = {"adam": partial(torch.optim.Adam, eps=epsilon), "sgd": torch.optim.SGD}
    rule = kinds[optimizer](module.parameters())

    def step(x: Array, target: Array, learning_rate: float) -> float:
        for group in rule.param_groups:
            group["lr"] = learning_rate
        rule.zero_grad()
        wanted = torch.tensor(target)
        squared = wanted.is_floating_point()
        criterion = nn.functional.mse_loss if squared else nn.functional.cross_entropy
        loss = criterion(module(torch.tensor(x)), wanted)
        loss.backward()
        rule.step()
        return loss.item()

    return step, module.export_weights


def read_state(path: str) -> dict[str, Array]:
    """The arrays of a file of a state_dict; see :mod:`coordconv.backends`."""
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # it lets pass what a damaged file makes any of its parts raise
            raise ValueError(
                f"{path} is damaged, or holds other things than weights, which may be code: "
                "torch.load(weights_only=True) refuses it"
            ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        parts = state.items() if isinstance(state, Mapping) else ()
        inner = [repr(name) for name, part in parts if isinstance(part, Mapping)]
        raise ValueError(
            f"{path} holds no weights by name: write it by torch.save(module.state_dict(), path)"
            if not inner
            else f"{path} holds no weights by name, but mappings, {', '.join(inner[:5])}: write "
            f"the one with the weights by torch.save(torch.load({path!r})[{inner[0]}], 'model.pt')"
        )
    arrays = {}
    for name, tensor in state.items():
        try:
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise TypeError("it is expanded from fewer elements: save a clone() of it")
            arrays[name] = _numpy(tensor)
        except (RuntimeError, TypeError) as error:  # sparse, quantized, of 8 bits
            raise ValueError(
                f"{path} holds what NumPy arrays by name cannot: {name}: {error}"
            ) from error
    return arrays


def from_state(network: networks.Network, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The same arrays: the canonical names and layout are torch's own."""
    return dict(arrays)


def write_state(path: str, network: networks.Network, weights: Mapping[str, Array]) -> None:
    """Write the file of a state_dict; see :mod:`coordconv.backends`."""
    content = BytesIO()
    torch.save(OrderedDict((n, torch.tensor(a)) for n, a in weights.items()), content)
    replace_file(path, content.getvalue())


def recorded(
    module: nn.Module,
    *,
    names: Names = None,
    output_gradient: Array | Mapping[str, Array] | None = None,
    **kwargs: Any,
) -> Model:
    """The module as a function on NumPy arrays that returns what each module in it returned.

    It makes models for :func:`coordconv.parity.compare`; see :mod:`coordconv.backends`. The module
    runs as it is, in training or in evaluation, and is left as it was, its buffers too; what it
    draws moves torch's generator on, as in any call. Inputs that are floating-point get the type
    and the device of its first floating-point parameter. Nested, sparse and quantized tensors, and
    what runs inside a ``torch.func`` transformation or a scripted module, are not recorded.

    Args:
        module: any module.
        names: other names for the modules inside it, by those of ``named_modules()``.
        output_gradient: the output's gradient, to have gradients recorded, too.
        kwargs: what ``module`` is called with beside the inputs.

    Example:
        >>> net = nn.Sequential(CoordConv2d(3, 8, 3), nn.ReLU())
        >>> run = recorded(net, names={"0": "conv"})
        >>> {name: array.shape for name, array in run(np.ones((1, 3, 5, 5))).items()}
        {'conv': (1, 8, 3, 3), '1': (1, 8, 3, 3), 'model output': (1, 8, 3, 3)}
    """

    def run(*inputs: Array) -> Mapping[str, Array]:
        floats = [p for p in module.parameters() if p.is_floating_point()]
        like: Any = {"device": floats[0].device} if floats else {}
        given = [torch.tensor(x, **like) for x in inputs]
        if floats:
            given = [x.to(floats[0].dtype) if x.is_floating_point() else x for x in given]
        recording = Recording(names)
        graph: dict[str, Tensor] = {}  # what gradients are wanted of

        def leaf(name: str, part: Any) -> Any:
            if not isinstance(part, Tensor) or not _is_dense(part):
                return part
            recording.keep(name, _numpy(part))
            if output_gradient is None or not part.is_floating_point():
                return part
            graph[name] = part if part.requires_grad else part.detach().requires_grad_()
            return graph[name].clone()  # the model may write to what it is given

        def hook(name: str) -> Any:
            def after(_: Any, __: Any, output: Any) -> Any:
                made = recording.visit(name, output, leaf)
                return None if output_gradient is None else made

            return after

        with ExitStack() as stack, torch.set_grad_enabled(output_gradient is not None):
            stack.callback(_restorer(module))
            for name, each in _unscripted(module).items():
                if name:
                    stack.callback(each.register_forward_hook(hook(name)).remove)
            if output_gradient is not None:
                given = [x.requires_grad_() if x.is_floating_point() else x for x in given]
            # Clones, since no leaf of a graph can be written to.
            output = module(*(x.clone() for x in given), **kwargs)
            intermediates = dict(graph)
            recording.end(output, leaf)
            if output_gradient is None:
                return in_order(recording.found())
            outputs = {name: graph[name] for name in graph if name not in intermediates}
            shapes = {name: tuple(tensor.shape) for name, tensor in outputs.items()}
            gradients = given_gradients(output_gradient, shapes)
            wanted = dict(zip(input_names(len(given)), given, strict=True)) | intermediates
            wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
            if not wanted:
                return in_order(recording.found())
            found = torch.autograd.grad(
                [*outputs.values()],
                [*wanted.values()],
                [torch.tensor(gradients[n]).to(outputs[n]) for n in outputs],
                materialize_grads=True,
            )
            return in_order(recording.found(), zip(wanted, map(_numpy, found), strict=True))

    return run


def _restorer(module: nn.Module) -> Callable[[], None]:
    """What gives a module's state but for what is trained, as batch statistics, its values of now.

    A lazy module keeps what its first call has made of it.
    """
    buffers = [(each, dict(each._buffers)) for each in _unscripted(module).values()]
    state = [*module.buffers(), *(p for p in module.parameters() if not p.requires_grad)]
    saved = [(tensor, tensor.clone()) for tensor in state if not nn.parameter.is_lazy(tensor)]

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in saved:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for each, own in buffers:
            each._buffers.clear()
            each._buffers.update(own)

    return restore


def _unscripted(module: nn.Module) -> dict[str, nn.Module]:
    """Its modules by name but for scripted ones, which take no hooks."""
    return {n: m for n, m in module.named_modules() if not isinstance(m, torch.jit.ScriptModule)}


def _is_dense(tensor: Tensor) -> bool:
    """Whether it has values such as NumPy's: inside ``torch.vmap`` there are none."""
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _layer(layer: networks.Layer) -> nn.Module:
    match layer:
        case networks.Conv():
            return _conv(layer)
        case networks.Linear():
            return nn.Linear(layer.in_features, layer.out_features)
        case networks.ReLU():
            return nn.ReLU()
        case networks.Flatten():
            return nn.Flatten()


def _conv(layer: networks.Conv) -> nn.Module:
    geometry = layer.geometry
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
    options: dict[str, Any] = {"output_padding": output_padding} if geometry.transposed else {}
    name = layer.kind
    if layer.coords:
        options["coords"] = layer.coords
    return (globals() if layer.coords else vars(nn))[name](  # type: ignore[no-any-return]
        layer.in_channels,
        layer.out_channels,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=geometry.groups,
        bias=layer.bias,
        padding_mode=geometry.padding_mode,
        **options,
    )


def _numpy(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # NumPy has none; float32 holds every value of it
        tensor = tensor.float()
    return np.array(tensor.numpy())


def _import(
    module: nn.Module, mapping: Mapping[str, Array], coordinates: Mapping[str, Coordinates]
) -> None:
    parameters = dict(module.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    arrays = checked(mapping, shapes, coordinates)
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(torch.tensor(arrays[name]))
