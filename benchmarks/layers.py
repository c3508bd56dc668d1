"""What a layer costs, next to the framework's plain convolution and to concatenation.

python benchmarks/layers.py --json results.json --picture layers.png
python benchmarks/layers.py --check results.json
python benchmarks/layers.py --ways
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import common
from common import (
    CONCAT,
    FUSED,
    INFERENCE,
    OURS,
    PLAIN,
    TRAINING,
    VARIANTS,
    WAYS,
    Result,
    Spread,
    against,
    console,
)
from coordconv.position_bias import MAP

# The goals of the project's design, section 8: ratios to the plain convolution.
TARGETS = {  # (geometric mean, worst)
    ("torch-eager", INFERENCE): (1.04, 1.25),
    ("torch-eager", TRAINING): (1.04, 1.25),
    ("torch-compiled", INFERENCE): (0.95, 1.12),
    ("torch-compiled", TRAINING): (1.00, 1.12),
    ("jax-jit", INFERENCE): (0.92, 1.08),
    ("jax-jit", TRAINING): (1.05, 1.20),
    ("paddle-eager", INFERENCE): (0.82, 1.15),
    ("paddle-eager", TRAINING): (0.83, 1.15),
}
# Each shape's ratio to concatenation: a layer may itself append.
AGAINST_CONCAT = 1.03
AGAINST = against(CONCAT)
# Of torch's eager inference, on each shape whose output is at most so many times its input.
FUSED_TARGET, FUSED_MOST = 1.03, 4
_DRAWN = 0.5, 3.0  # what lies beyond is drawn there


@dataclass(frozen=True)
class Check:
    """A target and what was measured.

    ``over`` counts the shapes over the limit, of the ``shapes`` measured, of ``expected``.
    """

    framework: str
    label: str
    limit: float
    value: float = math.nan
    where: str = ""
    over: int = 0
    shapes: int = 0
    expected: int = 0

    @property
    def met(self) -> bool:
        return self.value <= self.limit and self.shapes == self.expected


def check(results: Iterable[Result], device: str) -> list[Check]:
    """Every target against the results."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault((result.framework, result.mode), []).append(result)
    expected = len(common.shapes(device))
    checks = []
    for (name, mode), (mean, worst) in TARGETS.items():
        of = found.get((name, mode), [])
        label, value = f"{mode}: geometric mean", _mean(of, OURS)
        checks.append(Check(name, label, mean, value, shapes=len(of), expected=expected))
        each = [("worst", OURS, worst), ("against concat", AGAINST, AGAINST_CONCAT)]
        for which, key, limit in each:
            medians = {r.shape: r.ratios[key].median for r in of if key in r.ratios}
            where = max(medians, key=medians.__getitem__, default="")
            value, over = medians.get(where, math.nan), sum(v > limit for v in medians.values())
            label = f"{mode}: {which}"
            checks.append(Check(name, label, limit, value, where, over, len(of), expected))
    small = {str(s) for s in common.shapes(device) if s.output_over_input <= FUSED_MOST}
    of = [r for r in found.get(("torch-eager", INFERENCE), []) if r.shape in small]
    medians = {r.shape: r.ratios[FUSED].median for r in of if FUSED in r.ratios}
    where = max(medians, key=medians.__getitem__, default="")
    value, over = medians.get(where, math.nan), sum(v > FUSED_TARGET for v in medians.values())
    of_fused = FUSED_TARGET, value, where, over, len(medians), len(small)
    checks.append(Check("torch-eager", f"{INFERENCE}: worst fused", *of_fused))
    return checks


def print_checks(checks: list[Check]) -> None:
    """The targets, by framework, and how many are met."""
    columns = "target", "found", "limit", "", "over", "worst at"
    table = common.table("targets; over: the shapes over the limit", *columns)
    for name in dict.fromkeys(c.framework for c in checks):
        table.add_section()
        table.add_row(f"[bold]{name}[/]")
        for c in (c for c in checks if c.framework == name):
            by = c.value / c.limit - 1
            verdict = f"[green]met[/] by {-by:.0%}" if by <= 0 else f"[red]missed[/] by {by:.0%}"
            if math.isnan(c.value):
                verdict = "[yellow]not measured[/]"
            table.add_row(
                c.label,
                f"{c.value:.3f}",
                f"{c.limit:.2f}",
                verdict,
                f"{c.over}/{c.shapes}" if c.where else "",
                c.where,
            )
    console.print(table)
    console.print(f"{sum(c.met for c in checks)} of {len(checks)} targets met")
    if any(c.shapes < c.expected for c in checks):
        console.print("A target that was not measured on every shape does not count as met.")


