"""PyTorch's files of weights: a ``state_dict``, which ``torch.save`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coordconv.backends.torch.states import COORDS
from coordconv.coordinates import Coordinates
from coordconv.grid import Array
from coordconv.networks import Network
from coordconv.tape import to_numpy
from coordconv.weights.canonical import Weights


def read_state(path: str) -> Weights:
    """The arrays of a file of a state_dict; see :class:`coordconv.backends.protocols.Backend`.

    With the Coordinates of layers of ours, which a state_dict has in its metadata.
    """
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch lets pass what a damaged file makes its parts raise
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
            arrays[name] = to_numpy(tensor)
        except (RuntimeError, TypeError) as error:  # sparse, quantized, of 8 bits
            raise ValueError(
                f"{path} holds what NumPy arrays by name cannot: {name}: {error}"
            ) from error
    return Weights(arrays, _coordinates(path, state))


def _coordinates(path: str, state: Any) -> dict[str, Coordinates]:
    """The Coordinates that layers of ours put in the metadata of a state dict, by layer."""
    try:
        entries = {n: e for n, e in getattr(state, "_metadata", {}).items() if COORDS in e}
        return {name: Coordinates.from_dict(entry[COORDS]) for name, entry in entries.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has damaged coordinates metadata: {error}") from error


def from_state(network: Network, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The same arrays: the canonical names and layout are torch's own."""
    return dict(arrays)
