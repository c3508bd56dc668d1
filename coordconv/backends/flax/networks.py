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

COMPILED = common.COMPILED


class Network(nnx.Module):
    """A :class:`coordconv.networks.Network` as a module; inputs ``(N, *S, C)``."""

    def __init__(self, network: networks.Network, dtype: str = "float32") -> None:
        self.network = network
        self.dtype = dtype
        rngs = nnx.Rngs(0)  # for nothing: import_weights brings the weights
        for layer in network.layers:
            if layer.weight_shapes():
                setattr(self, layer.name, _layer(layer, rngs, dtype))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return common.run(self.network, inputs, lambda layer: getattr(self, layer.name))

    def run(self, params: dict[str, Any], inputs: jax.Array) -> jax.Array:
        """The output with ``params``, arrays by layer and name, in place of its own."""
        graph, state = nnx.split(self)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(inputs)

    def export_weights(self) -> Weights:
        """The canonical weights under dotted names."""
        return common.exported(self.network, nnx.to_pure_dict(nnx.state(self, nnx.Param)))

    def import_weights(self, mapping: Mapping[str, Array]) -> None:
        """Take canonical weights.

        Raises:
            ValueError: arrays are missing, unexpected or wrongly shaped, or were made for other
                coordinates; all are listed and nothing is changed.
        """
        nnx.update(self, common.imported(self.network, mapping, self.dtype))


def _layer(layer: networks.Layer, rngs: nnx.Rngs, dtype: str) -> nnx.Module:
    further: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
    further["kernel_init"] = nnx.initializers.zeros
    if isinstance(layer, networks.Linear):
        return nnx.Linear(layer.in_features, layer.out_features, **further)
    assert isinstance(layer, networks.Conv)  # no other has weights
    kind, arguments = common.convolution(layer, nnx, layers)
    return kind(layer.in_channels, layer.out_channels, **arguments, **further)


def build(
    network: networks.Network, weights: Mapping[str, Array], dtype: str = "float32"
) -> Network:
    """A network with these weights; see :class:`coordconv.backends.protocols.Backend`."""
    with common.precision(dtype):
        module = Network(network, dtype)
        module.import_weights(weights)
        return module


evaluate = common.evaluate
trainer = common.trainer