def print_results(name: str, results: list[Result]) -> None:
    """A framework's tables."""
    for mode in (INFERENCE, TRAINING):
        of = [r for r in results if (r.framework, r.mode) == (name, mode)]
        if not of:
            continue
        keys = [CONCAT, OURS, *[FUSED] * (mode == INFERENCE), AGAINST]
        columns = ["plain ms", *(key if key == AGAINST else f"{key}/plain" for key in keys)]
        table = common.table(f"{name}, {mode}: median (quartiles)", "shape", *columns)
        for r in of:
            table.add_row(r.shape, _ms(r.milliseconds[PLAIN]), *_cells(r, keys))
        table.add_section()
        table.add_row("geometric mean", "", *(f"{_mean(of, k):.3f}" for k in keys))
        table.add_row("worst", "", *(f"{max(_medians(of, k), default=math.nan):.3f}" for k in keys))
        console.print(table)


def print_ways(name: str, results: list[Result]) -> None:
    """A framework's choices between append and map, where both were timed.

    ``chosen`` is the layer as it is, over the plain convolution; ``chosen/best`` is the layer over
    the faster of the two ways in the same round. Well above 1, the other way was the right one.
    """
    for mode in (INFERENCE, TRAINING):
        of = [r for r in results if (r.framework, r.mode) == (name, mode) and MAP in r.ratios]
        if not of:
            continue
        columns = "append/plain", "map/plain", "chosen", "chosen/best"
        table = common.table(f"{name}, {mode}: append or map", "shape", *columns)
        best = [min(WAYS, key=lambda way: _median(r, way)) for r in of]
        to_best = [r.ratios[against(way)] for r, way in zip(of, best, strict=True)]
        for r, ratio in zip(of, to_best, strict=True):
            ways = (f"{_median(r, w):.2f}" if w in r.ratios else "minutes" for w in WAYS)
            table.add_row(r.shape, *ways, str(r.ratios[OURS]), str(ratio))
        table.add_section()
        means = (_mean(of, key) for key in (*WAYS, OURS))
        mean = common.geometric_mean([ratio.median for ratio in to_best])
        table.add_row("geometric mean", *(f"{value:.3f}" for value in means), f"{mean:.3f}")
        mean = common.geometric_mean([_median(r, way) for r, way in zip(of, best, strict=True)])
        table.add_row("of the better way", "", "", f"{mean:.3f}")
        console.print(table)


