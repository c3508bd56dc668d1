"""The Paddle layers: against the definition, against Paddle itself, and under its users' habits."""

import copy
import itertools
import pickle

import numpy as np
import pytest

paddle = pytest.importorskip("paddle")

from paddle import nn
from paddle.nn import initializer

from coordconv import Coordinates, coordinate_grid, load_weights, networks, save_weights
from coordconv.backends import paddle as backend
from coordconv.backends.paddle import (
    AddCoords,
    CoordConv1D,
    CoordConv1DTranspose,
    CoordConv2D,
    CoordConv2DTranspose,
    CoordConv3D,
    CoordConv3DTranspose,
)
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Linear, Network
from coordconv.parity.comparison import Expected, expected
from coordconv.reference import Reference
from definition import gamma

LAYERS = {1: CoordConv1D, 2: CoordConv2D, 3: CoordConv3D}
TRANSPOSED = {1: CoordConv1DTranspose, 2: CoordConv2DTranspose, 3: CoordConv3DTranspose}
FORMATS = {1: ("NCL", "NLC"), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}
SHAPES = {1: (6,), 2: (4, 6), 3: (5, 4, 6)}  # of the inputs of OTHER_RANKS and TRANSPOSED_OPTIONS
KERNELS = {1: (3,), 2: (3, 2), 3: (3, 2, 2)}

