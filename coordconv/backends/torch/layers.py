"""CoordConv for PyTorch: subclasses of ``torch.nn``'s own convolutions.

Torch's convolutions call one method, ``_conv_forward``, for the computation alone: that is what
changes. Its transposed convolutions have none, so that their short ``forward`` is written anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from coordconv.backends.torch import adding, options
from coordconv.backends.torch.arrays import to_numpy, zeros
from coordconv.coordinates import Coordinates, CoordinatesLike
from coordconv.geometry import check_input
from coordconv.grid import Array
from coordconv.layers import CoordLayer
from coordconv.weights.kernels import KernelLayout, Position, fit_state

_COORDS = "coords"  # under which the metadata of a state dict has a layer's Coordinates
_PLAIN: dict[tuple[int, bool], Any] = {  # by rank, and whether it is transposed
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}
_CONVOLVE_TRANSPOSED: dict[int, Any] = {
    1: nn.functional.conv_transpose1d,
    2: nn.functional.conv_transpose2d,
    3: nn.functional.conv_transpose3d,
}


def _check(input: Any, rank: int, channels: int | None = None, coords: int = 0) -> None:
    """Say what is wrong with an input; a tracer's unknown sizes are left to torch."""
    if not isinstance(input, Tensor):
        return
    if not (input.is_floating_point() or input.is_complex()):
        raise TypeError(f"input must be floating-point, got {input.dtype}")
    if all(type(n) is int for n in input.shape):
        axis = -1 - rank
        check_input(
            input.shape, rank=rank, channels=channels, coords=coords, channel_axis=axis, batched=0
        )


class _CoordLayer(CoordLayer):
    """What all CoordConvs of torch share; :class:`coordconv.layers.CoordLayer` has the arguments.

    ``load_state_dict`` takes the layer's own state, a plain convolution's (the coordinates' part
    becomes zero), and another implementation's kernel over features and coordinates, all of them
    also under ``conv.``. A state dict carries the layer's Coordinates in its metadata: the same set
    in another order is put in this layer's order, and other Coordinates are refused.

    Shape:
        input ``(N, C, *S)`` or ``(C, *S)``; output as the base class.

    Example:
        >>> layer = CoordConv2d(3, 8, 3, padding=1, coords="xyr")
        >>> layer(torch.zeros(2, 3, 16, 20)).shape
        torch.Size([2, 8, 16, 20])
        >>> layer.weight.shape  # over 3 features and 3 coordinates
        torch.Size([8, 6, 3, 3])
    """

    @property
    def layout(self) -> KernelLayout:
        """Where features and coordinates lie in ``weight``."""
        return KernelLayout(self.coords, self.in_channels, self.groups, self.transposed)

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as ``coord_init`` says."""
        if self.coord_init == "fan_in" or is_lazy(self.weight) or not self.weight.numel():
            super().reset_parameters()
            return
        channels = _features(self)
        plain = _PLAIN[self.rank, self.transposed](
            channels,
            self.out_channels,
            self.kernel_size,
            groups=self.groups,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        layout = KernelLayout(self.coords, channels, self.groups, self.transposed)
        with torch.no_grad():
            self.weight.copy_(layout.fitted(plain.weight, torch.cat, plain.weight.new_zeros))
            if self.bias is not None:
                self.bias.copy_(plain.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)  # a caller's own mapping has none
        if metadata is not None and prefix[:-1] in metadata:
            metadata[prefix[:-1]][_COORDS] = self.coords.to_dict()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],  # a copy of the caller's
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            self._adapt(state_dict, prefix)
            if _COORDS in local_metadata:
                found = Coordinates.from_dict(local_metadata[_COORDS])
                name = f"{prefix}weight"
                state_dict[name] = self.layout.reordered(state_dict[name], found)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _adapt(self, state: Any, prefix: str, position: Position = "last") -> None:
        """Give a state, in place, this layer's names and kernel; see :func:`adapt_state_dict`."""
        if not is_lazy(self._parameters.get("weight")):  # its first input will tell its channels
            fit_state(
                state,
                prefix,
                self.layout,
                nested="conv" not in self._modules,
                position=position,
                concatenate=torch.cat,
                zeros=zeros,
            )

    def _is_low_precision(self, kernel: Any) -> bool:
        known = isinstance(kernel, Tensor)  # a tracer's stand-in does not know its type
        return adding.is_low_precision(kernel, (kernel if known else next(self.parameters())).dtype)

    def _way(self, x: Any, kernel: Any) -> str:
        sizes = self.in_channels, self.out_channels
        low = self._is_low_precision(kernel)
        return adding.choose(options.geometry(self), self.coords, x, *sizes, low)

    def _append(self, x: Any) -> Any:
        return adding.append(self.coords, x, self.rank, self.groups)

    def _add_map(self, output: Any, x: Any, coordinates: Any) -> Any:
        low = self._is_low_precision(coordinates)
        return adding.add_map(options.geometry(self), self.coords, output, x, coordinates, low)

    def _canonical(self) -> dict[str, Array]:
        found = {"weight": self.weight, "bias": self.bias}
        return {name: to_numpy(tensor) for name, tensor in found.items() if tensor is not None}

    def _assign(self, arrays: Mapping[str, Array]) -> None:
        with torch.no_grad():
            for name, array in arrays.items():
                getattr(self, name).copy_(torch.tensor(array))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, coords={self.coords!r}"