def _cells(result: Result, keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        if key not in result.ratios:
            yield "minutes"
        else:  # the last column has no room for quartiles
            yield f"{_median(result, key):.2f}" if key == AGAINST else str(result.ratios[key])


def _median(result: Result, key: str) -> float:
    return result.ratios[key].median if key in result.ratios else math.inf


def _ms(spread: Spread) -> str:
    return f"{spread.median:.3g}"


def _medians(results: list[Result], key: str) -> list[float]:
    return [r.ratios[key].median for r in results if key in r.ratios]


def _mean(results: list[Result], key: str) -> float:
    return common.geometric_mean(_medians(results, key))


def load(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """The machine and the results in a file that ``--json`` wrote."""
    contents = json.loads(path.read_text())
    results = [
        Result(
            **{
                **fields,
                **{
                    key: {name: Spread(**spread) for name, spread in fields[key].items()}
                    for key in ("milliseconds", "ratios")
                },
            }
        )
        for fields in contents["results"]
    ]
    return contents["machine"], results


def draw(path: Path, results: list[Result]) -> None:
    """Write the picture: the ratios of each shape, with their quartiles, and the limit."""
    from matplotlib.figure import Figure  # only the pictures need it

    least, most = _DRAWN
    names = list(dict.fromkeys(r.framework for r in results))
    shapes = list(dict.fromkeys(r.shape for r in results))
    figure = Figure(figsize=(2.5 + 2.8 * len(names), 2.5 + 0.5 * len(shapes)), layout="constrained")
    grid = figure.subplots(2, len(names), sharex=True, sharey=True, squeeze=False)
    for axes, mode in zip(grid, (INFERENCE, TRAINING), strict=True):
        for axis, name in zip(axes, names, strict=True):
            axis.axvline(1.0, color="black", linewidth=1)
            of = [r for r in results if (r.framework, r.mode) == (name, mode)]
            for variant, offset, marker in ((CONCAT, 0.15, "s"), (OURS, -0.15, "o")):
                shown = [r for r in of if variant in r.ratios]
                spreads = [r.ratios[variant] for r in shown]
                medians = [min(max(s.median, least), most) for s in spreads]
                axis.errorbar(
                    medians,
                    [shapes.index(r.shape) - offset for r in shown],
                    xerr=(
                        [max(m - s.low, 0) for m, s in zip(medians, spreads, strict=True)],
                        [max(s.high - m, 0) for m, s in zip(medians, spreads, strict=True)],
                    ),
                    fmt=marker,
                    markersize=4,
                    linewidth=1,
                    label=variant,
                )
            axis.set(title=f"{name}, {mode}", xscale="log", yticks=range(len(shapes)))
            axis.set_yticklabels(shapes)
            axis.grid(axis="y", alpha=0.3)
    grid[0, 0].invert_yaxis()
    grid[0, 0].set_xticks(
        ticks := [least, 0.8, 1, 1.2, 1.5, 2, most], labels=[f"{t:g}" for t in ticks]
    )
    grid[0, 0].set_xlim(0.95 * least, 1.05 * most)
    grid[0, 0].minorticks_off()
    for axis in grid[-1]:
        axis.set_xlabel(f"time over plain's (up to {least:g}, from {most:g})")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=110)


def main(
    device: common.DeviceOption = "cpu",
    frameworks: common.FrameworksOption = None,
    shapes: common.ShapesOption = None,
    modes: Annotated[
        str, typer.Option(help=f"Comma-separated: {INFERENCE}, {TRAINING}.")
    ] = f"{INFERENCE},{TRAINING}",
    ways: Annotated[
        bool,
        typer.Option(
            "--ways", help="Time both ways of the layer, too, append and map, and judge its choice."
        ),
    ] = False,
    seconds: common.SecondsOption = 4.0,
    json_file: common.JsonOption = None,
    check_file: Annotated[
        Path | None,
        typer.Option(
            "--check",
            help="Measure nothing: print each target as met or missed by what --json wrote, and "
            "exit with 1 unless all are met.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    picture: common.PictureOption = None,
) -> None:
    """Time plain convolution, concatenation and CoordConv, interleaved, in every framework.

    Every ratio is the median of those within a round, in which each variant ran once.
    """
    if check_file is not None:
        measured_on, results = load(check_file)
        console.print(common.describe(measured_on), soft_wrap=True)
        checks = check(results, measured_on["device"])
        print_checks(checks)
        if picture is not None:
            draw(picture, results)
        if not all(c.met for c in checks):
            raise typer.Exit(1)
        return
    names = common.chosen_frameworks(frameworks)
    if unknown := set(modes.split(",")) - {INFERENCE, TRAINING}:
        raise common.fail(f"--modes: {', '.join(unknown)} not among {INFERENCE}, {TRAINING}")
    cases = [
        (shape, mode) for mode in modes.split(",") for shape in common.chosen_shapes(shapes, device)
    ]
    variants = (*VARIANTS, *WAYS) if ways else VARIANTS
    results = []
    for name, found in common.timed_all(names, device, cases, seconds, variants):
        results += found
        print_results(name, results)
        print_ways(name, results)
        if json_file is not None:  # after each, so that what was measured is not lost
            common.write_json(json_file, device, results)
    print_checks([c for c in check(results, device) if c.shapes])
    if picture is not None:
        draw(picture, results)


if __name__ == "__main__":
    common.run(main)