# Options as Paddle has them, and the geometry that they must mean.
NESTED = [[0, 0], [0, 0], [1, 2], [0, 3]]  # batch and channels first, as data_format has them
ZERO_PADDINGS = [
    ({}, {}),
    ({"padding": 2}, {"padding": 2}),
    ({"padding": [2, 1]}, {"padding": (2, 1)}),
    ({"padding": (1, 1, 2, 2)}, {"padding": (1, 2)}),
    ({"padding": [1, 2, 0, 3]}, {"padding": ((1, 2), (0, 3))}),
    ({"padding": NESTED}, {"padding": ((1, 2), (0, 3))}),
    ({"padding": "SAME"}, {"padding": "same"}),
    ({"padding": "same", "stride": (2, 3)}, {"padding": "same", "stride": (2, 3)}),
    ({"padding": "SAME", "dilation": 2}, {"padding": "same"}),  # Paddle undoes the dilation
    ({"padding": "VALID", "dilation": (1, 2)}, {"dilation": (1, 2)}),
    (
        {"padding": 2, "stride": (2, 1), "dilation": (1, 2)},
        {"padding": 2, "stride": (2, 1), "dilation": (1, 2)},
    ),
]
COPYING = [
    ({"padding": p, "padding_mode": mode, **more}, {"padding": p, "padding_mode": mode, **more})
    for mode in ("reflect", "replicate", "circular")
    for p, more in ((1, {}), (3, {"stride": 2, "dilation": 2}))
]
# Of the transposed layers: (rank, Paddle's options, those of the geometry).
TRANSPOSED_OPTIONS = [
    *(
        (rank, options, meant)
        for rank in (1, 2, 3)
        for options, meant in (
            ({}, {}),
            ({"stride": 2}, {"stride": 2}),
            ({"padding": 1, "stride": 3}, {"padding": 1, "stride": 3}),
            ({"dilation": 2, "groups": 2}, {"dilation": 2, "groups": 2}),
            ({"groups": 4, "stride": 2}, {"groups": 4, "stride": 2}),
            ({"padding": "VALID", "dilation": 2}, {"dilation": 2}),
            ({"stride": 2, "output_padding": 1}, {"stride": 2, "output_padding": 1}),
            (
                {"stride": 3, "padding": 1, "output_padding": [2] * rank},
                {"stride": 3, "padding": 1} | {"output_padding": 2},
            ),
        )
    ),
    # "SAME" cuts off what it would add to the input of a plain convolution, and undoes dilation
    (1, {"padding": "SAME", "stride": 2, "dilation": 2}, {"padding": ((0, 1),), "stride": 2}),
    (1, {"padding": "same"}, {"padding": 1}),
    (1, {"padding": [1, 2]}, {"padding": ((1, 2),)}),
    (1, {"padding": [[0, 0], [0, 0], [0, 2]], "stride": 2}, {"padding": ((0, 2),), "stride": 2}),
    (2, {"padding": "SAME", "stride": (2, 3)}, {"padding": ((0, 1), (0, 0)), "stride": (2, 3)}),
    (2, {"padding": "SAME", "dilation": 3}, {"padding": ((1, 1), (0, 1))}),
    (2, {"padding": [2, 1], "dilation": (1, 3)}, {"padding": (2, 1), "dilation": (1, 3)}),
    (2, {"padding": [1, 2, 0, 1], "groups": 4}, {"padding": ((1, 2), (0, 1)), "groups": 4}),
    (
        2,
        {"padding": [1, 0, 0, 1], "stride": (2, 3), "output_padding": [1, 2]},
        {"padding": ((1, 0), (0, 1)), "stride": (2, 3), "output_padding": (1, 2)},
    ),
    (3, {"padding": "SAME", "stride": 2}, {"padding": (1, 0, 0), "stride": 2}),
    (
        3,
        {"padding": [1, 0, 0, 2, 1, 1], "stride": (1, 2, 3), "output_padding": [0, 1, 2]},
        {
            "padding": ((1, 0), (0, 2), (1, 1)),
            "stride": (1, 2, 3),
            "output_padding": (0, 1, 2),
        },
    ),
]
COORDS = [
    "xy",
    "yx",
    "x",
    "r",
    "xyr",
    Coordinates("yrx", r_center=0.5, span=(0, 1)),
    Coordinates("xyr", align="edges"),
    Coordinates("xyr", outside="extend"),
    Coordinates("yx", align="edges", outside="extend", span=(3, -1)),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integers(*shape, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def in_format(options, data_format):
    if options.get("padding") == NESTED and data_format == "NHWC":
        return options | {"padding": [NESTED[0], *NESTED[2:], NESTED[1]]}
    return options


def last(layer):
    return layer._data_format.endswith("C")


def fill(layer, draw):
    """Give every parameter its own data."""
    for i, parameter in enumerate(layer.parameters()):
        parameter.set_value(draw(*parameter.shape, seed=10 + i))


def run(layer, x, dy, **call):
    """Output and gradients by name, channels first, for arrays that have the channels first."""
    to, back = (1, -1) if last(layer) else (1, 1), (-1, 1) if last(layer) else (1, 1)
    given = paddle.to_tensor(np.moveaxis(x, *to), stop_gradient=False)
    y = layer(given, **call)
    tensors = {"x": given, **dict(layer.named_parameters())}
    gradients = paddle.grad(y, list(tensors.values()), paddle.to_tensor(np.moveaxis(dy, *to)))
    found = {"y": y, **dict(zip(tensors, gradients, strict=True))}
    return {
        name: np.moveaxis(t.numpy(), *back) if name in "xy" else t.numpy()
        for name, t in found.items()
    }


def wanted(layer, geometry, x, dy, unit=2.0**-24):
    """What :func:`run` must return, with the bounds of its arithmetic in any order."""
    weights = [None if w is None else w.numpy() for w in (layer.weight, layer.coord_weight)]
    bias = None if layer.bias is None else layer.bias.numpy()
    reference = Reference(geometry, layer.coords)
    seen = layer._in_channels // geometry.groups + len(layer.coords)
    terms_y = seen * geometry.taps + 1
    # of the input's gradient by counting: padding that copies reads a sample more than once
    ones = np.ones(dy.shape), np.ones(weights[0].shape)
    terms_x = int(reference.input_gradient(*ones, x.shape[2:]).max())
    terms_w = len(x) * int(np.prod(dy.shape[2:])) + 2

    def bounded(terms, method, *args):
        return method(*args), gamma(terms, unit), method(*args, magnitudes=True)

    results = {
        "y": bounded(terms_y, reference.forward, x, *weights, bias),
        "x": bounded(terms_x, reference.input_gradient, dy, weights[0], x.shape[2:]),
    }
    values, relative, sizes = bounded(terms_w, reference.weight_gradients, x, dy)
    results |= {
        name: (values[name], relative, sizes[name])
        for name in values
        if name != "bias" or bias is not None
    }
    return {
        name: Expected(value, relative * size) for name, (value, relative, size) in results.items()
    }


def hold(layer, geometry, shape, batch=2, **call):
    """Hold a layer's output and all gradients to the reference, componentwise."""
    fill(layer, normal)
    x = normal(batch, layer._in_channels, *shape, seed=1)
    dy = normal(batch, layer._out_channels, *geometry.output_shape(shape), seed=2)
    found = run(layer, x, dy, **call)
    results = wanted(layer, geometry, x, dy)
    assert found.keys() == results.keys()
    for name, result in results.items():
        assert result.error(found[name]) <= 1, name


def base(layer):
    """Paddle's own class of a layer."""
    return next(c for c in type(layer).__mro__ if c.__module__ == nn.Conv2D.__module__)


def concatenated(layer, x, **call):
    """The definition in Paddle itself: concatenate in every group, then convolve."""
    transposed = isinstance(layer, tuple(TRANSPOSED.values()))
    groups, axis = layer._groups, -1 if last(layer) else 1
    plain = base(layer)(
        layer._in_channels + groups * len(layer.coords),
        layer._out_channels,
        layer._kernel_size,
        layer._stride,
        layer._padding,
        dilation=layer._dilation,
        groups=groups,
        data_format=layer._data_format,
        bias_attr=layer._bias_attr,
        **{"output_padding": layer.output_padding}
        if transposed
        else {"padding_mode": layer._padding_mode},
    )
    plain.to(dtype=layer.weight.dtype)
    if transposed:
        kernel = []
        for weight, coord_weight in zip(
            layer.weight.chunk(groups), layer.coord_weight.chunk(groups), strict=True
        ):
            kernel += [weight, coord_weight.transpose([1, 0, *range(2, weight.ndim)])]
        plain.weight.set_value(paddle.concat(kernel))
    else:
        plain.weight.set_value(paddle.concat([layer.weight, layer.coord_weight], axis=1))
    if plain.bias is not None:
        plain.bias.set_value(layer.bias)
    add = AddCoords(layer.coords, layer._data_format)
    return plain(paddle.concat([add(part) for part in x.chunk(groups, axis)], axis), **call)


class TestAgainstTheReference:
    @pytest.mark.parametrize("coords", COORDS, ids=repr)
    def test_coordinates(self, coords):
        layer = CoordConv2D(3, 4, (3, 2), stride=(2, 1), padding=2, coords=coords)
        hold(layer, ConvGeometry((3, 2), stride=(2, 1), padding=2), (7, 6))

    @pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
    @pytest.mark.parametrize(("options", "meant"), ZERO_PADDINGS + COPYING)
    def test_options(self, options, meant, data_format):
        options = in_format(options, data_format)
        layer = CoordConv2D(2, 3, (3, 2), coords="xyr", data_format=data_format, **options)
        hold(layer, ConvGeometry((3, 2), **meant), (7, 9))

    @pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
    @pytest.mark.parametrize(
        ("channels", "out", "groups"), [(4, 6, 2), (4, 4, 4), (3, 6, 3), (2, 2, 1)]
    )
    def test_groups_each_see_all_coordinates(self, channels, out, groups, data_format):
        layer = CoordConv2D(
            channels, out, 3, padding=1, groups=groups, coords="xyr", data_format=data_format
        )
        hold(layer, ConvGeometry((3, 3), padding=1, groups=groups), (5, 6))

    @pytest.mark.parametrize("outside", ["zero", "extend"])
    @pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
    def test_padding_modes_and_what_lies_outside(self, mode, outside):
        coords = Coordinates("xyr", outside=outside)
        layer = CoordConv2D(4, 4, 3, padding=2, padding_mode=mode, groups=4, coords=coords)
        hold(layer, ConvGeometry((3, 3), padding=2, padding_mode=mode, groups=4), (5, 4))

    @pytest.mark.parametrize(
        ("options", "shape"),
        [
            ({"bias_attr": False}, (5, 5)),
            ({"bias": False}, (5, 5)),
            ({"padding": 1}, (1, 5)),
            ({"padding": 1}, (1, 1)),
            ({"padding": 1, "stride": 7}, (5, 6)),
        ],
    )
    def test_odds_and_ends(self, options, shape):
        layer = CoordConv2D(2, 3, 1, coords="xyr", **options)
        plain = {name: options[name] for name in ("padding", "stride") if name in options}
        assert (layer.bias is None) == ("padding" not in options)
        hold(layer, ConvGeometry((1, 1), **plain), shape)

    @pytest.mark.parametrize(
        ("rank", "options", "meant"),
        [
            (1, {"padding": 2, "dilation": 2}, {"padding": 2, "dilation": 2}),
            (1, {"padding": [1]}, {"padding": 1}),
            (1, {"padding": [1, 2]}, {"padding": ((1, 2),)}),
            (1, {"padding": [[0, 0], [0, 0], [2, 1]]}, {"padding": ((2, 1),)}),
            (1, {"padding": "same", "dilation": 3, "stride": 2}, {"padding": "same", "stride": 2}),
            (1, {"padding": [1, 0], "groups": 4}, {"padding": ((1, 0),), "groups": 4}),
            (1, {"padding": 2, "groups": 2, "data_format": "NLC"}, {"padding": 2, "groups": 2}),
            (
                1,
                {"padding": 2, "padding_mode": "reflect"},
                {"padding": 2, "padding_mode": "reflect"},
            ),
            (3, {"padding": [1, 0, 2], "stride": 2}, {"padding": (1, 0, 2), "stride": 2}),
            (3, {"padding": [1, 0, 0, 2, 1, 1]}, {"padding": ((1, 0), (0, 2), (1, 1))}),
            (3, {"padding": "SAME", "dilation": 2}, {"padding": "same"}),
            (3, {"groups": 4, "data_format": "NDHWC"}, {"groups": 4}),
            (
                3,
                {"padding": 1, "padding_mode": "circular"},
                {"padding": 1, "padding_mode": "circular"},
            ),
        ],
    )
    def test_other_ranks(self, rank, options, meant):
        layer = LAYERS[rank](4, 4, KERNELS[rank], coords="zyx"[-rank:] + "r", **options)
        hold(layer, ConvGeometry(KERNELS[rank], **meant), SHAPES[rank])

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize(("rank", "options", "meant"), TRANSPOSED_OPTIONS)
    def test_transposed(self, rank, options, meant, last):
        if isinstance(options.get("padding"), list) and isinstance(options["padding"][0], list):
            options = options | {"padding": np.roll(options["padding"], -last, axis=0).tolist()}
        layer = TRANSPOSED[rank](
            4,
            8,
            KERNELS[rank],
            coords="zyx"[-rank:] + "r",
            data_format=FORMATS[rank][last],
            **options,
        )
        hold(layer, ConvGeometry(KERNELS[rank], transposed=True, **meant), SHAPES[rank])

    @pytest.mark.parametrize("coords", COORDS, ids=repr)
    def test_transposed_has_the_coordinates_of_its_input(self, coords):
        layer = CoordConv2DTranspose(3, 4, (3, 2), stride=(2, 1), padding=1, coords=coords)
        meant = {"stride": (2, 1), "padding": 1, "transposed": True}
        hold(layer, ConvGeometry((3, 2), **meant), (7, 6))

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("outside", ["zero", "extend"])
    @pytest.mark.parametrize(
        ("rank", "options", "size", "extra"),
        [
            (1, {"padding": 1}, 17, (1,)),
            (1, {"padding": "SAME"}, [20], (2,)),
            (2, {"padding": 1}, [10, 17], (0, 2)),
            (2, {"output_padding": 1}, [13, 18], (1, 1)),  # the size takes its place
            (2, {"padding": [0, 1, 1, 0], "groups": 2}, (13, 18), (2, 2)),
            (3, {"padding": 1}, [14, 10, 15], (1, 1, 0)),
        ],
    )
    def test_output_size(self, rank, options, size, extra, outside, last):
        layer = TRANSPOSED[rank](
            2,
            2,
            KERNELS[rank],
            3,
            coords=Coordinates("xr", outside=outside),
            data_format=FORMATS[rank][last],
            **options,
        )
        padding = options.get("padding", 0)
        if isinstance(padding, list):
            padding = ((0, 1), (1, 0))
        geometry = ConvGeometry(
            KERNELS[rank],
            stride=3,
            padding=0 if padding == "SAME" else padding,
            groups=options.get("groups", 1),
            transposed=True,
            output_padding=extra,
        )
        hold(layer, geometry, SHAPES[rank], output_size=size)

    def test_output_size_as_a_tensor_or_by_position(self):
        layer, x = CoordConv2DTranspose(2, 3, 3, 2), paddle.to_tensor(normal(1, 2, 5, 5))
        y = layer(x, output_size=[12, 11])
        assert y.shape == [1, 3, 12, 11]
        for size in ([12, 11], paddle.to_tensor([12, 11])):
            assert paddle.equal_all(layer(x, size), y)
        assert layer(x, None).shape == layer(x).shape == [1, 3, 11, 11]

    def test_output_padding_may_be_all_there_is(self):
        layer = CoordConv1DTranspose(1, 1, 2, 2, 2, 1)
        hold(layer, ConvGeometry((2,), 2, 2, transposed=True, output_padding=1), (2,))

    def test_options_changed_on_the_layer_count(self):
        """Dilating a trained backbone by hand is a habit of segmentation code."""
        layer = CoordConv2D(2, 3, 3, padding=1)
        layer(paddle.ones([1, 2, 8, 8]))  # nothing of the options may be kept from here
        layer._dilation, layer._updated_padding, layer._stride = [2, 2], [2, 1], [1, 2]
        hold(layer, ConvGeometry((3, 3), stride=(1, 2), padding=(2, 1), dilation=2), (8, 8))
        layer = CoordConv2D(2, 3, 3, padding=1, padding_mode="reflect")
        layer._reversed_padding_repeated_twice = [1, 2, 0, 3]  # left, right, top, bottom
        meant = ConvGeometry((3, 3), padding=((0, 3), (1, 2)), padding_mode="reflect")
        hold(layer, meant, (5, 6))
        layer = CoordConv2DTranspose(2, 3, 3, padding=1)
        layer._padding, layer.output_padding, layer._stride = [0, 1], [1, 0], [2, 1]
        meant = {"stride": (2, 1), "padding": (0, 1), "output_padding": (1, 0)}
        hold(layer, ConvGeometry((3, 3), transposed=True, **meant), (5, 6))


class TestAgainstPaddle:
    """Paddle's own convolution of the concatenation, with the same options, is the oracle."""

    @pytest.mark.parametrize("coords", ["yx", Coordinates("xyr", align="edges")], ids=repr)
    @pytest.mark.parametrize(("options", "_"), ZERO_PADDINGS + COPYING)
    def test_equals_the_concatenation_that_defines_it(self, options, _, coords):
        layer = CoordConv2D(3, 4, 3, coords=coords, dtype="float64", **options)
        x = paddle.to_tensor(normal(2, 3, 7, 9).astype(np.float64))
        found, oracle = layer(x).numpy(), concatenated(layer, x).numpy()
        assert found.shape == oracle.shape
        for parameter in layer.parameters():
            parameter.set_value(parameter.abs())
        terms = (3 + len(layer.coords)) * 9 + 1
        span = AddCoords(layer.coords)(x)[:, 3:].abs().max()  # no padding makes it larger
        size = x.abs().max() * layer.weight.sum((1, 2, 3)).max()
        size += span * layer.coord_weight.sum((1, 2, 3)).max()
        # each side is off by gamma of the number of terms at most
        assert np.abs(found - oracle).max() <= 2 * terms * 2.0**-53 * float(size)

    @pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
    @pytest.mark.parametrize(("options", "_"), ZERO_PADDINGS[1:] + COPYING)
    def test_bitwise_where_arithmetic_is_exact(self, options, _, data_format):
        options = in_format(options, data_format)
        layer = CoordConv2D(3, 4, 2, coords="yx", data_format=data_format, **options)
        fill(layer, integers)
        x = integers(2, 3, 9, 5)
        given = paddle.to_tensor(np.moveaxis(x, 1, -1) if last(layer) else x)
        assert np.array_equal(layer(given).numpy(), concatenated(layer, given).numpy())

    @pytest.mark.parametrize("sized", [False, True])
    @pytest.mark.parametrize(("coords", "width"), [(None, 5), (Coordinates("x", align="edges"), 8)])
    @pytest.mark.parametrize(("rank", "options", "_"), TRANSPOSED_OPTIONS)
    def test_transposed_bitwise_where_arithmetic_is_exact(
        self, rank, options, _, coords, width, sized
    ):
        layer = TRANSPOSED[rank](4, 8, KERNELS[rank], coords=coords, **options)
        fill(layer, integers)
        x = paddle.to_tensor(integers(2, 4, *(5, 3, width)[-rank:]))
        call = {}
        if sized:
            layer.output_padding = 0
            sizes = layer(x).shape[2:]
            call = {"output_size": [n + s - 1 for n, s in zip(sizes, layer._stride, strict=True)]}
        found, oracle = layer(x, **call), concatenated(layer, x, **call)
        assert found.shape == oracle.shape
        assert np.array_equal(found.numpy(), oracle.numpy())


@pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("shape", "coords"),
    [
        ((2, 3), "xy"),
        ((5, 9), "yx"),
        ((17, 3), Coordinates("xy", span=(0, 1))),
        ((9, 2), Coordinates("x", outside="extend")),
        ((8, 4), Coordinates("yx", align="edges", outside="extend")),
    ],
)
@pytest.mark.parametrize(("mode", "groups"), [("zeros", 1), ("replicate", 2), ("zeros", 4)])
def test_exact_arithmetic_gives_the_same_bits(shape, coords, mode, groups, data_format):
    geometry = ConvGeometry((3, 2), stride=(2, 1), padding=1, groups=groups, padding_mode=mode)
    layer = CoordConv2D(
        4,
        8,
        (3, 2),
        (2, 1),
        1,
        groups=groups,
        padding_mode=mode,
        coords=coords,
        data_format=data_format,
    )
    fill(layer, integers)
    x, dy = integers(3, 4, *shape), integers(3, 8, *geometry.output_shape(shape), seed=5)
    found = run(layer, x, dy)
    for name, result in wanted(layer, geometry, x, dy).items():
        assert result.equals(found[name]), name


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "coords"),
    [
        ((9,), "x"),
        ((2, 5), "yx"),
        ((5, 9), Coordinates("xy", outside="extend")),
        ((2, 3, 5), "zxy"),
    ],
)
def test_exact_arithmetic_gives_the_same_bits_transposed(shape, coords, groups, last):
    rank = len(shape)
    layer = TRANSPOSED[rank](
        4,
        4,
        KERNELS[rank],
        2,
        1,
        1,
        groups=groups,
        coords=coords,
        data_format=FORMATS[rank][last],
    )
    geometry = ConvGeometry(KERNELS[rank], 2, 1, 1, groups, transposed=True, output_padding=1)
    fill(layer, integers)
    x, dy = integers(3, 4, *shape), integers(3, 4, *geometry.output_shape(shape), seed=5)
    found = run(layer, x, dy)
    for name, result in wanted(layer, geometry, x, dy).items():
        assert result.equals(found[name]), name