class _CoordConv(_CoordLayer):
    def forward(self, input: Tensor) -> Tensor:
        """The convolution of ``input`` and its coordinates."""
        _check(input, self.rank, self.in_channels, len(self.coords))
        return super().forward(input)

    def _conv_forward(self, input: Any, weight: Any, bias: Any) -> Any:
        geometry = options.geometry(self)
        if adding.is_product(geometry, input, weight, self._is_low_precision(weight)):
            features, coordinates = self.layout.split(weight)
            return adding.product(geometry, self.coords, input, features, bias, coordinates)
        return self._coord_conv(input, weight, bias, super()._conv_forward)


class _CoordConvTranspose(_CoordLayer):
    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The transposed convolution of ``input`` and its coordinates."""
        _check(input, self.rank, self.in_channels, len(self.coords))
        extra = self.output_padding
        if output_size is not None:
            extra = options.output_padding(self, input.shape[-self.rank :], output_size)

        def convolve(x: Any, weight: Any, bias: Any) -> Any:
            steps = self.stride, self.padding, extra, self.groups, self.dilation
            return _CONVOLVE_TRANSPOSED[self.rank](x, weight, bias, *steps)

        return self._coord_conv(input, self.weight, self.bias, convolve)


class _LazyCoordLayer(_CoordLayer):
    def initialize_parameters(self, input: Tensor, *args: Any, **kwargs: Any) -> None:
        """Make the parameters for an input, as torch does, with the coordinates' channels."""
        shape = list(input.shape)
        if len(shape) > self.rank:
            shape[-1 - self.rank] += self.groups * len(self.coords)
        super().initialize_parameters(input.new_empty(shape, device="meta"), *args, **kwargs)
        # Here and not before: if a state was loaded, torch finds nothing left to initialise.
        self.in_channels = _features(self)


def _features(layer: Any) -> int:
    """The features that a layer's kernel is made for, of all groups."""
    width = layer.weight.shape[0] if layer.transposed else layer.weight.shape[1] * layer.groups
    return int(width - layer.groups * len(layer.coords))


def adapt_state_dict(
    module: nn.Module, state_dict: Mapping[str, Any], *, position: Position = "last"
) -> dict[str, Any]:
    """Another implementation's state, as a module with CoordConvs takes it.

    ``load_state_dict`` does the same by itself, but for ``position="first"``: where coordinates
    come before the features, as in SparseInst, CondInst and CAM-Convs, no shape tells it.

    Args:
        module: the network, or one layer.
        state_dict: tensors by name; it is left as it is.
        position: where the coordinates are among the input channels of each group.

    Returns:
        The same, but for the kernels of CoordConvs: those over features and coordinates have the
        coordinates last, and a plain convolution's has zeros for them; ``conv.weight`` is
        ``weight``.

    Raises:
        ValueError: a kernel whose channels fit neither; another ``position``.

    Example:
        >>> net = nn.Sequential(CoordConv2d(3, 8, 1), nn.ReLU())
        >>> state = {f"0.conv.{n}": t for n, t in nn.Conv2d(3, 8, 1).state_dict().items()}
        >>> {n: tuple(t.shape) for n, t in adapt_state_dict(net, state).items()}
        {'0.weight': (8, 5, 1, 1), '0.bias': (8,)}
    """
    state = dict(state_dict)
    for name, each in module.named_modules(remove_duplicate=False):
        if isinstance(each, _CoordLayer):
            each._adapt(state, f"{name}." if name else "", position)
    return state


