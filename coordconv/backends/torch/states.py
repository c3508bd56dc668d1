"""What layers of torch with coordinates have in common: their weights, and their state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coordconv.backends.torch import adding
from coordconv.coordinates import Coordinates
from coordconv.grid import Array
from coordconv.tape import TapeWeights, is_distributed, replicated
from coordconv.weights.kernels import KernelLayout, same_channels

COORDS = "coords"  # under which the metadata of a state dict has a layer's Coordinates


class CarriesCoords:
    """A module whose state dict carries its Coordinates in its metadata, before ``nn.Module``."""

    coords: Coordinates

    # Torch documents the next two as those to override for a state of one's own.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)  # a caller's own mapping has none
        if metadata is not None and prefix[:-1] in metadata:
            metadata[prefix[:-1]][COORDS] = self.coords.to_dict()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        *_, error_msgs = rest
        found = local_metadata.get(COORDS)
        try:
            # In place: the state is a copy of the caller's.
            self._fit(state_dict, prefix, None if found is None else Coordinates.from_dict(found))
        except ValueError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _fit(self, state: dict[str, Any], prefix: str, found: Coordinates | None) -> None:
        """Change a state of ``found`` in place to one for the module, or raise ValueError."""
        raise NotImplementedError


class TorchWeights(CarriesCoords, adding.OwnChannels, TapeWeights):
    """A layer with canonical weights."""

    def _layout_of(self, kernel: Tensor) -> KernelLayout:
        """The layout of a kernel, which a lazy layer's first one tells."""
        return self.layout

    def _is_low_precision(self, kernel: Any) -> bool:
        known = isinstance(kernel, Tensor)  # a tracer's stand-in does not know its type
        return adding.is_low_precision(kernel, (kernel if known else next(self.parameters())).dtype)

    def _assign(self, arrays: Mapping[str, Array]) -> None:
        with torch.no_grad():
            for name, array in arrays.items():
                parameter = getattr(self, name)
                parameter.copy_(replicated(torch.tensor(array), parameter))

    def _fit(self, state: dict[str, Any], prefix: str, found: Coordinates | None) -> None:
        if found is not None:
            self._reorder(state, prefix, found)
        self._adapt(state, prefix)

    def _reorder(self, state: dict[str, Any], prefix: str, found: Coordinates) -> None:
        """Put the coordinates of a state of ours in this layer's order."""
        name = f"{prefix}weight"
        # The tensors of a parametrization have other names, and nothing tells their channels apart.
        in_order = found.names == self.coords.names
        if not same_channels(found, self.coords) or (not in_order and name not in state):
            raise ValueError(f"{name} was made for {found}, want {self.coords}")
        if not in_order:
            kernel = state[name]
            whole = kernel.full_tensor() if is_distributed(kernel) else kernel
            state[name] = replicated(self._layout_of(kernel).reordered(whole, found), kernel)

    def _adapt(self, state: Any, prefix: str) -> None:
        """Give a state, in place, this layer's names and kernel."""