class TestInit:
    @pytest.mark.parametrize("groups", [1, 4])
    @pytest.mark.parametrize(
        "attr",
        [
            None,
            initializer.KaimingUniform(),
            initializer.XavierNormal(),
            initializer.Constant(0.5),
            initializer.Dirac(),
            paddle.ParamAttr(initializer=initializer.Orthogonal()),
        ],
        ids=lambda attr: type(attr).__name__,
    )
    def test_fan_in_is_what_paddle_draws_for_all_channels(self, attr, groups):
        options = {"groups": groups, "weight_attr": attr, "bias_attr": initializer.Normal()}
        paddle.seed(3)
        layer = CoordConv2D(8, 8, 3, coords="xyr", **options)
        after = paddle.rand([1])
        paddle.seed(3)
        plain = nn.Conv2D(8 + groups * 3, 8, 3, **options)
        drawn = paddle.concat([layer.weight, layer.coord_weight], axis=1)
        assert paddle.equal_all(drawn, plain.weight)
        assert paddle.equal_all(layer.bias, plain.bias)
        assert paddle.equal_all(after, paddle.rand([1]))

    @pytest.mark.parametrize("rank", [1, 2, 3])
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("attr", [None, initializer.KaimingNormal()])
    def test_transposed_draws_the_same(self, attr, groups, rank):
        options = {"groups": groups, "weight_attr": attr, "bias_attr": initializer.Normal()}
        paddle.seed(3)
        layer = TRANSPOSED[rank](4, 6, 3, coords="xr", **options)
        after = paddle.rand([1])
        paddle.seed(3)
        plain = base(layer)(4 + groups * 2, 6, 3, **options)
        drawn = plain.weight.numpy()
        assert paddle.equal_all(layer.bias, plain.bias)
        assert paddle.equal_all(after, paddle.rand([1]))
        weight, coord_weight = layer.weight.numpy(), layer.coord_weight.numpy()
        ins, outs = 4 // groups, 6 // groups
        for group in range(groups):  # its features, then its coordinates
            first = group * (ins + 2)
            mine = weight[group * ins : (group + 1) * ins]
            assert np.array_equal(mine, drawn[first : first + ins])
            for o, c in np.ndindex(outs, 2):
                found = coord_weight[group * outs + o, c]
                assert np.array_equal(found, drawn[first + ins + c, o])

    def test_transposed_keeps_assigned_values_and_zeros(self):
        given = normal(4, 3, 3)
        attr = initializer.Assign(given)
        layer = CoordConv1DTranspose(4, 6, 3, groups=2, weight_attr=attr)
        assert np.array_equal(layer.weight.numpy(), given)
        assert layer.coord_weight.all()
        paddle.seed(3)
        layer = CoordConv3DTranspose(2, 4, 2, stride=2, coord_init="zeros")
        paddle.seed(3)
        plain, x = nn.Conv3DTranspose(2, 4, 2, stride=2), paddle.to_tensor(normal(1, 2, 2, 3, 2))
        assert np.array_equal(layer(x).numpy(), plain(x).numpy())

    @pytest.mark.parametrize("kind", [CoordConv1D, CoordConv3D])
    def test_other_ranks_draw_the_same(self, kind):
        paddle.seed(3)
        layer = kind(4, 6, 3, groups=2)
        paddle.seed(3)
        plain = base(layer)(4 + 2 * layer.rank, 6, 3, groups=2)
        drawn = paddle.concat([layer.weight, layer.coord_weight], axis=1)
        assert paddle.equal_all(drawn, plain.weight)

    def test_fan_in_counts_the_coordinates(self):
        paddle.seed(0)
        layer = CoordConv2D(2, 512, 3, coords="xyr")
        std = (2 / (9 * (2 + 3))) ** 0.5
        for kernel in (layer.weight, layer.coord_weight):  # 5 sigma of a sample's deviation
            assert abs(kernel.numpy().std() / std - 1) < 5 / (2 * kernel.size) ** 0.5

    def test_assigned_values_are_the_feature_kernel(self):
        given = normal(8, 5, 3, 3)
        layer = CoordConv2D(5, 8, 3, coords="xyr", weight_attr=initializer.Assign(given))
        std = (2 / (9 * (5 + 3))) ** 0.5
        assert np.array_equal(layer.weight.numpy(), given)
        assert abs(layer.coord_weight.numpy().std() / std - 1) < 5 / (2 * 8 * 27) ** 0.5

    @pytest.mark.parametrize("attr", [None, initializer.Constant(2.0)])
    def test_zeros_starts_as_the_plain_layer(self, attr):
        paddle.seed(3)
        layer = CoordConv2D(5, 8, 3, coord_init="zeros", weight_attr=attr)
        paddle.seed(3)
        plain = nn.Conv2D(5, 8, 3, weight_attr=attr)
        x = paddle.to_tensor(normal(1, 5, 6, 6))
        assert not layer.coord_weight.any()
        assert np.array_equal(layer(x).numpy(), plain(x).numpy())

    def test_same_seed_same_weights(self):
        drawn = []
        for _ in range(2):
            paddle.seed(5)
            drawn.append(CoordConv2D(2, 3, 3).coord_weight)
        drawn.append(CoordConv2D(2, 3, 3).coord_weight)
        assert paddle.equal_all(drawn[0], drawn[1])
        assert not paddle.equal_all(drawn[0], drawn[2])

    def test_names(self):
        with paddle.utils.unique_name.guard():
            first = CoordConv2D(1, 1, 1)
            named = CoordConv2D(1, 1, 1, weight_attr="stem", bias_attr="stem_b")
            later = nn.Conv2D(1, 1, 1)
        assert first.coord_weight.name == "coord_conv2d_0.w_1"
        assert [p.name for p in named.parameters()] == ["stem", "stem_b", "stem_coord"]
        assert later.weight.name == "conv2d_0.w_0"

    def test_attributes_hold_for_both_kernels(self):
        decay = paddle.regularizer.L2Decay(0.5)
        attr = paddle.ParamAttr(name="shared", learning_rate=0.25, regularizer=decay)
        layer = CoordConv2D(1, 2, 3, weight_attr=attr)
        assert attr.name == "shared"  # the caller's attribute is left alone
        assert attr.initializer is None
        before = {name: p.numpy() for name, p in layer.named_parameters()}
        layer(paddle.zeros([1, 1, 5, 5])).backward(paddle.zeros([1, 2, 3, 3]))
        paddle.optimizer.SGD(0.5, parameters=layer.parameters()).step()
        for name in ("weight", "coord_weight"):  # by learning rate, factor and decay
            moved = getattr(layer, name).numpy()
            assert np.array_equal(moved, before[name] * (1 - 0.5 * 0.25 * 0.5))

    def test_frozen_parameters_get_no_gradient(self):
        attr = paddle.ParamAttr(trainable=False)
        layer = CoordConv2D(1, 1, 3, weight_attr=attr, bias_attr=False)
        assert layer.weight.stop_gradient
        assert layer.coord_weight.stop_gradient
        assert layer(paddle.ones([1, 1, 5, 5])).stop_gradient

    def test_takes_device_and_dtype(self):
        layer = CoordConv2D(2, 3, 3, device="cpu", dtype="float64")
        assert {p.dtype for p in layer.parameters()} == {paddle.float64}
        assert all(p.place.is_cpu_place() for p in layer.parameters())

    def test_default_dtype(self):
        paddle.set_default_dtype("float64")
        try:
            layer = CoordConv2D(2, 3, 3)
        finally:
            paddle.set_default_dtype("float32")
        assert {p.dtype for p in layer.parameters()} == {paddle.float64}

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_bad_arguments_of_each_rank(self, rank):
        beyond = "yzw"[rank - 1]
        for kind in (LAYERS[rank], TRANSPOSED[rank]):
            with pytest.raises(ValueError, match=f"'{beyond}'"):
                kind(1, 1, 1, coords=beyond)
            with pytest.raises(ValueError, match="out_channels must be divisible .* got 3 and 2"):
                kind(2, 3, 1, groups=2)
            with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
                kind(3, 2, 1, groups=2)
            wrong = FORMATS[rank % 3 + 1][1]
            with pytest.raises(ValueError, match=f"data_format must be one of .* got '{wrong}'"):
                kind(1, 1, 1, data_format=wrong)


