"""Networks in PyTorch: what :mod:`coordconv.tape` does not know of it.

Example:
    >>> import numpy as np
    >>> from coordconv.backends.torch import CoordConv2d, adapt_state_dict, recorded
    >>> net = nn.Sequential(CoordConv2d(3, 8, 3), nn.ReLU())
    >>> run = recorded(net, names={"0": "conv"})
    >>> {name: array.shape for name, array in run(np.ones((1, 3, 5, 5))).items()}
    {'conv': (1, 8, 3, 3), '1': (1, 8, 3, 3), 'model output': (1, 8, 3, 3)}
    >>> state = {f"0.conv.{n}": t for n, t in nn.Conv2d(3, 8, 3).state_dict().items()}
    >>> {n: tuple(t.shape) for n, t in adapt_state_dict(net, state).items()}
    {'0.weight': (8, 5, 3, 3), '0.bias': (8,)}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coordconv import networks
from coordconv.backends.torch import layers, options
from coordconv.backends.torch.adding import has_storage
from coordconv.backends.torch.files import from_state
from coordconv.grid import Array
from coordconv.tape import NetworkModule, Tape

COMPILED = False


def _tensor(array: Array, like: Tensor | None) -> Tensor:
    tensor = torch.tensor(array)
    if like is None:
        return tensor
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)


def _is_array(part: Any) -> bool:
    """Whether NumPy has its values: not of nested, sparse, quantized and lazy tensors.

    Nor inside a transformation of ``torch.func``, such as ``torch.vmap``.
    """
    return (
        isinstance(part, Tensor)
        and not (part.is_nested or part.is_quantized or nn.parameter.is_lazy(part))
        and part.layout == torch.strided
        and has_storage(part)
    )


def _grad(*args: Any, **options: Any) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(*args, **options)
    except AssertionError as error:  # the compiled code's, of strides that it did not expect
        if "replication_pad" in str(error):
            raise NotImplementedError(
                "torch.compile fails on the gradient of replicate padding, without coordinates too"
            ) from error
        raise


def _compiled(module: nn.Module) -> Callable[[Tensor], Any]:
    torch.compiler.reset()  # else what was compiled before counts towards a limit
    return torch.compile(module, fullgraph=True)


def _modules(module: nn.Module) -> dict[str, nn.Module]:
    """Scripted modules take no hooks."""
    return {n: m for n, m in module.named_modules() if not isinstance(m, torch.jit.ScriptModule)}


def _begin_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = rate


def _conv(layer: networks.Conv) -> nn.Module:
    arguments = options.arguments(layer.geometry)
    if layer.coords:
        arguments["coords"] = layer.coords
    kind = getattr(layers if layer.coords else nn, layer.kind)
    return kind(layer.in_channels, layer.out_channels, bias=layer.bias, **arguments)


class Network(NetworkModule, nn.Sequential):
    """A :class:`coordconv.networks.Network` as a module; input ``(N, C, *S)``."""

    TAPE = Tape(
        framework=torch,
        conv=_conv,
        mean_pool=nn.AdaptiveAvgPool1d,
        tensor=_tensor,
        is_array=_is_array,
        grad=_grad,
        compiled=_compiled,
        modules=_modules,
        register_hook="register_forward_hook",
        optimizers={
            "adam": lambda parameters, epsilon: torch.optim.Adam(parameters, eps=epsilon),
            "sgd": lambda parameters, epsilon: torch.optim.SGD(parameters),
        },
        begin_step=_begin_step,
        from_state=from_state,
    )


build = Network.build
evaluate = Network.TAPE.evaluate
recorded = Network.TAPE.recorded
trainer = Network.TAPE.trainer
write_state = Network.TAPE.write_state
