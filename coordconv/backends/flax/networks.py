"""Networks in NNX: what :mod:`coordconv.backends.jax.networks` does not know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from coordconv import networks
from coordconv.backends.flax import layers
from coordconv.backends.jax import networks as common
from coordconv.grid import Array
from coordconv.weights.canonical import Weights


class Network(nnx.Module):
    """A :class:`coordconv.networks.Network` as a module; inputs ``(N, *S, C)``."""

    def __init__(self, network: networks.Network, dtype: str) -> None:
        self.network = network
        self.dtype = dtype
        # For nothing: import_weights brings the weights.
        drawn: Any = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
        for name, kind, channels, arguments in common.described(network, nnx, layers, dtype):
            setattr(self, name, kind(*channels, **arguments, **drawn))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return common.output(self, inputs)

    def run(self, params: dict[str, Any], inputs: jax.Array) -> jax.Array:
        """The output with ``params``, arrays by layer and name, in place of its own."""
        graph, state = nnx.split(self)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(inputs)

    def export_weights(self) -> Weights:
        """The canonical weights under dotted names."""
        return common.exported(self.network, nnx.to_pure_dict(nnx.state(self, nnx.Param)))

    def import_weights(self, mapping: Mapping[str, Array]) -> None:
        """Take canonical weights; ValueError lists all that is wrong, and nothing is changed."""
        nnx.update(self, common.imported(self.network, mapping, self.dtype))


def build(
    network: networks.Network, weights: Mapping[str, Array], dtype: str = "float32"
) -> Network:
    """A network with these weights; see :class:`coordconv.backends.protocols.Backend`."""
    with common.precision(dtype):
        module = Network(network, dtype)
        module.import_weights(weights)
        return module
