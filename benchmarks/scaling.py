"""How the overhead over a plain convolution grows with batch, size and channels.

python benchmarks/scaling.py --frameworks torch-eager --picture scaling.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import common
from common import CONCAT, INFERENCE, OURS, PLAIN, TRAINING, Result, Shape, console

BASE = Shape(8, 32, 32, (56, 56), 3)
SWEEPS: Mapping[str, Mapping[int, Shape]] = {
    "batch": {n: replace(BASE, batch=n) for n in (1, 2, 4, 8, 16, 32, 64)},
    "size": {n: replace(BASE, size=(n, n)) for n in (7, 14, 28, 56, 112, 224)},
    "channels": {n: replace(BASE, channels=n, out=n) for n in (4, 8, 16, 32, 64, 128)},
}
_DRAWN_TO = 2.5
_LINES = [(m, v) for m in (INFERENCE, TRAINING) for v in (CONCAT, OURS)]


def print_results(name: str, results: Sequence[Result]) -> None:
    """A framework's tables, one a sweep."""
    found = {(r.shape, r.mode): r for r in results if r.framework == name}
    for sweep, shapes in SWEEPS.items():
        columns = "plain ms", "infer: concat", OURS, "train: concat", OURS
        table = common.table(f"{name}: time over plain's, by {sweep}", sweep, *columns)
        for value, shape in shapes.items():
            table.add_row(
                str(value),
                f"{found[str(shape), INFERENCE].milliseconds[PLAIN].median:.3g}",
                *(str(found[str(shape), mode].ratios[variant]) for mode, variant in _LINES),
            )
        console.print(table)


def draw(path: Path, results: Sequence[Result]) -> None:
    """Write the picture: a row a framework, a column a sweep."""
    from matplotlib.figure import Figure  # only the pictures need it

    names = list(dict.fromkeys(r.framework for r in results))
    found = {(r.framework, r.shape, r.mode): r.ratios for r in results}
    figure = Figure(figsize=(12, 1 + 3 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), len(SWEEPS), sharex="col", sharey=True, squeeze=False)
    for axes, name in zip(grid, names, strict=True):
        axes[0].set_ylabel(f"{name}\ntime over plain's")
        for axis, shapes in zip(axes, SWEEPS.values(), strict=True):
            axis.axhline(1.0, color="black", linewidth=1)
            for mode, variant in _LINES:
                spreads = [found[name, str(shape), mode][variant] for shape in shapes.values()]
                colour = "C0" if variant == CONCAT else "C1"
                style = "-" if mode == INFERENCE else "--"
                medians = [s.median for s in spreads]
                axis.plot(list(shapes), medians, style, color=colour, label=f"{variant}, {mode}")
                ends = [s.low for s in spreads], [s.high for s in spreads]
                axis.fill_between(list(shapes), *ends, color=colour, alpha=0.15, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(shapes), labels=map(str, shapes))
            axis.set(ylim=(0.8, _DRAWN_TO))
    for axis, sweep in zip(grid[-1], SWEEPS, strict=True):
        axis.set_xlabel(sweep)
    grid[0, -1].legend()
    figure.suptitle(f"{BASE}, and one of its numbers changed; quartiles shaded")
    figure.savefig(path, dpi=110)


def main(
    device: common.DeviceOption = "cpu",
    frameworks: common.FrameworksOption = None,
    seconds: common.SecondsOption = 2.0,
    json_file: common.JsonOption = None,
    picture: common.PictureOption = None,
) -> None:
    """Time a layer at many batches, sizes and numbers of channels, one at a time."""
    names = common.chosen_frameworks(frameworks)
    shapes = dict.fromkeys(shape for sweep in SWEEPS.values() for shape in sweep.values())
    cases = [(shape, mode) for mode in (INFERENCE, TRAINING) for shape in shapes]
    results = []
    for name, found in common.timed_all(names, device, cases, seconds):
        results += found
        print_results(name, results)
    if json_file is not None:
        common.write_json(json_file, device, results)
    if picture is not None:
        draw(picture, results)


if __name__ == "__main__":
    common.run(main)
