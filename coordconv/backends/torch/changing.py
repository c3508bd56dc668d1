"""Coordinates for the convolutions of a network of torch, in place, and back.

:mod:`coordconv.tape_changing` does it; here is what torch alone has.

Example:
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    >>> model(torch.ones(1, 3, 8, 8)).sum().backward()
    >>> optimizer.step()
    >>> changes = add_coords(model, layers="0")
    >>> print(changes)
    layer  from    to                 parameters added
    0      Conv2d  CoordConv2d('xy')  144
    >>> changes.update_optimizer(optimizer)
    >>> optimizer.state[model[0].weight]["momentum_buffer"].shape
    torch.Size([8, 5, 3, 3])
    >>> print(remove_coords(model, torch.rand(2, 3, 16, 16)))
    layer  from               to      parameters added  variance share
    0      CoordConv2d('xy')  Conv2d  -144              0.00%
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

from coordconv.backends.torch import adding, networks, options
from coordconv.backends.torch.converting import CONVERSION
from coordconv.backends.torch.layers import (
    CoordConv1d,
    CoordConv2d,
    CoordConv3d,
    CoordConvTranspose1d,
    CoordConvTranspose2d,
    CoordConvTranspose3d,
    TorchCoordLayer,
)
from coordconv.tape_changing import Appending, NetworkConversion

_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.jit.ScriptModule,
    torch.optim.swa_utils.AveragedModel,
)
# Of libraries that need not be there, and of torch, which has no public name for the first.
_WRAPPER_NAMES = {
    "OptimizedModule",
    "FullyShardedDataParallel",
    "ModelEma",
    "ModelEmaV2",
    "ModelEmaV3",
}


class _Appending(Appending, TorchCoordLayer):
    in_channels: int
    groups: int

    def _appended(self, input: Tensor) -> Tensor:
        options.check(input, self.rank, self.in_channels, len(self.coords))
        window = options.window(None, input, self.rank)
        return adding.append(self, input, self.rank, self.groups, window)  # type: ignore[no-any-return]


def _modules(model: Any) -> dict[str, Any]:
    """All modules by name, one that is used twice under each; an error if one wraps a network."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        kind = type(module).__name__
        if isinstance(module, _WRAPPERS) or kind in _WRAPPER_NAMES:
            raise ValueError(
                f"model must be the network as it is before {kind} wraps it: change what is inside "
                f"{name or 'model'}, and wrap that anew"
            )
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise ValueError(f"model is quantized ({name} is a quantized {kind}): change it before")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        inside = {id(module) for module in modules.values()}
        for each in gc.get_objects():
            if issubclass(type(each), _WRAPPERS[1]) and inside & {*map(id, each.modules())}:
                raise ValueError(
                    "model is inside of a DistributedDataParallel, which does not reduce gradients "
                    "of kernels that change: give it coordinates first, on every rank"
                )
    return modules


_NETWORKS = NetworkConversion(
    conversion=CONVERSION,
    tape=networks.Network.TAPE,
    layer=TorchCoordLayer,
    classes={
        nn.Conv1d: CoordConv1d,
        nn.Conv2d: CoordConv2d,
        nn.Conv3d: CoordConv3d,
        nn.ConvTranspose1d: CoordConvTranspose1d,
        nn.ConvTranspose2d: CoordConvTranspose2d,
        nn.ConvTranspose3d: CoordConvTranspose3d,
    },
    appending=_Appending,
    modules=_modules,
)

add_coords = _NETWORKS.add_coords
remove_coords = _NETWORKS.remove_coords
