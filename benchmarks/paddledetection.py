"""PaddleDetection's own networks, with our layers in the place of its CoordConvs.

git clone https://github.com/PaddlePaddle/PaddleDetection
python benchmarks/paddledetection.py PaddleDetection

Needs six and PyYAML besides Paddle. The neck of PP-YOLO and the mask head of SOLOv2 are built from
the checkout's own source; a second network is the same but for its CoordConvs, which are ours, and
takes the first one's state as it is. Both run in training, from the same maps, and in units of what
``coordconv.parity.compare`` allows the table has the largest difference of what the layers inside
return (``outputs``), and of the gradients of that, of the maps and of the parameters. ``layers`` is
the largest error of our layers, against the float64 reference, in units of its rigorous bound.

With large maps gradients are left out: among millions of numbers one is so near zero that its leaky
ReLU lets the gradient through in one network and not in the other.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import common
from common import Array
from coordconv import Coordinates
from coordconv.backends.paddle import CoordConv2D, recorded
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network
from coordconv.parity import compare
from coordconv.parity.bounds import expected

import paddle  # isort: skip  # after the adapter, which keeps its warning quiet
from paddle import nn  # isort: skip
from paddle.nn import functional  # isort: skip

PACKAGES = ("", ".core", ".modeling", ".modeling.backbones", ".modeling.necks", ".modeling.heads")
GRADIENT = "gradient of "


def source(checkout: Path) -> Iterator[Any]:
    """The modules of the two networks, without what else their packages import."""
    for name in PACKAGES:
        package = types.ModuleType(f"ppdet{name}")
        package.__path__ = [str(checkout.joinpath("ppdet", *name.split(".")))]
        sys.modules[package.__name__] = package
    for name in ("necks.yolo_fpn", "heads.solov2_head"):
        yield importlib.import_module(f"ppdet.modeling.{name}")


def replace(layer: Any, coords: str | Coordinates) -> None:
    """Put a CoordConv in the place of the convolution that ``layer`` has over features and x, y."""
    out, channels, side, _ = layer.conv.weight.shape
    options = {"padding": side // 2, "bias_attr": False, "data_format": layer.conv._data_format}
    layer.conv = CoordConv2D(channels - 2, out, side, coords=coords, **options)


def neck(necks: Any, layout: str, ours: bool) -> Any:
    """The neck of PP-YOLO. Its ``data_format`` does not reach its blocks, so they are given it."""

    class Replaced(necks.CoordConv):
        def forward(self, x: Any) -> Any:
            return self.conv(x)

    necks.PPYOLODetBlock.__init__.__defaults__ = (layout,)
    made = necks.PPYOLOFPN(data_format=layout, coord_conv=True, spp=True)
    for layer in made.sublayers() if ours else ():
        if type(layer) is necks.CoordConv:
            replace(layer.conv, Coordinates.named("paddledetection"))
            layer.__class__ = Replaced
    return made


def mask_head(heads: Any, ours: bool) -> Any:
    """The mask head of SOLOv2, which concatenates to the maps of the last level."""

    class Replaced(heads.SOLOv2MaskHead):
        def forward(self, maps: Sequence[Any]) -> Any:
            first, *others = (run(x) for run, x in zip(self.convs_all_levels, maps, strict=True))
            return functional.relu(self.conv_pred(sum(others, functional.relu(first))))

    made = heads.SOLOv2MaskHead()
    if ours:
        replace(made.convs_all_levels[-1][0], "xy")
        made.__class__ = Replaced
    return made


class Flat(nn.Layer):
    """A network that takes a list, given maps one by one; it returns a tuple."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, *maps: Any) -> tuple[Any, ...]:
        y = self.network([*maps])
        return tuple(y) if isinstance(y, list) else (y,)


