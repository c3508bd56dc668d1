"""What a layer keeps in memory: bytes saved for backward, and the peak, in torch.

python benchmarks/memory.py
python benchmarks/memory.py --compiled --device cuda
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import common
import in_torch
from common import CONCAT, INFERENCE, OURS, PLAIN, TRAINING, Call, Shape, console

_VARIANTS = PLAIN, CONCAT, OURS


@dataclass(frozen=True)
class Memory:
    """Bytes of one variant; the peaks are over what was held before: input and weights."""

    shape: str
    variant: str
    saved: int
    peak_inference: int
    peak_training: int
    map: int


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """What autograd keeps until the backward pass, the parameters aside: each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)  # noqa: F841  # holds what was saved, so that no address is used twice
    return sum(storages.values())


def peak_bytes(call: Call, device: str) -> int:
    """The most that torch's allocator had given out during a call, over what it had before."""
    call()  # compiles, fills caches
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it logs the start and end of each
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        result = call()
    del result  # only now: its end is no part of the call
    records = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    records.sort(key=lambda e: e.start_ns())
    sizes: list[int] = [e.nbytes() for e in records]
    return max(itertools.accumulate(sizes, initial=0))


def measure(shape: Shape, device: str, compiled: bool) -> list[Memory]:
    """All variants of a layer."""
    framework = in_torch.Torch(device, compiled)
    peaks = {
        mode: {name: peak_bytes(call, device) for name, call in calls.items()}
        for mode in (INFERENCE, TRAINING)
        if (calls := framework.calls(shape, mode))
    }
    modules, x = framework.modules(shape)
    x.requires_grad_()
    return [
        Memory(
            str(shape),
            name,
            saved_bytes(module, x),
            peaks[INFERENCE][name],
            peaks[TRAINING][name],
            shape.map_bytes,
        )
        for name, module in modules.items()
    ]


def main(
    device: common.DeviceOption = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="A compiled block with the ReLU that follows it.")
    ] = False,
    shapes: common.ShapesOption = None,
    json_file: common.JsonOption = None,
) -> None:
    """Count what plain convolution, concatenation and CoordConv keep in memory, in torch.

    The target: CoordConv saves for backward what the plain convolution saves, and at most one map
    of one sample besides.
    """
    chosen = common.chosen_shapes(shapes, device)
    kind = "compiled" if compiled else "eager"
    title = f"MiB saved for backward, torch {kind}"
    saved = common.table(title, "shape", *_VARIANTS, "limit", "")
    title = f"MiB at the peak, over input and weights, torch {kind}"
    columns = ("infer: plain", CONCAT, OURS, "train: plain", CONCAT, OURS)
    peak = common.table(title, "shape", *columns)
    found: list[Memory] = []
    missed = 0
    with common.progress() as progress:
        for shape in progress.track(chosen, description="shapes"):
            rows = measure(shape, device, compiled)
            found += rows
            plain, concat, ours = (next(r for r in rows if r.variant == v) for v in _VARIANTS)
            limit = plain.saved + plain.map
            missed += ours.saved > limit
            saved.add_row(
                str(shape),
                *map(_mib, (plain.saved, concat.saved, ours.saved, limit)),
                "[red]missed[/]" if ours.saved > limit else "[green]met[/]",
            )
            peaks = [r.peak_inference for r in (plain, concat, ours)]
            peaks += [r.peak_training for r in (plain, concat, ours)]
            peak.add_row(str(shape), *map(_mib, peaks))
    console.print(saved)
    console.print("limit: the plain convolution's, and one map of one sample")
    console.print(peak)
    console.print(f"saved for backward: {len(chosen) - missed} of {len(chosen)} shapes met")
    if json_file is not None:
        common.write_json(json_file, device, found)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


if __name__ == "__main__":
    common.run(main)
