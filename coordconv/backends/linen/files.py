"""Files of Linen: an Orbax checkpoint of the variables ``{"params": ...}``."""

from __future__ import annotations

from collections.abc import Mapping

from coordconv.backends.jax.files import from_state, read_state, to_params, write_tree
from coordconv.grid import Array
from coordconv.networks import Network

__all__ = ["from_state", "read_state", "write_state"]


def write_state(path: str, network: Network, weights: Mapping[str, Array]) -> None:
    """Write a checkpoint; see :class:`coordconv.backends.protocols.Backend`."""
    write_tree(path, {"params": to_params(network, weights)})
