"""What a layer keeps in memory: bytes saved for backward, and the peak, in torch.

python benchmarks/memory.py
python benchmarks/memory.py --compiled --device cuda
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import common
import in_torch
from common import CONCAT, INFERENCE, OURS, PLAIN, TRAINING, Call, Shape, console
from coordconv.position_bias import MAP

_VARIANTS = PLAIN, CONCAT, OURS, MAP


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
    peaks = {}
    for mode in (INFERENCE, TRAINING):
        calls = framework.calls(shape, mode, _VARIANTS)
        peaks[mode] = {name: peak_bytes(call, device) for name, call in calls.items()}
    modules, x = framework.modules(shape, _VARIANTS)
    x.requires_grad_()
    return [
        Memory(
            str(shape),
            name,
            common.forced(name, partial(saved_bytes, module, x))(),
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

    The target: the way "map" saves for backward what the plain convolution saves, and at most one
    map of one sample besides. The layer saves no more than the way that it chooses: for "append"
    that is the input with its coordinates, in place of the input, as concatenation saves it.
    """
    chosen = common.chosen_shapes(shapes, device)
    kind = "compiled" if compiled else "eager"
    title = f"MiB saved for backward, torch {kind}"
    saved = common.table(title, "shape", *_VARIANTS, "map's limit", "")
    title = f"MiB at the peak, over input and weights, torch {kind}"
    columns = ("infer: plain", CONCAT, OURS, "train: plain", CONCAT, OURS)
    peak = common.table(title, "shape", *columns)
    found: list[Memory] = []
    missed = 0
    with common.progress() as progress:
        for shape in progress.track(chosen, description="shapes"):
            rows = measure(shape, device, compiled)
            found += rows
            plain, concat, ours, by_map = rows
            limit = plain.saved + plain.map
            met = by_map.saved <= limit and ours.saved <= max(by_map.saved, concat.saved)
            missed += not met
            saved.add_row(
                str(shape),
                *(_mib(r.saved) for r in rows),
                _mib(limit),
                "[green]met[/]" if met else "[red]missed[/]",
            )
            peaks = [r.peak_inference for r in (plain, concat, ours)]
            peaks += [r.peak_training for r in (plain, concat, ours)]
            peak.add_row(str(shape), *map(_mib, peaks))
    console.print(saved)
    console.print("map's limit: the plain convolution's, and one map of one sample")
    console.print("ours: at most what its two ways keep, map's and concat's")
    console.print(peak)
    console.print(f"saved for backward: {len(chosen) - missed} of {len(chosen)} shapes met")
    if json_file is not None:
        common.write_json(json_file, device, found)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


if __name__ == "__main__":
    common.run(main)
