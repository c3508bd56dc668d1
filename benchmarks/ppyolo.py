"""PP-YOLO's neck across frameworks: what it computes, and what its CoordConvs cost.

python benchmarks/ppyolo.py --json ppyolo.json
python benchmarks/ppyolo.py --quick

The network is that of ``ppyolo_neck.py`` at its full 23 million parameters, on the ten sizes of
image that PP-YOLO trains on, with Paddle's weights loaded in torch and Flax NNX.

The first table is about numbers, in units of bounds; anything up to 1 is right.

- ``layers`` and ``gradients``: of the 21 convolutions, each held to the float64 reference for what
  it was given in this very run, the largest error of an output and of any gradient, within the
  bound of ``coordconv.parity``, which allows for rounding and nothing else.
- ``from paddle``: the largest difference of the network's three outputs from Paddle's, in inference
  and in training, in units of what ``coordconv.parity.compare`` allows.
- ``from concat``: that from PaddleDetection's way, concatenation, in the same framework.

Gradients of two whole networks are compared in ``tests/backends/test_ppyolo.py``, with fewer
channels: among millions of numbers one is so near zero that its leaky ReLU lets the gradient
through here and not there.

The second table is about time, in Paddle and torch, eager: over that of the same network with plain
convolutions in the place of the 12 CoordConvs, in the same round. Training is forward and backward,
to the maps and every parameter, with the batch's own statistics; the batch is of one image unless
``--batch`` says otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Annotated, Any

import numpy as np
import typer

import common
import ppyolo_neck
from common import CONCAT, INFERENCE, OURS, PLAIN, TRAINING, Array, Call, Result, console
from coordconv import available_backends
from coordconv.parity import compare
from ppyolo_neck import Neck, Step

SIZES = range(320, 609, 32)
QUICK = (320, 448)
STRIDES = (32, 16, 8)
ROUNDS = 5  # at least: a step takes seconds
VARIANTS = (PLAIN, CONCAT, OURS)
AGAINST = common.against(CONCAT)
RATIOS = (CONCAT, OURS, AGAINST)
LAYERS, GRADIENTS = "layers", "gradients"


@dataclass(frozen=True)
class Size:
    """An image, which is square; see :class:`common.Shape`."""

    pixels: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return str(self.pixels)

    def data(self, steps: tuple[Step, ...], batch: int) -> tuple[list[Array], list[Array]]:
        """The backbone's maps, and gradients of the outputs."""
        sides = [self.pixels // stride for stride in STRIDES]
        return ppyolo_neck.data(steps, [(side, side) for side in sides], batch)


@dataclass(frozen=True)
class Accuracy:
    """Largest errors in units of their bounds, those of convolutions by kind, others by mode."""

    framework: str
    size: int
    layers: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    replaced: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return max(v for of in (self.layers, self.outputs, self.replaced) for v in of.values())


class Necks:
    """The variants in a framework, as :func:`common.timed` takes them."""

    def __init__(
        self, name: str, steps: tuple[Step, ...], state: Mapping[str, Array], batch: int
    ) -> None:
        without = ppyolo_neck.steps(coords=False)
        self.steps, self.batch = steps, batch
        self.necks: dict[str, Any] = {
            PLAIN: loaded(name, without, ppyolo_neck.initial_state(without)),
            CONCAT: loaded(name, steps, state, CONCAT),
            OURS: loaded(name, steps, state),
        }

    def calls(self, shape: Size, mode: str, variants: Sequence[str] = VARIANTS) -> dict[str, Call]:
        given = shape.data(self.steps, self.batch)
        maps, gradients = map(self.necks[OURS].arrays, given)
        if mode == INFERENCE:
            return {v: partial(self.necks[v].forward, maps) for v in variants}
        return {v: partial(self.necks[v].step, maps, gradients) for v in variants}

    def seconds(self, call: Call, loops: int) -> float:
        return common.wall_seconds(call, loops, lambda result: None)

    def array(self, output: Sequence[Any], shape: Size) -> Array:
        return np.concatenate([y.numpy().ravel() for y in output])


def loaded(
    name: str, steps: tuple[Step, ...], state: Mapping[str, Array], variant: str = OURS
) -> Neck:
    """The neck in a framework, with these weights."""
    neck = ppyolo_neck.build(name, steps, variant)
    neck.load_state(state)
    return neck


def accuracies(
    necks: Mapping[str, Neck], replaced: Mapping[str, Neck], size: Size, state: Mapping[str, Array]
) -> Iterator[Accuracy]:
    """What each framework computes of one image; ``replaced`` are the same by concatenation."""
    steps = next(iter(necks.values())).steps
    maps, gradients = size.data(steps, batch=1)
    modes = {INFERENCE: None, TRAINING: gradients}
    first: dict[str, dict[str, Array]] = {}
    for name, neck in necks.items():
        made = Accuracy(name, size.pixels)
        for mode, given in modes.items():
            found = neck.evaluate(maps, given)
            for what, error in ppyolo_neck.errors(steps, state, found):
                kind = GRADIENTS if what.startswith("gradient") else LAYERS
                made.layers[kind] = max(made.layers.get(kind, 0.0), error)
            if mode in first:
                made.outputs[mode] = difference(first[mode], found)
            first.setdefault(mode, found)
            if name in replaced:
                made.replaced[mode] = difference(replaced[name].evaluate(maps, given), found)
        yield made


def difference(wanted: Mapping[str, Array], found: Mapping[str, Array]) -> float:
    """The largest of the outputs, in units of what :func:`coordconv.parity.compare` allows."""
    forward = [name for name in wanted if not name.startswith("gradient")]  # all count as layers
    models = {
        key: lambda _, arrays=arrays: {name: arrays[name] for name in forward}
        for key, arrays in (("wanted", wanted), ("found", found))
    }
    rows = compare(models, wanted["map0"]).rows
    return max(row.of_bound for row in rows if row.name in ("tip0", "tip1", "tip2"))


def print_accuracies(found: Sequence[Accuracy], first: str) -> None:
    """The first table."""
    columns = (
        "of the bound",
        LAYERS,
        GRADIENTS,
        f"from {first}: {INFERENCE}",
        TRAINING,
        f"from {CONCAT}: {INFERENCE}",
        TRAINING,
    )
    table = common.table("errors in units of their bounds; up to 1 is right", *columns)
    for name in dict.fromkeys(each.framework for each in found):
        table.add_section()
        table.add_row(f"[bold]{name}[/]")
        for each in (each for each in found if each.framework == name):
            layers = (f"{each.layers[kind]:.3f}" for kind in (LAYERS, GRADIENTS))
            rest = (
                f"{of[mode]:.3f}" if mode in of else ""
                for of in (each.outputs, each.replaced)
                for mode in (INFERENCE, TRAINING)
            )
            table.add_row(str(each.size), *layers, *rest)
    console.print(table)


def print_times(name: str, results: Sequence[Result]) -> None:
    """A framework's part of the second table."""
    for mode in (INFERENCE, TRAINING):
        of = [result for result in results if (result.framework, result.mode) == (name, mode)]
        columns = "plain ms", f"{CONCAT}/plain", f"{OURS}/plain", AGAINST
        table = common.table(f"{name}, {mode}: median (quartiles)", "size", *columns)
        for result in of:
            ratios = (str(result.ratios[key]) for key in RATIOS)
            table.add_row(result.shape, f"{result.milliseconds[PLAIN].median:.4g}", *ratios)
        means = (common.geometric_mean([r.ratios[key].median for r in of]) for key in RATIOS)
        table.add_section()
        table.add_row("geometric mean", "", *(f"{mean:.3f}" for mean in means))
        console.print(table)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Two sizes, and not ten.")] = False,
    times: Annotated[bool, typer.Option(help="Measure times, too.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="How many images to time at once.")] = 1,
    seconds: common.SecondsOption = 4.0,
    json_file: common.JsonOption = None,
) -> None:
    """Hold PP-YOLO's neck in each framework to its bounds, and time it."""
    # Paddle's, in training: that it tracks statistics.
    warnings.filterwarnings("ignore", "When training, we now always track")
    console.print(common.describe(common.machine("cpu")), soft_wrap=True)
    names = [name for name in ("paddle", "torch", "flax") if name in available_backends()]
    timed = [name for name in names if name != "flax"] if times else []
    sizes = [Size(pixels) for pixels in (QUICK if quick else SIZES)]
    steps = ppyolo_neck.steps()
    state = loaded(names[0], steps, ppyolo_neck.initial_state(steps)).state()
    found: list[Accuracy] = []
    results: list[Result] = []
    with common.progress() as bar:
        task = bar.add_task("", total=len(sizes) * (1 + 2 * len(timed)))
        necks = {str(name): loaded(name, steps, state) for name in names}
        replaced = {str(n): loaded(n, steps, state, CONCAT) for n in names if n != "flax"}
        for size in sizes:
            bar.update(task, description=f"numbers: {size}")
            found += accuracies(necks, replaced, size, state)
            bar.advance(task)
        print_accuracies(found, names[0])
        if json_file is not None:
            common.write_json(json_file, "cpu", found)
        for name in timed:
            necks_of: Any = Necks(name, steps, state, batch)
            # Inference first: training moves the statistics, and those of each variant elsewhere.
            for mode, size in product((INFERENCE, TRAINING), sizes):
                bar.update(task, description=f"{name}, {mode}: {size}")
                shape: Any = size
                results.append(common.timed(name, shape, mode, necks_of, seconds, VARIANTS, ROUNDS))
                bar.advance(task)
            print_times(name, results)
            if json_file is not None:  # after each, so that what was measured is not lost
                common.write_json(json_file, "cpu", [*found, *results])
    worst = max(each.worst for each in found)
    console.print(f"largest error: {worst:.3f} of its bound")
    if not worst <= 1:
        raise typer.Exit(1)


if __name__ == "__main__":
    common.run(main)
