"""Networks in Linen: what :mod:`coordconv.backends.jax.networks` does not know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from coordconv import networks
from coordconv.backends.jax import networks as common
from coordconv.backends.linen import layers
from coordconv.grid import Array
from coordconv.weights.canonical import Weights


class Network(nn.Module):
    """A :class:`coordconv.networks.Network` as a module; inputs ``(N, *S, C)``."""

    network: networks.Network
    dtype: str

    def setup(self) -> None:
        described = common.described(self.network, nn, layers, self.dtype)
        for name, kind, (_, out), arguments in described:
            setattr(self, name, kind(out, **arguments))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return common.output(self, inputs)

    @nn.nowrap
    def run(self, params: Mapping[str, Any], inputs: jax.Array) -> jax.Array:
        """The output with ``params``, arrays by layer and name."""
        output: Any = self.apply({"params": params}, inputs)
        return output

    @nn.nowrap
    def export_weights(self, variables: Mapping[str, Any]) -> Weights:
        """The canonical weights in ``variables``, under dotted names."""
        return common.exported(self.network, variables["params"])

    @nn.nowrap
    def import_weights(self, mapping: Mapping[str, Array]) -> dict[str, Any]:
        """The variables for canonical weights; ValueError lists all that is wrong with these."""
        return {"params": common.imported(self.network, mapping, self.dtype)}


def build(
    network: networks.Network, weights: Mapping[str, Array], dtype: str = "float32"
) -> Network:
    """A network, for which the weights are checked; see ``Backend`` in protocols.

    A Linen module holds none: ``import_weights`` makes variables of them.
    """
    module = Network(network, dtype)
    with common.precision(dtype):
        module.import_weights(weights)
    list(common.described(network, nn, layers, dtype))  # options that Flax lacks are told of now
    return module
