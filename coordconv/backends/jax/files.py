"""Orbax checkpoints of NNX and of Linen, and the layout of the parameters in them.

Flax keeps channels last, in kernels ``(*kernel, in, out)`` under the name ``kernel``.
"""

from __future__ import annotations

import errno
import glob
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from coordconv.backends.jax.arrays import to_flax, to_numpy, to_torch
from coordconv.grid import Array
from coordconv.networks import Conv, Layer, Network

_NAMES = {"weight": "kernel", "bias": "bias"}


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
            # As NumPy, which is on no device, and has float64 whatever JAX is told.
            text = ocp.metadata.StringMetadata
            kind = jax.tree.map(
                lambda leaf: ocp.RestoreArgs(
                    restore_type=str if isinstance(leaf, text) else np.ndarray
                ),
                listed.tree,
            )
            tree = checkpointer.restore(path, restore_args=kind)
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
    names = {
        f"{layer.name}.{flax}": (layer, f"{layer.name}.{name}")
        for layer in network.layers
        for name, flax in _NAMES.items()
    }
    found = {}
    for name, array in (variables or arrays).items():
        param = name.removesuffix(".value")  # an NNX state's own leaves
        if param in names:
            layer, canonical = names[param]
            found[canonical] = to_torch(to_numpy(array), reverse=_is_reversed(layer))
        else:
            found[name] = array
    return found


def to_params(network: Network, arrays: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Parameters by layer and by Flax's names, from canonical arrays."""
    return {
        layer.name: {
            _NAMES[name]: to_flax(arrays[f"{layer.name}.{name}"], reverse=_is_reversed(layer))
            for name in layer.weight_shapes()
        }
        for layer in network.layers
        if layer.weight_shapes()
    }


def from_params(network: Network, params: Mapping[str, Any]) -> dict[str, Array]:
    """The inverse of :func:`to_params`."""
    return {
        f"{layer.name}.{name}": to_torch(
            to_numpy(params[layer.name][_NAMES[name]]), reverse=_is_reversed(layer)
        )
        for layer in network.layers
        for name in layer.weight_shapes()
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