def evaluated(network: Flat, backward: bool, *maps: Array) -> dict[str, Array]:
    """What every layer returns in training and, if wanted, all gradients, by name."""
    y = network(*map(paddle.to_tensor, maps))
    if not backward:
        return dict(recorded(network)(*maps))
    rng = np.random.default_rng(1)
    dy = [rng.standard_normal(each.shape, np.float32) for each in y]
    trained = {name: p for name, p in network.named_parameters() if not p.stop_gradient}
    of_parameters = paddle.grad([*y], [*trained.values()], [*map(paddle.to_tensor, dy)])
    named = {f"model output[{i}]": each for i, each in enumerate(dy)}
    return dict(recorded(network, output_gradient=named)(*maps)) | {
        f"{GRADIENT}parameter {name}": gradient.numpy()
        for name, gradient in zip(trained, of_parameters, strict=True)
    }


def layer_errors(network: Flat, maps: Sequence[Array]) -> Iterator[float]:
    """Of every CoordConv's output the largest error, in units of its bound."""
    seen: list[tuple[Any, ...]] = []

    def hook(layer: Any, inputs: Any, output: Any) -> Any:
        seen.append((layer, *inputs, output))
        return output

    for layer in network.sublayers():
        if isinstance(layer, CoordConv2D):
            layer.register_forward_post_hook(hook)
    network(*map(paddle.to_tensor, maps))
    for layer, *tensors in seen:
        last = layer._data_format == "NHWC"
        x, y = (np.moveaxis(t.numpy(), -1, 1) if last else t.numpy() for t in tensors)
        weight = layer.export_weights()["weight"]
        geometry = ConvGeometry(weight.shape[2:], padding=weight.shape[2] // 2)
        conv = Conv("conv", x.shape[1], y.shape[1], geometry, layer.coords, bias=False)
        network_of_one = Network("one", x.shape[1:], (conv,))
        yield expected(network_of_one, {"conv.weight": weight}, x, None)["y"].error(y)


def main(
    checkout: Annotated[Path, typer.Argument(help="A checkout of PaddleDetection.", exists=True)],
) -> None:
    """Hold PaddleDetection's networks with our layers to what they are with its own."""
    necks, heads = source(checkout)
    head: Callable[..., Any] = partial(mask_head, heads)
    of_head = [(256, 40 >> i, 56 >> i) for i in range(4)]
    cases: list[tuple[str, str, Callable[..., Any], list[tuple[int, int, int]], bool]] = []
    for layout in ("NCHW", "NHWC"):
        for h, w, backward in ((3, 4, True), (10, 13, False)):  # not square: that axes tell
            shapes = [(512 << i, h << 2 - i, w << 2 - i) for i in range(3)]
            name = f"PPYOLOFPN, {32 * h}x{32 * w}"
            cases.append((name, layout, partial(neck, necks, layout), shapes, backward))
    cases.append(("SOLOv2MaskHead, 160x224", "NCHW", head, of_head, True))
    columns = "network", "layout", "CoordConvs", "layers", "outputs", "gradients", "arrays"
    table = common.table("errors in units of their bounds; up to 1 is right", *columns)
    largest = 0.0
    for name, layout, build, shapes, backward in cases:
        paddle.seed(0)
        theirs, ours = (Flat(build(ours=ours)) for ours in (False, True))
        if any(problems := ours.set_state_dict(theirs.state_dict())):
            raise AssertionError(f"{name}: missing and unexpected: {problems}")
        rng = np.random.default_rng(0)
        maps = [rng.standard_normal((2, *shape), np.float32) for shape in shapes]
        if layout == "NHWC":
            maps = [np.moveaxis(x, 1, -1).copy() for x in maps]
        models = {"theirs": partial(evaluated, theirs, backward)}
        models["ours"] = partial(evaluated, ours, backward)
        report = compare(models, maps)
        if report.missing["ours"] or report.extra["ours"]:
            raise AssertionError(f"{name}: {report.missing}, {report.extra}")
        layers = [*layer_errors(ours, maps)]
        outputs = [r.of_bound for r in report.rows if not r.name.startswith(GRADIENT)]
        gradients = [r.of_bound for r in report.rows if r.name.startswith(GRADIENT)]
        found = [f"{max(each):.3g}" if each else "" for each in (layers, outputs, gradients)]
        table.add_row(name, layout, str(len(layers)), *found, str(len(report.rows)))
        largest = max(largest, *layers, *outputs, *gradients)
    common.console.print(table)
    if not largest <= 1:
        raise typer.Exit(1)


if __name__ == "__main__":
    common.run(main)
