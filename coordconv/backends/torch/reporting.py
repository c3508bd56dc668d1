"""Where a network of torch gets its position from: what :mod:`coordconv.position_report` asks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coordconv import position_report as core
from coordconv.backends.torch.networks import recorded
from coordconv.position_report import PositionReport
from coordconv.recording import OUTPUT
from coordconv.tape import to_numpy

# Modules that are not called.
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def position_report(
    model: nn.Module,
    input: Tensor,
    *,
    draws: int = 16,
    seed: int = 0,
    layers: Collection[str] | None = None,
    **kwargs: Any,
) -> PositionReport:
    """How much of each layer's output is a function of position alone.

    What is measured, and what that cannot tell: :func:`coordconv.position_report.position_report`.
    Every module is in evaluation mode meanwhile. Afterwards the model, its modes and buffers and
    PyTorch's random numbers to come are as they were; a lazy module keeps its first call's shapes.

    Args:
        model: any module.
        input: images ``(N, C, *S)``, floating-point, as the model takes them; a few will do.
        draws: how many times each image's pixels are shuffled.
        seed: of the shuffling.
        layers: the names of the modules to report on; by default of all, with ``"model output"``.
        **kwargs: what else to call the model with.

    Returns:
        A report, to print or to ``plot``.

    Raises:
        TypeError: ``model`` is no module, ``input`` no floating-point tensor.
        ValueError: ``kwargs`` that ``recorded`` takes itself; ``input`` is not ``(N, C, *S)``, not
            finite, or has no image that varies; ``draws`` below 2; ``layers`` that were not called;
            no layer that can be measured.

    Source:
        As in :func:`coordconv.position_report.position_report`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
        >>> report = position_report(model, torch.rand(4, 3, 16, 16))
        >>> report["0"].constant > 0, report["0"].constant_middle < 1e-9
        (True, True)
        >>> report.left_out["2"]
        "not (N, C, *S) as the input's (4, 3, 16, 16)"
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got a {type(input).__name__}")
    kinds = {
        name or OUTPUT: type(module).__name__
        for name, module in model.named_modules()
        if not isinstance(module, _LISTS)
    }
    if taken := sorted({"names", "output_gradient"} & kwargs.keys()):
        raise ValueError(
            f"kwargs must not have {', '.join(taken)}, which recorded takes itself: wrap the model"
        )
    with _evaluated(model):
        return core.position_report(
            recorded(model, **kwargs),
            to_numpy(input),
            draws=draws,
            seed=seed,
            layers=layers,
            kinds=kinds,
        )


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Within it, all modules are in evaluation mode and draw no numbers that others would get.

    The flags alone are set: ``eval`` may do more in a module that is not torch's own, such as to
    merge its weights, which setting the mode back does not undo for each module by itself.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in (*model.parameters(), *model.buffers()) if p.is_cuda}
    with torch.random.fork_rng(devices):
        try:
            for module in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