class TestInput:
    @pytest.mark.parametrize(
        ("data_format", "shape", "message"),
        [
            ("NCHW", (3, 5), r"must have shape \(N, C, H, W\), got \(3, 5\)$"),
            ("NCHW", (3, 5, 5), r"must have shape \(N, C, H, W\), got \(3, 5, 5\)$"),
            ("NHWC", (1, 1, 5, 5, 3), r"must have shape \(N, H, W, C\), got \(1, 1, 5, 5, 3\)$"),
            ("NCHW", (1, 4, 5, 5), r"must have 3 channels, got 4 in shape \(1, 4, 5, 5\)$"),
            ("NHWC", (1, 3, 5, 5), r"must have 3 channels, got 5 in shape \(1, 3, 5, 5\)"),
            ("NCHW", (1, 5, 5, 5), "3 channels, got 5 .* the layer adds the coordinates itself"),
            ("NCHW", (1, 3, 0, 5), r"no empty axis, got shape \(1, 3, 0, 5\)"),
        ],
    )
    def test_wrong_shapes(self, data_format, shape, message):
        layer = CoordConv2D(3, 4, 3, padding=1, data_format=data_format)
        with pytest.raises(ValueError, match=message):
            layer(paddle.zeros(shape))

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("kind", [*LAYERS.values(), *TRANSPOSED.values()])
    def test_wrong_shapes_of_each_rank(self, kind, last):
        rank = kind.rank
        layer = kind(3, 4, 3, data_format=FORMATS[rank][last])

        def shaped(channels, *spatial):
            shape = [1, *spatial, channels] if last else [1, channels, *spatial]
            return paddle.zeros(shape)

        form = ", ".join(FORMATS[rank][last])
        for spatial in ((5,) * (rank + 1), (5,) * (rank - 1)):
            with pytest.raises(ValueError, match=rf"must have shape \({form}\)"):
                layer(shaped(3, *spatial))
        with pytest.raises(ValueError, match="must have 3 channels, got 4"):
            layer(shaped(4, *(5,) * rank))
        hint = "the layer adds the coordinates itself"
        with pytest.raises(ValueError, match=f"must have 3 channels, got {3 + rank} .* {hint}"):
            layer(shaped(3 + rank, *(5,) * rank))
        with pytest.raises(ValueError, match="no empty axis"):
            layer(shaped(3, *(5,) * (rank - 1), 0))
        with pytest.raises(TypeError, match="floating-point, got paddle.int32"):
            layer(shaped(3, *(5,) * rank).astype("int32"))

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_output_that_would_be_empty(self, rank):
        """Paddle returns a tensor of a negative length, or crashes."""
        x = paddle.ones([1, 1] + [2] * rank)
        with pytest.raises(ValueError, match="output would be empty"):
            LAYERS[rank](1, 1, 4)(x)
        for padding in (1, [3, 2] * rank):
            with pytest.raises(ValueError, match="output would be empty"):
                TRANSPOSED[rank](1, 1, 1, padding=padding)(x)
        with pytest.raises(ValueError, match="output would be empty"):
            TRANSPOSED[rank](1, 1, 1, 3, 4)(x, output_size=-1)

    def test_reflect_padding_wider_than_the_axis(self):
        layer = CoordConv1D(1, 1, 3, padding=3, padding_mode="reflect")
        with pytest.raises(ValueError, match="reflect padding .* too wide"):
            layer(paddle.ones([1, 1, 3]))

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_sizes_that_paddle_refuses(self, rank):
        x = paddle.ones([1, 1] + [4] * rank)
        layer = TRANSPOSED[rank](1, 1, 3, 2)
        for size in (8, 11):
            with pytest.raises(ValueError, match="output_size of Op"):
                layer(x, output_size=size)
        with pytest.raises(ValueError, match="output_padding of Op"):
            TRANSPOSED[rank](1, 1, 3, 2, output_padding=2)(x)
        for wrong in ([1] * (rank + 1), 1.0, "SAME"):
            with pytest.raises(ValueError, match="output_padding's"):
                TRANSPOSED[rank](1, 1, 3, 2, output_padding=wrong)(x)
        with pytest.raises(ValueError, match="output_padding must be at least 0"):
            TRANSPOSED[rank](1, 1, 3, 2, output_padding=-1)(x)

    def test_integers(self):
        with pytest.raises(TypeError, match=r"input must be floating-point, got paddle.int64"):
            CoordConv2D(3, 4, 3)(paddle.zeros([1, 3, 5, 5], dtype="int64"))

    def test_empty_batch(self):
        assert CoordConv2D(3, 4, 3)(paddle.zeros([0, 3, 5, 6])).shape == [0, 4, 3, 4]

    def test_by_either_name(self):
        layer, x = CoordConv2D(3, 4, 3), paddle.ones([1, 3, 5, 5])
        assert paddle.equal_all(layer(x=x), layer(input=x))


