"""Quantization of a CoordConv by ``paddle.quantization``, in training or after it.

Paddle puts another layer in place of each that it quantizes, by a mapping from classes. There it is
told of :class:`CoordConv2D`; of its own convolutions ``Conv2D`` is the only one that it has there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import paddle
from paddle import Tensor
from paddle.nn.quant.format import ConvertibleQuantedLayer
from paddle.quantization.config import DEFAULT_QAT_LAYER_MAPPINGS

from coordconv.backends.paddle import adding, options, windows
from coordconv.backends.paddle.fusing import options_of
from coordconv.backends.paddle.layers import CoordConv2D


@paddle.jit.marker.force_dynamic  # as the layers are
class QuantedCoordConv2D(ConvertibleQuantedLayer):  # type: ignore[misc]
    """A CoordConv2D whose whole kernel, the coordinates' part included, is as if quantized.

    Its input is quantized, too; the coordinates and the map that is made of them are not.
    """

    def __init__(self, layer: CoordConv2D, q_config: Any) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.layout, self._options = layer.layout, options_of(layer)
        self.weight_quanter = q_config.weight and q_config.weight._instance(layer)
        self.activation_quanter = q_config.activation and q_config.activation._instance(layer)

    @paddle.jit.marker.unified
    def forward(self, x: Tensor) -> Tensor:
        """The convolution of ``x`` and its coordinates."""
        layer = SimpleNamespace(**self._options, bias=self.bias)
        options.check(x, 2, layer.channels_last, layer._in_channels, len(layer.coords))
        x = self.activation_quanter(x) if self.activation_quanter else x
        kernel = self.weight_quanter(self.weight) if self.weight_quanter else self.weight
        features, coordinates = adding.split(self.layout, kernel)
        output, window = adding.convolve(layer, x, features, None), windows.window_of(None, x, 2)
        if window is not None:
            return adding.add_map_of_window(layer, output, x, coordinates, None, window)
        return adding.add_map(layer, output, x, coordinates)

    def weights_to_quanters(self) -> list[tuple[str, str]]:
        return [("weight", "weight_quanter")]

    def activation_quanters(self) -> list[str]:
        return ["activation_quanter"]


mappings: Any = DEFAULT_QAT_LAYER_MAPPINGS  # of classes, not of layers, as its annotation says
mappings[CoordConv2D] = QuantedCoordConv2D
