"""State dicts: what a CoordConv's carries, and which ones it takes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from coordconv.backends.torch.arrays import zeros
from coordconv.coordinates import Coordinates
from coordconv.weights.kernels import KernelLayout, Position, fit_state, same_channels

_COORDS = "coords"  # under which the metadata of a state dict has a layer's Coordinates


class KeepsCoordinates:
    """Mixed into a layer, its state dict has the Coordinates in its metadata, and is fitted.

    Torch documents the two methods of private names as those to override for a state of one's own.
    """

    coords: Coordinates
    in_channels: int
    groups: int
    transposed: bool

    @property
    def layout(self) -> KernelLayout:
        """Where features and coordinates lie in ``weight``."""
        return KernelLayout(self.coords, self.in_channels, self.groups, self.transposed)

    def _layout_of(self, kernel: Tensor) -> KernelLayout:
        """The layout by the kernel's shape, where ``in_channels`` is not what it will be."""
        width = kernel.shape[0] if self.transposed else kernel.shape[1] * self.groups
        channels = int(width - self.groups * len(self.coords))
        return KernelLayout(self.coords, channels, self.groups, self.transposed)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)  # a caller's own mapping has none
        if metadata is not None and prefix[:-1] in metadata:
            metadata[prefix[:-1]][_COORDS] = self.coords.to_dict()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        *_, error_msgs = rest
        try:
            # In place: the state is a copy of the caller's.
            if _COORDS in local_metadata:
                self._reorder(state_dict, prefix, local_metadata[_COORDS])
            self._adapt(state_dict, prefix)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _reorder(self, state: dict[str, Any], prefix: str, coords: Mapping[str, Any]) -> None:
        """Put the coordinates of a state of ours in this layer's order."""
        found, name = Coordinates.from_dict(coords), f"{prefix}weight"
        # The tensors of a parametrization have other names, and nothing tells their channels apart.
        if not same_channels(found, self.coords) or (found != self.coords and name not in state):
            raise ValueError(f"{name} was made for {found}, want {self.coords}")
        if found != self.coords:
            state[name] = self._layout_of(state[name]).reordered(state[name], found)

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
        The same, with its metadata, but for the kernels of CoordConvs: those over features and
        coordinates have the coordinates last, and a plain convolution's has zeros for them;
        ``conv.weight`` is ``weight``.

    Raises:
        ValueError: a kernel whose channels fit neither; another ``position``.

    Example:
        >>> from coordconv.backends.torch import CoordConv2d
        >>> net = nn.Sequential(CoordConv2d(3, 8, 1), nn.ReLU())
        >>> state = {f"0.conv.{n}": t for n, t in nn.Conv2d(3, 8, 1).state_dict().items()}
        >>> {n: tuple(t.shape) for n, t in adapt_state_dict(net, state).items()}
        {'0.weight': (8, 5, 1, 1), '0.bias': (8,)}
    """
    state = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        state._metadata = state_dict._metadata  # type: ignore[attr-defined]
    for name, each in module.named_modules(remove_duplicate=False):
        if isinstance(each, KeepsCoordinates):
            each._adapt(state, f"{name}." if name else "", position)
    return state
