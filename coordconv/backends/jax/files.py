"""Orbax checkpoints of NNX and of Linen, and a network's parameters as they have them."""

from __future__ import annotations

import errno
import glob
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from coordconv.backends.jax.arrays import NAMES, layer_arrays, layer_params, to_numpy, to_torch
from coordconv.grid import Array
from coordconv.networks import Conv, Layer, Network


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
            listed = checkpointer.metadata(path).item_metadata
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
    layers = {layer.name: layer for layer in network.layers if layer.weight_shapes()}
    canonical = {own: name for name, own in NAMES.items()}
    found = {}
    for name, array in (variables or arrays).items():
        # An NNX state's own leaves end in ".value".
        layer, _, param = name.removesuffix(".value").rpartition(".")
        if layer in layers and param in canonical:
            reverse = _is_reversed(layers[layer])
            found[f"{layer}.{canonical[param]}"] = to_torch(array, reverse=reverse)
        else:
            found[name] = array
    return found


def to_params(network: Network, arrays: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Parameters by layer and by Flax's names, from canonical arrays."""
    params = {}
    for layer in network.layers:
        if shapes := layer.weight_shapes():
            of_layer = {name: arrays[f"{layer.name}.{name}"] for name in shapes}
            params[layer.name] = layer_params(of_layer, reverse=_is_reversed(layer))
    return params


def from_params(network: Network, params: Mapping[str, Any]) -> dict[str, Array]:
    """The inverse of :func:`to_params`."""
    return {
        f"{layer.name}.{name}": array
        for layer in network.layers
        if layer.name in params
        for name, array in layer_arrays(params[layer.name], reverse=_is_reversed(layer)).items()
    }


def write_tree(path: str, tree: Mapping[str, Any]) -> None:
    """Write an Orbax checkpoint, whole or not at all.

    Raises:
        OSError: there is something of that name already, or it cannot be written.
    """
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


def _is_reversed(layer: Layer) -> bool:
    """Whether Flax keeps the taps of a layer in the reverse of the canonical order."""
    return isinstance(layer, Conv) and layer.geometry.transposed
