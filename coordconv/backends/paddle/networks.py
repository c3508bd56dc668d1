"""Networks in Paddle: what :mod:`coordconv.tape` does not know of it.

Example:
    >>> import numpy as np
    >>> from coordconv.backends.paddle import CoordConv2D, adapt_state_dict, recorded
    >>> net = nn.Sequential(CoordConv2D(3, 8, 3), nn.ReLU())
    >>> run = recorded(net, names={"0": "conv"})
    >>> {name: array.shape for name, array in run(np.ones((1, 3, 5, 5))).items()}
    {'conv': (1, 8, 3, 3), '1': (1, 8, 3, 3), 'model output': (1, 8, 3, 3)}
    >>> state = {f"0.conv.{n}": t for n, t in nn.Conv2D(3, 8, 3).state_dict().items()}
    >>> {n: list(t.shape) for n, t in adapt_state_dict(net, state).items()}
    {'0.weight': [8, 5, 3, 3], '0.bias': [8]}
"""

from __future__ import annotations

from collections.abc import Mapping

import paddle
from paddle import Tensor, nn

from coordconv import networks
from coordconv.backends.paddle import layers, options
from coordconv.backends.paddle.files import from_state
from coordconv.grid import Array
from coordconv.tape import NetworkModule, Tape

COMPILED = False


def _tensor(array: Array, like: Tensor | None) -> Tensor:
    tensor = paddle.to_tensor(array)
    return tensor.astype(like.dtype) if like is not None and tensor.is_floating_point() else tensor


def _conv(layer: networks.Conv) -> nn.Layer:
    arguments = options.arguments(layer.geometry)
    name = f"Conv{layer.geometry.rank}D{'Transpose' if layer.geometry.transposed else ''}"
    kind = getattr(nn, name)
    if layer.coords:
        kind, arguments["coords"] = getattr(layers, f"Coord{name}"), layer.coords
    bias = None if layer.bias else False
    return kind(layer.in_channels, layer.out_channels, bias_attr=bias, **arguments)


def _begin_step(optimizer: paddle.optimizer.Optimizer, rate: float) -> None:
    optimizer.clear_grad()
    optimizer.set_lr(rate)


class Network(NetworkModule, nn.Sequential):
    """A :class:`coordconv.networks.Network` as a Paddle layer; input ``(N, C, *S)``."""

    TAPE = Tape(
        framework=paddle,
        conv=_conv,
        mean_pool=nn.AdaptiveAvgPool1D,
        tensor=_tensor,
        is_array=lambda part: isinstance(part, Tensor),
        grad=paddle.grad,
        compiled=lambda module: paddle.jit.to_static(module.forward, full_graph=True),
        modules=lambda module: dict(module.named_sublayers(include_self=True)),
        register_hook="register_forward_post_hook",
        optimizers={
            "adam": lambda parameters, epsilon: paddle.optimizer.Adam(
                parameters=parameters, epsilon=epsilon
            ),
            "sgd": lambda parameters, epsilon: paddle.optimizer.SGD(parameters=parameters),
        },
        begin_step=_begin_step,
        from_state=from_state,
    )


def build(
    network: networks.Network, weights: Mapping[str, Array], dtype: str = "float32"
) -> Network:
    """A network with these weights; see :class:`coordconv.backends.protocols.Backend`."""
    if dtype in ("float16", "bfloat16") and paddle.device.get_device() == "cpu":
        raise NotImplementedError("paddle convolutions have no 16-bit types on a CPU")
    return Network.build(network, weights, dtype)  # type: ignore[no-any-return]


evaluate = Network.TAPE.evaluate
recorded = Network.TAPE.recorded
trainer = Network.TAPE.trainer
write_state = Network.TAPE.write_state