@pytest.mark.parametrize("batch", [1, 2])
class TestAddedInPlace:
    def test_of_a_frozen_convolution(self, batch):
        """Its output has no gradient of its own, and Paddle gives it none in place."""
        layer = CoordConv2D(2, 3, 3, padding=1)
        fill(layer, integers)
        layer.weight.stop_gradient = layer.bias.stop_gradient = True
        x, dy = integers(batch, 2, 5, 3), integers(batch, 3, 5, 3, seed=1)
        (found,) = paddle.grad(
            layer(paddle.to_tensor(x)), [layer.coord_weight], paddle.to_tensor(dy)
        )
        reference = Reference(ConvGeometry((3, 3), padding=1), layer.coords)
        assert np.array_equal(found.numpy(), reference.weight_gradients(x, dy)["coord_weight"])

    @pytest.mark.parametrize("kernel", [1, 3])
    @pytest.mark.parametrize("coords", ["xy", "xyr"])
    def test_gradients_of_any_of_the_inputs(self, batch, kernel, coords):
        """Asked for alone, or with the others frozen: they are those of all, to the last bit."""
        layer = CoordConv2D(2, 3, kernel, coords=coords)
        fill(layer, integers)
        x = paddle.to_tensor(integers(batch, 2, 5, 4))
        tensors = [x, *layer.parameters()]

        def gradients(*chosen):
            outputs = layer(x)
            return paddle.grad(outputs, list(chosen), 2 * paddle.ones_like(outputs))

        x.stop_gradient = False
        everything = gradients(*tensors)
        for r in range(1, len(tensors)):
            for some in itertools.combinations(range(len(tensors)), r):
                for frozen in (False, True):
                    for i, tensor in enumerate(tensors):
                        tensor.stop_gradient = frozen and i not in some
                    for i, found in zip(some, gradients(*(tensors[i] for i in some)), strict=True):
                        assert np.array_equal(found.numpy(), everything[i].numpy()), (some, frozen)
        for tensor in tensors:
            tensor.stop_gradient = True
        assert layer(x).stop_gradient

    @pytest.mark.parametrize("kernel", [1, 3])
    def test_penalty_on_the_gradient(self, batch, kernel):
        """A quadratic in the coordinate kernel, so that its central differences are exact."""
        layer = CoordConv2D(2, 3, kernel)
        fill(layer, integers)
        layer.to(dtype="float64")

        def penalty():
            x = paddle.to_tensor(integers(batch, 2, 5, 4), "float64", stop_gradient=False)
            (slope,) = paddle.grad(layer(x).square().sum(), [x], create_graph=True)
            return slope.square().sum()

        (found,) = paddle.grad(penalty(), [layer.coord_weight])
        k = layer.coord_weight.numpy()
        for index in ((0, 0, 0, 0), (2, 1, kernel - 1, kernel - 1)):
            values = []
            for step in (1, -1):
                moved = k.copy()
                moved[index] += step
                layer.coord_weight.set_value(moved)
                values.append(float(penalty()))
            layer.coord_weight.set_value(k)
            assert found.numpy()[index] == pytest.approx((values[0] - values[1]) / 2, rel=1e-9)

    @pytest.mark.parametrize("kernel", [1, 3])
    def test_penalty_on_two_gradients(self, batch, kernel):
        """A quadratic in the input, so that its central differences are exact."""
        layer = CoordConv2D(2, 3, kernel)
        fill(layer, integers)
        layer.to(dtype="float64")
        given = integers(batch, 2, 5, 4)

        def penalty(x):
            to = [x, layer.coord_weight]
            slopes = paddle.grad(layer(x).square().sum(), to, create_graph=True)
            return sum(slope.square().sum() for slope in slopes)

        x = paddle.to_tensor(given, "float64", stop_gradient=False)
        found, _ = paddle.grad(penalty(x), [x, layer.weight])
        for index in ((0, 0, 0, 0), (batch - 1, 1, 4, 3)):
            values = []
            for step in (1, -1):
                moved = np.array(given, np.float64)
                moved[index] += step
                values.append(float(penalty(paddle.to_tensor(moved, stop_gradient=False))))
            assert found.numpy()[index] == pytest.approx((values[0] - values[1]) / 2, rel=1e-9)

    def test_second_derivatives(self, batch):
        """Of the sum of y * y in the coordinate kernel's direction d: twice that of P(d) ** 2."""
        layer = CoordConv2D(2, 3, 1)
        fill(layer, integers)
        x, d = paddle.to_tensor(integers(batch, 2, 5, 3)), paddle.to_tensor(integers(3, 2, 1, 1))
        (slope,) = paddle.grad(layer(x).square().sum(), [layer.coord_weight], create_graph=True)
        (curvature,) = paddle.grad((slope * d).sum(), [layer.coord_weight])
        g = coordinate_grid((5, 3)).reshape(2, -1)
        wanted = 2 * batch * d.numpy()[..., 0, 0] @ (g @ g.T)
        assert np.array_equal(curvature.numpy()[..., 0, 0], wanted)