class CoordConv1d(_CoordConv, nn.Conv1d):
    """``torch.nn.Conv1d`` that sees its coordinates; see :class:`coordconv.layers.CoordLayer`."""

    rank = 1


class CoordConv2d(_CoordConv, nn.Conv2d):
    """``torch.nn.Conv2d`` that sees its coordinates; see :class:`coordconv.layers.CoordLayer`."""

    rank = 2


class CoordConv3d(_CoordConv, nn.Conv3d):
    """``torch.nn.Conv3d`` that sees its coordinates; see :class:`coordconv.layers.CoordLayer`."""

    rank = 3


class CoordConvTranspose1d(_CoordConvTranspose, nn.ConvTranspose1d):
    """As :class:`CoordConv1d`, of ``torch.nn.ConvTranspose1d``."""

    rank = 1


class CoordConvTranspose2d(_CoordConvTranspose, nn.ConvTranspose2d):
    """As :class:`CoordConv2d`, of ``torch.nn.ConvTranspose2d``."""

    rank = 2


class CoordConvTranspose3d(_CoordConvTranspose, nn.ConvTranspose3d):
    """As :class:`CoordConv3d`, of ``torch.nn.ConvTranspose3d``."""

    rank = 3


class LazyCoordConv1d(_LazyCoordLayer, CoordConv1d, nn.LazyConv1d):
    """:class:`CoordConv1d` whose first input says ``in_channels``."""

    cls_to_become = CoordConv1d


class LazyCoordConv2d(_LazyCoordLayer, CoordConv2d, nn.LazyConv2d):
    """:class:`CoordConv2d` whose first input says ``in_channels``."""

    cls_to_become = CoordConv2d


class LazyCoordConv3d(_LazyCoordLayer, CoordConv3d, nn.LazyConv3d):
    """:class:`CoordConv3d` whose first input says ``in_channels``."""

    cls_to_become = CoordConv3d


class LazyCoordConvTranspose1d(_LazyCoordLayer, CoordConvTranspose1d, nn.LazyConvTranspose1d):
    """:class:`CoordConvTranspose1d` whose first input says ``in_channels``."""

    cls_to_become = CoordConvTranspose1d


class LazyCoordConvTranspose2d(_LazyCoordLayer, CoordConvTranspose2d, nn.LazyConvTranspose2d):
    """:class:`CoordConvTranspose2d` whose first input says ``in_channels``."""

    cls_to_become = CoordConvTranspose2d


class LazyCoordConvTranspose3d(_LazyCoordLayer, CoordConvTranspose3d, nn.LazyConvTranspose3d):
    """:class:`CoordConvTranspose3d` whose first input says ``in_channels``."""

    cls_to_become = CoordConvTranspose3d


class AddCoords(nn.Module):
    """Append the coordinate channels to an input, for layers that have no CoordConv.

    Args:
        coords: tokens, a :class:`~coordconv.Coordinates`, or None for all axes.
        rank: the number of spatial axes, 1 to 3. It tells an image without a batch axis from a
            batch of sequences.

    Shape:
        input ``(N, C, *S)`` or ``(C, *S)``; output with ``n`` channels more.

    Raises:
        TypeError: the input is not floating-point.
        ValueError: ``coords`` that do not fit the rank; an input of another rank, or with an empty
            axis.

    Example:
        >>> AddCoords("x", rank=1)(torch.zeros(1, 1, 3))
        tensor([[[ 0.,  0.,  0.],
                 [-1.,  0.,  1.]]])
    """

    def __init__(self, coords: CoordinatesLike = None, *, rank: int = 2) -> None:
        super().__init__()
        self.coords = Coordinates.resolve(coords, rank)
        self.rank = rank

    def forward(self, input: Tensor) -> Tensor:
        """The input with the coordinates behind its channels."""
        _check(input, self.rank)
        return adding.append(self.coords, input, self.rank)

    def extra_repr(self) -> str:
        return f"coords={self.coords!r}, rank={self.rank}"
