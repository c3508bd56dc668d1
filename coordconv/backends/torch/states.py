"""State dicts: what a CoordConv's carries, and which ones it takes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from coordconv.backends.torch.arrays import zeros
from coordconv.coordinates import Coordinates
from coordconv.weights.kernels import KernelLayout, Position, fit_state, same_channels

_COORDS = "coords"  # under which the metadata of a state dict has a layer's Coordinates


class KeepsCoordinates:
    """Mixed into a layer, its state dict has the Coordinates in its metadata, and is fitted.

    Torch documents the two methods below as those to override for a state of one's own.
    """

    coords: Coordinates
    layout: KernelLayout

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
            if _COORDS in local_metadata:
                self._reorder(state_dict, prefix, local_metadata[_COORDS])
            self._adapt(state_dict, prefix)
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

    def _reorder(self, state: dict[str, Any], prefix: str, coords: Mapping[str, Any]) -> None:
        """Put the coordinates of a state of ours in this layer's order."""
        found, name = Coordinates.from_dict(coords), f"{prefix}weight"
        # The tensors of a parametrization have other names, and nothing tells their channels apart.
        if not same_channels(found, self.coords) or (found != self.coords and name not in state):
            raise ValueError(f"{name} was made for {found}, want {self.coords}")
        if found != self.coords:
            # A lazy layer's own layout knows no channels yet.
            layout = replace(self.layout, channels=features_of(self, state[name]))
            state[name] = layout.reordered(state[name], found)

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


def features_of(layer: Any, kernel: Any) -> int:
    """The features that a kernel of a layer's is made for, of all groups."""
    width = kernel.shape[0] if layer.transposed else kernel.shape[1] * layer.groups
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
