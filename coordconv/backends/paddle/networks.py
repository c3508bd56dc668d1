"""Networks in Paddle: what :mod:`coordconv.tape` does not know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import paddle
from paddle import Tensor, nn

from coordconv import networks
from coordconv.backends.paddle import layers, options
from coordconv.backends.paddle.arrays import to_numpy
from coordconv.backends.paddle.files import from_state, to_state
from coordconv.grid import Array
from coordconv.tape import NetworkModule, Tape

COMPILED = False


def _tensor(array: Array, like: Tensor | None) -> Tensor:
    tensor = paddle.to_tensor(array)
    return tensor.astype(like.dtype) if like is not None and tensor.is_floating_point() else tensor


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], output_gradients: Sequence[Tensor]
) -> list[Tensor]:
    found = paddle.grad(outputs, inputs, output_gradients, allow_unused=True)
    return [paddle.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _conv(layer: networks.Conv) -> nn.Layer:
    arguments = options.arguments(layer.geometry)
    name = f"Conv{layer.geometry.rank}D{'Transpose' if layer.geometry.transposed else ''}"
    kind = getattr(nn, name)
    if layer.coords:
        kind, arguments["coords"] = getattr(layers, f"Coord{name}"), layer.coords
    bias = None if layer.bias else False
    return kind(layer.in_channels, layer.out_channels, bias_attr=bias, **arguments)


_TAPE = Tape(
    nn=nn,
    conv=_conv,
    tensor=_tensor,
    numpy=to_numpy,
    is_array=lambda part: isinstance(part, Tensor),
    gradients=_gradients,
    grad_enabled=paddle.set_grad_enabled,
    compiled=lambda module: paddle.jit.to_static(module.forward, full_graph=True),
    modules=lambda module: dict(module.named_sublayers(include_self=True)),
    optimizers={
        "adam": lambda parameters, epsilon: paddle.optimizer.Adam(
            parameters=parameters, epsilon=epsilon
        ),
        "sgd": lambda parameters, epsilon: paddle.optimizer.SGD(parameters=parameters),
    },
    set_rate=paddle.optimizer.Optimizer.set_lr,
    from_state=from_state,
    to_state=to_state,
)


class Network(NetworkModule, nn.Sequential):
    """A :class:`coordconv.networks.Network` as a Paddle layer; input ``(N, C, *S)``."""

    TAPE = _TAPE


def build(
    network: networks.Network, weights: Mapping[str, Array], dtype: str = "float32"
) -> Network:
    """A network with these weights; see :class:`coordconv.backends.protocols.Backend`."""
    if dtype in ("float16", "bfloat16") and paddle.device.get_device() == "cpu":
        raise NotImplementedError("paddle convolutions have no 16-bit types on a CPU")
    module = Network(network).to(dtype=getattr(paddle, dtype))
    module.import_weights(weights)
    return module


evaluate = _TAPE.evaluate
trainer = _TAPE.trainer
