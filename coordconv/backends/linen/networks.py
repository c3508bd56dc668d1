"""Networks in Linen: what :mod:`coordconv.backends.jax.networks` does not know of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from coordconv import networks
from coordconv.backends.jax import networks as common
from coordconv.backends.linen import layers
from coordconv.grid import Array
from coordconv.weights.canonical import Weights

COMPILED = common.COMPILED


class Network(nn.Module):
    """A :class:`coordconv.networks.Network` as a module; inputs ``(N, *S, C)``."""

    network: networks.Network
    dtype: str = "float32"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return common.run(self.network, inputs, partial(_layer, dtype=self.dtype))

    @nn.nowrap
    def run(self, params: Mapping[str, Any], inputs: jax.Array) -> jax.Array:
        """The output with ``params``, arrays by layer and name."""
        output: jax.Array = self.apply({"params": params}, inputs)  # type: ignore[assignment]
        return output

    @nn.nowrap
    def export_weights(self, variables: Mapping[str, Any]) -> Weights:
        """The canonical weights in ``variables``, under dotted names."""
        return common.exported(self.network, variables["params"])

    @nn.nowrap
    def import_weights(self, mapping: Mapping[str, Array]) -> dict[str, Any]:
        """The variables ``{"params": ...}`` for canonical weights.

        Raises:
            ValueError: arrays are missing, unexpected or wrongly shaped, or were made for other
                coordinates; all are listed.
        """
        return {"params": common.imported(self.network, mapping, self.dtype)}


def _layer(layer: networks.Layer, dtype: str, **further: Any) -> nn.Module:
    further |= {"name": layer.name, "dtype": dtype, "param_dtype": dtype}
    if isinstance(layer, networks.Linear):
        return nn.Dense(layer.out_features, **further)
    assert isinstance(layer, networks.Conv)  # no other has weights
    kind, arguments = common.convolution(layer, nn, layers)
    return kind(layer.out_channels, **arguments, **further)


def build(
    network: networks.Network, weights: Mapping[str, Array], dtype: str = "float32"
) -> Network:
    """A network, for which the weights are checked; see ``Backend`` in protocols.

    A Linen module holds none: ``import_weights`` makes variables of them.
    """
    module = Network(network, dtype)
    with common.precision(dtype):
        module.import_weights(weights)
    for layer in network.layers:
        if layer.weight_shapes():
            _layer(layer, dtype, parent=None)  # options that Flax lacks are told of now
    return module


evaluate = common.evaluate
trainer = common.trainer
