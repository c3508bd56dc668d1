"""Orbax checkpoints of NNX and of Linen, and a network's parameters as they have them."""

from __future__ import annotations

import errno
import glob
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from coordconv.backends.jax.arrays import NAMES, to_flax, to_numpy, to_torch
from coordconv.grid import Array
from coordconv.networks import Conv, Network


def read_state(path: str) -> dict[str, Array]:
    """The arrays of an Orbax checkpoint; see :class:`coordconv.backends.protocols.Backend`."""
    import orbax.checkpoint as ocp  # slow to import, and only these files need it

    path = os.path.abspath(path)
    try:
        os.stat(os.path.join(path, "_METADATA"))
    except (FileNotFoundError, NotADirectoryError):
        os.stat(path)  # the system's own error, in its own words, if there is nothing at all
        patterns = "*/_METADATA", "*/*/_METADATA"  # a CheckpointManager's items, and of its steps
        inside = [os.path.dirname(f) for p in patterns for f in sorted(glob.glob(p, root_dir=path))]
        raise ValueError(
            f"{path} is not an Orbax checkpoint, a folder with a file _METADATA"
            + (f"; but there is one in it: name {' or '.join(inside[-3:])}" if inside else "")
        ) from None
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            listed = checkpointer.metadata(path)
            listed = getattr(listed, "item_metadata", listed)  # older releases have it as it is
            if listed is None:
                raise ValueError("what it holds is not to be found out")

            def kind(leaf: Any) -> Any:
                # As NumPy, which is on no device, and has float64 whatever JAX is told.
                is_text = isinstance(leaf, ocp.metadata.StringMetadata)
                return ocp.RestoreArgs(restore_type=str if is_text else np.ndarray)

            tree = checkpointer.restore(path, restore_args=jax.tree.map(kind, listed.tree))
    except PermissionError:
        raise
    except Exception as error:  # Orbax and TensorStore have no error of their own for it
        raise ValueError(f"{path} is a damaged Orbax checkpoint: {error}") from error
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(p, simple=True, separator="."): to_numpy(a) for p, a in leaves}
    for name, array in arrays.items():
        if array.dtype.isbuiltin == 2:  # a type that JAX adds to NumPy's: of 8 bits, or fewer
            raise ValueError(
                f"{path} holds what NumPy arrays by name cannot: not floating-point of 16 bits or "
                f"more: {name} is {array.dtype}"
            )
    return arrays


def from_state(network: Network, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Canonical arrays from those of an NNX state, or of Linen's variables or train state.

    What else a train state has besides ``params`` is left out.
    """
    variables = {n.removeprefix("params."): a for n, a in arrays.items() if n.startswith("params.")}
    known = {f"{layer}.{own}": (name, reverse) for layer, own, name, reverse in _params(network)}
    found = {}
    for name, array in (variables or arrays).items():
        param = name.removesuffix(".value")  # an NNX state's own leaves
        if param in known:
            canonical, reverse = known[param]
            found[canonical] = to_torch(array, reverse=reverse)
        else:
            found[name] = array
    return found


def to_params(network: Network, arrays: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Parameters by layer and by Flax's names, from canonical arrays."""
    params: dict[str, dict[str, Array]] = {}
    for layer, own, canonical, reverse in _params(network):
        params.setdefault(layer, {})[own] = to_flax(arrays[canonical], reverse=reverse)
    return params


def from_params(network: Network, params: Mapping[str, Any]) -> dict[str, Array]:
    """The inverse of :func:`to_params`."""
    return {
        canonical: to_torch(params[layer][own], reverse=reverse)
        for layer, own, canonical, reverse in _params(network)
    }


def _params(network: Network) -> Iterator[tuple[str, str, str, bool]]:
    """Of each parameter the layer, Flax's name, the canonical name, and whether it is reversed."""
    for layer in network.layers:
        reverse = isinstance(layer, Conv) and layer.geometry.transposed
        for name in layer.weight_shapes():
            yield layer.name, NAMES[name], f"{layer.name}.{name}", reverse


def write_state(path: str, network: Network, weights: Mapping[str, Array]) -> None:
    """Write a checkpoint of the pure dict of an NNX state; see ``Backend``, as above."""
    _write(path, to_params(network, weights))


def write_variables(path: str, network: Network, weights: Mapping[str, Array]) -> None:
    """Write a checkpoint of Linen's variables ``{"params": ...}``; see ``Backend``, as above."""
    _write(path, {"params": to_params(network, weights)})


def _write(path: str, tree: Mapping[str, Any]) -> None:
    """Write an Orbax checkpoint, whole or not at all."""
    import orbax.checkpoint as ocp

    path = os.path.abspath(path)
    try:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "it exists; remove it or choose another name")
        with tempfile.TemporaryDirectory(".tmp", ".", os.path.dirname(path)) as folder:
            made = os.path.join(folder, "state")
            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(made, jax.tree.map(np.ascontiguousarray, tree))
            os.rename(made, path)
    except (OSError, ValueError) as error:  # TensorStore's, of a full disk say, are ValueErrors
        number = getattr(error, "errno", None) or errno.EIO
        reason = getattr(error, "strerror", None) or error
        raise OSError(number, f"cannot write weights: {reason}", path) from error