class TestPrecision:
    @pytest.mark.parametrize(("dtype", "unit"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
    @pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
    def test_the_map_is_computed_in_float32_and_rounded_once(self, data_format, dtype, unit):
        """Paddle convolves no 16-bit input on a CPU, so the map alone is looked at."""
        layer = CoordConv2D(1, 4, 1, data_format=data_format)
        layer.to(dtype=dtype)
        assert layer.coord_weight.dtype == getattr(paddle, dtype)
        geometry = layer._conv_geometry((512, 512))
        made = layer._map_arguments(geometry, (512, 512))
        y = layer._position_bias(*made, getattr(paddle, dtype))
        assert y.dtype == layer.coord_weight.dtype
        y.astype("float32").square().sum().backward()
        assert layer.coord_weight.grad.astype("float32").abs().sum() > 0
        y = y.astype("float64").numpy()
        y = np.moveaxis(y, -1, 0) if last(layer) else y
        grid = coordinate_grid((512, 512), dtype=np.float64)
        kernel = layer.coord_weight.astype("float64").numpy()[:, :, 0, 0]
        exact = np.einsum("on,nhw->ohw", kernel, grid)
        size = np.einsum("on,nhw->ohw", np.abs(kernel), np.abs(grid))
        tiny = float(paddle.finfo(layer.coord_weight.dtype).tiny)
        bound = unit * np.abs(exact) + tiny + 2 * gamma(3, 2.0**-24) * size
        assert (np.abs(y - exact) <= bound).all()

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("kind", [*LAYERS.values(), *TRANSPOSED.values()])
    def test_float64_stays_float64(self, kind, last):
        """Cast later, after float32 tables may have been kept, which must not be used."""
        rank, shape = kind.rank, (5, 6, 7)[: kind.rank]
        layer = kind(2, 3, 3, coords="xr", data_format=FORMATS[rank][last])
        layer(paddle.ones([1, *shape, 2] if last else [1, 2, *shape]))
        layer.to(dtype="float64")
        geometry = ConvGeometry((3,) * rank, transposed=kind in TRANSPOSED.values())
        x = np.random.default_rng(0).standard_normal((2, 2, *shape))
        dy = np.random.default_rng(1).standard_normal((2, 3, *geometry.output_shape(shape)))
        found = run(layer, x, dy)
        for name, result in wanted(layer, geometry, x, dy, 2.0**-53).items():
            assert found[name].dtype == np.float64
            assert result.error(found[name]) <= 2, name  # the reference rounds as much

    def test_made_of_float64(self):
        layer = CoordConv2D(2, 3, 3, coords="xyr", dtype="float64")
        twin = CoordConv2D(2, 3, 3, coords="xyr")
        twin.to(dtype="float64")
        twin.set_state_dict(layer.state_dict())
        x = paddle.to_tensor(np.random.default_rng(0).standard_normal((1, 2, 5, 5)))
        assert layer(x).dtype == paddle.float64
        assert paddle.equal_all(layer(x), twin(x))

    @pytest.mark.parametrize(("batch", "made_by"), [(1, "factors"), (2, "position_bias")])
    def test_autocast_leaves_the_map_alone(self, batch, made_by, monkeypatch):
        """Paddle has no autocast on a CPU but keeps its state: it must be off in the map alone."""
        tracer = paddle.base.framework._dygraph_tracer()
        level = paddle.base.core.AmpLevel
        make, seen = getattr(backend, made_by), []

        def spy(*args, **options):
            seen.append(tracer._amp_level)
            return make(*args, **options)

        monkeypatch.setattr(backend, made_by, spy)
        layer, x = CoordConv2D(1, 4, 3), paddle.ones([batch, 1, 99, 99])
        plain = layer(x)
        seen.clear()
        state = tracer._amp_level, tracer._amp_dtype
        tracer._amp_level, tracer._amp_dtype = level.O1, "bfloat16"
        try:
            y = layer(x)
            assert tracer._amp_level == level.O1
        finally:
            tracer._amp_level, tracer._amp_dtype = state
        assert seen == [level.O0]
        assert paddle.equal_all(y, plain)

    def test_map_has_the_dtype_of_the_convolution(self):
        """Autocast on a GPU gives 16 bits from 32-bit parameters; the map is rounded once."""
        layer = CoordConv2D(1, 4, 3, coords="xyr")
        made = layer._map_arguments(layer._conv_geometry((9, 7)), (9, 7))
        maps = [layer._position_bias(*made, t) for t in (paddle.float32, paddle.bfloat16)]
        assert maps[1].dtype == paddle.bfloat16
        rounded = maps[0].astype("bfloat16").astype("float32")
        assert paddle.equal_all(maps[1].astype("float32"), rounded)


class TestLayer:
    def test_copies_and_state(self, tmp_path):
        coords = Coordinates("yx", align="edges")
        layer, x = CoordConv2D(2, 3, 3, coords=coords), paddle.ones([1, 2, 5, 5])
        loaded = CoordConv2D(2, 3, 3, coords=coords)
        paddle.save(layer.state_dict(), str(tmp_path / "layer.pdparams"))
        loaded.set_state_dict(paddle.load(str(tmp_path / "layer.pdparams")))
        assert set(layer.state_dict()) == {"weight", "coord_weight", "bias"}
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
            assert twin.coords == coords
            assert paddle.equal_all(twin(x), layer(x))

    def test_takes_a_plain_layers_state_but_for_the_coordinates(self):
        plain = nn.Conv2D(2, 3, 3)
        layer = CoordConv2D(2, 3, 3, coord_init="zeros")
        with pytest.warns(UserWarning, match="coord_weight is not found"):
            missing, unexpected = layer.set_state_dict(plain.state_dict())
        assert (missing, unexpected) == (["coord_weight"], [])
        x = paddle.ones([1, 2, 5, 5])
        assert paddle.equal_all(plain(x), layer(x))

    def test_repr_shows_the_coordinates(self):
        assert repr(CoordConv2D(2, 3, 3, padding=1, coords="xyr")) == (
            "CoordConv2D(2, 3, kernel_size=[3, 3], padding=1, data_format=NCHW, "
            "coords=Coordinates('xyr'))"
        )

    def test_is_paddles_own_convolution(self):
        for kind in (*LAYERS.values(), *TRANSPOSED.values()):
            own = getattr(nn, kind.__name__.removeprefix("Coord"))
            assert isinstance(kind(1, 1, 1), own)

    @pytest.mark.parametrize("kind", [*LAYERS.values(), *TRANSPOSED.values()])
    def test_copies_of_each_kind(self, kind):
        layer, x = kind(2, 3, 3, coords="r"), paddle.ones([1, 2] + [5] * kind.rank)
        loaded = kind(2, 3, 3, coords="r")
        assert loaded.set_state_dict(layer.state_dict()) == ([], [])
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
            assert paddle.equal_all(twin(x), layer(x))
        assert repr(layer).endswith("coords=Coordinates('r'))")

    def test_no_grad_first_does_not_spoil_training_later(self):
        layer, x = CoordConv2D(2, 3, 3, coords="xyr"), paddle.ones([1, 2, 11, 13])
        with paddle.no_grad():
            layer(x)
        layer(x).sum().backward()
        assert layer.coord_weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("full_graph", [False, True])
    @pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
    def test_compiled_as_eager(self, data_format, full_graph):
        class Both(nn.Layer):
            def __init__(self):
                super().__init__()
                self.conv = CoordConv2D(2, 3, 3, coords="xyr", data_format=data_format)
                self.add = AddCoords(data_format=data_format)

            def forward(self, x):
                return self.add(nn.functional.relu(self.conv(x)))

        module, x = Both(), paddle.to_tensor(normal(2, 2, 5, 2))
        x = x if data_format == "NCHW" else x.transpose([0, 2, 3, 1])
        x = nn.functional.pad(x, [1, 1, 1, 1], data_format=data_format)
        eager = module(x)
        eager.sum().backward()
        gradient = module.conv.coord_weight.grad.numpy()
        module.clear_gradients()
        compiled = paddle.jit.to_static(module, full_graph=full_graph)
        y = compiled(x)
        assert np.array_equal(y.numpy(), eager.numpy())
        y.sum().backward()
        assert np.array_equal(module.conv.coord_weight.grad.numpy(), gradient)

    @pytest.mark.parametrize("full_graph", [False, True])
    @pytest.mark.parametrize(
        ("kind", "options", "size"),
        [
            (CoordConv1D, {"padding": [1, 2]}, None),
            (CoordConv3D, {"padding": "SAME", "data_format": "NDHWC"}, None),
            (CoordConv1DTranspose, {"output_padding": 1, "data_format": "NLC"}, None),
            (CoordConv2DTranspose, {"padding": "SAME"}, [10, 9]),
            (CoordConv3DTranspose, {"padding": 1}, [9, 10, 9]),
        ],
    )
    def test_other_kinds_compiled_as_eager(self, kind, options, size, full_graph):
        call = {} if size is None else {"output_size": size}

        class Both(nn.Layer):
            def __init__(self):
                super().__init__()
                self.conv = kind(5, 3, 3, stride=2, coords="xr", **options)

            def forward(self, x):
                return nn.functional.relu(self.conv(x, **call))

        module, x = Both(), paddle.to_tensor(normal(2, *[5] * (kind.rank + 1)))
        eager = module(x)
        eager.sum().backward()
        gradient = module.conv.coord_weight.grad.numpy()
        module.clear_gradients()
        y = paddle.jit.to_static(module, full_graph=full_graph)(x)
        assert np.array_equal(y.numpy(), eager.numpy())
        y.sum().backward()
        assert np.array_equal(module.conv.coord_weight.grad.numpy(), gradient)

    def test_traced_size_is_refused(self):
        class Sized(nn.Layer):
            def __init__(self):
                super().__init__()
                self.conv = CoordConv2DTranspose(2, 3, 3, 2)

            def forward(self, x, size):
                return self.conv(x, size)

        x, size = paddle.ones([1, 2, 5, 5]), paddle.to_tensor([12, 11])
        with pytest.raises(ValueError, match="output_size must be ints, not a tensor"):
            paddle.jit.to_static(Sized(), full_graph=True)(x, size)

    def test_compiled_for_inputs_of_many_shapes(self):
        """Paddle then takes the shape for unknown, of which a layer must not hear."""

        class Mine(CoordConv2D):
            pass

        module = nn.Sequential(nn.ReLU(), Mine(2, 3, 3, coords="xyr"), AddCoords())
        compiled = paddle.jit.to_static(copy.deepcopy(module))
        for shape in ((5, 6), (7, 4), (8, 9)):
            x = paddle.to_tensor(normal(2, 2, *shape))
            assert np.array_equal(compiled(x).numpy(), module(x).numpy())

    def test_saved_for_inference_with_any_batch(self, tmp_path):
        up = CoordConv2DTranspose(3, 3, 3, 2, "SAME", coords="xyr")
        layer = nn.Sequential(CoordConv2D(2, 3, 3, coords="xyr"), AddCoords("y"), nn.Identity())
        layer[2] = nn.Sequential(nn.Conv2D(4, 3, 1), up)
        spec = [paddle.static.InputSpec([None, 2, 5, 6])]
        paddle.jit.save(layer, str(tmp_path / "layer"), input_spec=spec)
        x = paddle.to_tensor(normal(4, 2, 5, 6))
        assert paddle.equal_all(paddle.jit.load(str(tmp_path / "layer"))(x), layer(x))

    def test_open_spatial_shape_is_refused(self, tmp_path):
        spec = [paddle.static.InputSpec([None, 2, None, None])]
        with pytest.raises(ValueError, match="input_spec must fix all axes but the batch"):
            paddle.jit.save(CoordConv2D(2, 3, 3), str(tmp_path / "layer"), input_spec=spec)


class TestHabits:
    """What training scripts do to every convolution that they find."""

    @pytest.fixture(params=[*LAYERS.values(), *TRANSPOSED.values()])
    def kind(self, request):
        return request.param

    def test_each_parameter_is_listed_once(self, kind):
        module = nn.Sequential(kind(2, 3, 3), nn.ReLU())
        assert sorted(name for name, _ in module.named_parameters()) == [
            "0.bias",
            "0.coord_weight",
            "0.weight",
        ]
        assert len({parameter.name for parameter in module.parameters()}) == 3

    def test_weight_decay_of_kernels_alone(self, kind):
        layer = kind(2, 3, 3)
        layer.bias.set_value(normal(3))
        before = {name: p.numpy() for name, p in layer.named_parameters()}
        kernels = [p for p in layer.parameters() if p.ndim > 1]
        others = [p for p in layer.parameters() if p.ndim <= 1]
        groups = [{"params": kernels, "weight_decay": 0.5}, {"params": others}]
        optimizer = paddle.optimizer.SGD(0.5, parameters=groups)
        y = layer(paddle.zeros([1, 2] + [5] * kind.rank))
        y.backward(paddle.zeros_like(y))
        optimizer.step()
        for name, parameter in layer.named_parameters():
            factor = np.float32(1 if name == "bias" else 0.75)  # by learning rate and decay
            assert np.array_equal(parameter.numpy(), before[name] * factor)

    @pytest.mark.parametrize("frozen", ["weight", "coord_weight", "bias"])
    def test_a_frozen_parameter_gets_no_gradient_while_others_do(self, kind, frozen):
        layer = kind(2, 3, 3)
        getattr(layer, frozen).stop_gradient = True
        layer(paddle.to_tensor(normal(1, 2, *[5] * kind.rank))).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert (parameter.grad is None) == (name == frozen)
            assert name == frozen or parameter.grad.any()

    def test_initialisers_of_paddles_class_find_the_feature_kernel(self, kind):
        layer = kind(2, 3, 3)
        before = layer.coord_weight.numpy()

        def initialise(module):
            if isinstance(module, base(layer)):
                initializer.Constant(0.5)(module.weight)
                initializer.Constant(2.0)(module.bias)

        nn.Sequential(layer, nn.ReLU()).apply(initialise)
        assert (layer.weight == 0.5).all()
        assert (layer.bias == 2).all()
        assert np.array_equal(layer.coord_weight.numpy(), before)


class TestWeights:
    def test_round_trip_through_a_file(self, tmp_path):
        layer, other = CoordConv2D(2, 3, 3, coords="xyr"), CoordConv2D(2, 3, 3, coords="xyr")
        save_weights(tmp_path / "layer.safetensors", layer.export_weights())
        other.import_weights(load_weights(tmp_path / "layer.safetensors"))
        for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
            assert paddle.equal_all(mine, theirs)

    def test_exported_arrays_are_canonical_and_copies(self):
        layer = CoordConv2D(4, 6, (3, 2), groups=2, coords="xyr")
        exported = layer.export_weights()
        assert {name: array.shape for name, array in exported.items()} == {
            "weight": (6, 2, 3, 2),
            "coord_weight": (6, 3, 3, 2),
            "bias": (6,),
        }
        exported["bias"][:] = 7
        assert not layer.bias.any()
        assert "bias" not in CoordConv2D(1, 1, 1, bias_attr=False).export_weights()

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_of_each_rank_and_transposed(self, rank, tmp_path):
        kernel = KERNELS[rank]
        for kind, shape in ((LAYERS[rank], (6, 2, *kernel)), (TRANSPOSED[rank], (4, 3, *kernel))):
            layer, other = (kind(4, 6, kernel, groups=2, coords="xr") for _ in range(2))
            exported = layer.export_weights()
            assert {name: array.shape for name, array in exported.items()} == {
                "weight": shape,
                "coord_weight": (6, 2, *kernel),
                "bias": (6,),
            }
            save_weights(tmp_path / "layer.safetensors", exported)
            other.import_weights(load_weights(tmp_path / "layer.safetensors"))
            for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
                assert paddle.equal_all(mine, theirs)

    def test_other_order_of_the_same_coordinates_is_permuted(self):
        layer, other = CoordConv2D(2, 3, 3, coords="xyr"), CoordConv2D(2, 3, 3, coords="ryx")
        other.import_weights(layer.export_weights())
        assert np.array_equal(other.coord_weight.numpy(), layer.coord_weight.numpy()[:, [2, 1, 0]])

    def test_all_problems_at_once_and_nothing_changed(self):
        layer = CoordConv2D(2, 3, 3)
        before = layer.export_weights()
        wrong = {
            "weight": np.ones((3, 4, 3, 3)),
            "conv.weight": np.ones(1),
            "bias": np.ones(3, dtype=np.int64),
        }
        with pytest.raises(ValueError, match="cannot import weights") as error:
            layer.import_weights(wrong)
        for part in (
            "missing: coord_weight, shape (3, 2, 3, 3)",
            "unexpected: conv.weight, shape (1,)",
            "wrong shape: weight is (3, 4, 3, 3), want (3, 2, 3, 3)",
            "not floating-point: bias is int64",
        ):
            assert part in str(error.value)
        with pytest.raises(ValueError, match="other coordinates: coord_weight was made for"):
            layer.import_weights(CoordConv2D(2, 3, 3, coords="xr").export_weights())
        for name, array in layer.export_weights().items():
            assert np.array_equal(array, before[name])

    @pytest.mark.parametrize(
        ("dtype", "exported"),
        [("bfloat16", "float32"), ("float16", "float16"), ("float64", "float64")],
    )
    def test_other_dtypes_travel_without_loss(self, dtype, exported):
        layer, other = CoordConv2D(2, 3, 3, dtype=dtype), CoordConv2D(2, 3, 3, dtype=dtype)
        weights = layer.export_weights()
        assert {str(array.dtype) for array in weights.values()} == {exported}
        other.import_weights(weights)
        assert other.coord_weight.dtype == getattr(paddle, dtype)
        for name, array in other.export_weights().items():
            assert np.array_equal(array, weights[name])


class TestAddCoords:
    @pytest.mark.parametrize(
        ("shape", "first", "final"),
        [
            ((5,), "NCL", "NLC"),
            ((5, 4), "NCHW", "NHWC"),
            ((2, 5, 4), "NCDHW", "NDHWC"),
        ],
    )
    def test_appends_the_grid(self, shape, first, final):
        x, grid = normal(2, 3, *shape), coordinate_grid(shape)
        wanted = np.concatenate([x, np.broadcast_to(grid, (2, *grid.shape))], axis=1)
        for data_format in (None, first):
            y = AddCoords(data_format=data_format)(paddle.to_tensor(x))
            assert np.array_equal(y.numpy(), wanted)
        y = AddCoords(data_format=final)(paddle.to_tensor(np.moveaxis(x, 1, -1)))
        assert np.array_equal(y.numpy(), np.moveaxis(wanted, 1, -1))

    def test_keeps_dtype_and_order(self):
        for dtype in ("float64", "bfloat16"):
            y = AddCoords("yx")(paddle.zeros([1, 1, 2, 3], dtype=dtype))
            assert y.dtype == getattr(paddle, dtype)
            assert y.astype("float32")[0, 1:, 0].tolist() == [[-1, -1, -1], [-1, 0, 1]]

    def test_repr(self):
        assert repr(AddCoords("x")) == "AddCoords(coords=Coordinates('x'), data_format=None)"

    def test_bad_input(self):
        with pytest.raises(TypeError, match="floating-point"):
            AddCoords()(paddle.zeros([1, 1, 3], dtype="int32"))
        with pytest.raises(ValueError, match="1, 2 or 3 axes"):
            AddCoords()(paddle.zeros([1, 1]))
        with pytest.raises(ValueError, match="'y', which a 1-D grid"):
            AddCoords("xy")(paddle.zeros([1, 1, 3]))
        with pytest.raises(ValueError, match=r"must have shape \(N, H, W, C\), got \(1, 1, 3\)"):
            AddCoords(data_format="NHWC")(paddle.zeros([1, 1, 3]))
        with pytest.raises(ValueError, match="data_format must be one of .* got 'NWC'"):
            AddCoords(data_format="NWC")


class TestNetworks:
    @pytest.mark.parametrize(
        ("name", "count"),
        [
            ("plain_cnn", 158913),
            ("coord_cnn", 160065),
            ("coord_classifier", None),
            ("deconv_classifier", None),
        ],
    )
    def test_parameter_count_is_the_modules_own(self, name, count):
        module = networks.build(name, "paddle")
        counted = paddle.summary(module, (1, *networks.get(name).input_shape))["total_params"]
        assert counted == networks.summary(name).parameters
        assert count in (None, counted)

    @pytest.mark.parametrize("name", networks.NETWORKS)
    def test_output_and_gradients(self, name):
        network = networks.get(name)
        weights = networks.initial_weights(network, 4)
        x = normal(2, *network.input_shape)
        dy = normal(2, *list(network.shapes())[-1][2], seed=1)
        module = networks.build(network, "paddle")
        y, gradients = backend.evaluate(module, weights, x, dy)
        assert gradients.keys() == {"x", *weights}
        for part, result in expected(network, weights, x, dy).items():
            assert result.error(y if part == "y" else gradients[part]) <= 1, part
        alone, none = backend.evaluate(module, weights, x)
        assert np.array_equal(alone, y)
        assert none == {}

    @pytest.mark.parametrize(
        ("kernel", "options"),
        [
            ((3, 2), {"padding": ((1, 2), (0, 3)), "stride": (1, 2)}),
            ((3, 3), {"padding": "same", "stride": 2}),
            ((3, 2), {"padding": 2, "padding_mode": "circular", "dilation": (2, 1)}),
            ((4,), {"padding": ((1, 0),), "stride": 2, "transposed": True, "output_padding": 1}),
            ((3, 2), {"stride": (2, 3), "transposed": True, "output_padding": (1, 2), "groups": 2}),
            ((2, 3, 2), {"padding": 1, "groups": 2}),
        ],
    )
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("with_coords", [True, False])
    def test_convolutions_of_a_spec(self, kernel, options, with_coords, bias):
        geometry = ConvGeometry(kernel, **options)
        coords = Coordinates("zyx"[-geometry.rank :] + "r") if with_coords else None
        conv = Conv("conv", 4, 6, geometry, coords, bias)
        network = Network("one", (4, *(5, 7, 4)[: geometry.rank]), (conv,))
        x, weights = normal(2, *network.input_shape), networks.initial_weights(network)
        assert ("conv.bias" in weights) == bias
        dy = normal(2, *conv.output_shape(network.input_shape), seed=1)
        y, gradients = backend.evaluate(backend.build(network, weights), weights, x, dy)
        for part, result in expected(network, weights, x, dy).items():
            assert result.error(y if part == "y" else gradients[part]) <= 1, part

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"input_dilation": 2}, "input_dilation"),
            ({"padding": "same", "dilation": 2}, "dilation with padding='SAME'"),
            (
                {"padding": "same", "padding_mode": "reflect"},
                "padding_mode with padding='SAME'",
            ),
            (
                {"padding": (1, 2), "padding_mode": "circular"},
                "padding_mode with unequal padding",
            ),
            ({"padding": ((0, -1), (0, 0))}, "negative padding"),
            ({"padding": -1, "transposed": True}, "negative padding"),
            (
                {"transposed": True, "output_padding": 1, "dilation": 2},
                "output_padding of the stride or more",
            ),
        ],
    )
    def test_what_paddle_lacks(self, options, reason):
        geometry = ConvGeometry((3, 3), **options)
        for conv in (Conv("conv", 1, 1, geometry), Conv("conv", 1, 1, geometry, Coordinates())):
            with pytest.raises(
                NotImplementedError, match=f"^paddle convolutions have no {reason}$"
            ):
                backend.Network(Network("one", (1, 5, 5), (conv,)))

    def test_weights_travel_in_the_canonical_layout(self, tmp_path):
        module = networks.build("coord_cnn", "paddle", seed=1)
        exported = module.export_weights()
        assert {n: a.shape for n, a in exported.items()} == module.network.weight_shapes()
        assert exported.coordinates == {"conv4": Coordinates("xy")}
        initial = networks.initial_weights("coord_cnn", 1)
        assert all(np.array_equal(exported[name], initial[name]) for name in initial)
        assert np.array_equal(module.linear1.weight.numpy(), initial["linear1.weight"].T)
        save_weights(tmp_path / "net.safetensors", exported)
        other = networks.build("coord_cnn", "paddle", seed=2)
        other.import_weights(load_weights(tmp_path / "net.safetensors"))
        x = paddle.to_tensor(normal(1, 3, 32, 32))
        assert paddle.equal_all(other(x), module(x))
        with pytest.raises(ValueError, match=r"wrong shape: linear1.weight is \(1024, 64\)"):
            other.import_weights({**exported, "linear1.weight": exported["linear1.weight"].T})

    def test_a_step_of_training_lowers_the_loss(self):
        initial = networks.initial_weights("coord_classifier")
        module = networks.build("coord_classifier", "paddle", seed=9)
        step, export = backend.trainer(module, initial)
        labels = np.array([5, 4000])
        x = np.broadcast_to(normal(2, 2, 1, 1), (2, 2, 64, 64)).copy()
        losses = [step(x, labels, 0.01) for _ in range(5)]
        y, _ = backend.evaluate(networks.build("coord_classifier", "paddle"), initial, x)
        y = y.astype(np.float64)
        cross_entropy = np.log(np.exp(y).sum(axis=1)) - y[[0, 1], labels]
        assert losses[0] == pytest.approx(cross_entropy.mean(), rel=1e-6)
        assert losses[-1] < losses[0]
        moved = np.abs(export()["conv1.coord_weight"] - initial["conv1.coord_weight"])
        assert 0 < moved.max() <= 5 * 0.01 * (1 + 1e-3)

    def test_training_is_adam_on_the_mean_cross_entropy(self):
        """Adam in float64, with the published defaults, on a network whose gradient is known."""
        network = Network("one", (4,), (Linear("fc", 4, 3),))
        initial = networks.initial_weights(network)
        step, export = backend.trainer(networks.build(network, "paddle"), initial)
        x, labels, rate = normal(5, 4), np.array([0, 1, 2, 0, 1]), 0.125
        w = {name.removeprefix("fc."): array.astype(np.float64) for name, array in initial.items()}
        m, v = ({name: np.zeros(array.shape) for name, array in w.items()} for _ in range(2))
        for t in range(1, 4):
            p = np.exp(x @ w["weight"].T + w["bias"])
            p /= p.sum(axis=1, keepdims=True)
            loss = -np.log(p[range(5), labels]).mean()
            assert step(x, labels, rate) == pytest.approx(loss, rel=1e-5)
            dy = (p - np.eye(3)[labels]) / 5
            for name, g in {"weight": dy.T @ x, "bias": dy.sum(axis=0)}.items():
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g**2
                rms = np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8
                w[name] -= rate * m[name] / (1 - 0.9**t) / rms
        for name, array in export().items():
            np.testing.assert_allclose(array, w[name.removeprefix("fc.")], atol=1e-5)
