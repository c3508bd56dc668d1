"""What is special to Paddle: its options, its initializers, its graphs, its users' habits.

What holds for the layers of every backend is in ``test_layers.py`` and ``test_bad_input.py``.
"""

import copy
import itertools

import numpy as np
import pytest

paddle = pytest.importorskip("paddle")

from harness import integers, normal
from paddle import nn
from paddle.nn import initializer
from paddle.static import InputSpec

from coordconv import Coordinates, coordinate_grid, position_bias
from coordconv.backends.paddle import (
    AddCoords,
    CoordConv1D,
    CoordConv1DTranspose,
    CoordConv2D,
    CoordConv2DTranspose,
    CoordConv3D,
    CoordConv3DTranspose,
    adapt_state_dict,
    adding,
    options,
)
from coordconv.geometry import ConvGeometry
from coordconv.parity.bounds import COORDINATE_ROUNDINGS, Expected
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


UNIT = 2.0**-24  # the unit roundoff of float32


@pytest.fixture(params=[position_bias.APPEND, position_bias.MAP])
def way(request, monkeypatch):
    """Each way in turn, wherever both are right."""
    monkeypatch.setattr(position_bias, "FORCED", request.param)
    return request.param


def in_format(options, data_format):
    if options.get("padding") == NESTED and data_format == "NHWC":
        return options | {"padding": [NESTED[0], *NESTED[2:], NESTED[1]]}
    return options


def fill(layer, draw):
    """Give every parameter its own data."""
    for i, parameter in enumerate(layer.parameters()):
        parameter.set_value(draw(*parameter.shape, seed=10 + i))
    return layer


def given(layer, x):
    """An array that has the channels first, as the layer takes it."""
    return paddle.to_tensor(np.moveaxis(x, 1, -1) if layer.channels_last else x)


def run(layer, x, dy, **call):
    """Output and gradients by name, channels first, for arrays that have the channels first."""
    features = given(layer, x)
    features.stop_gradient = False
    y = layer(features, **call)
    tensors = {"x": features, **dict(layer.named_parameters())}
    found = paddle.grad(y, list(tensors.values()), given(layer, dy))
    found = {"y": y, **dict(zip(tensors, found, strict=True))}
    return {
        name: np.moveaxis(t.numpy(), -1, 1) if name in "xy" and layer.channels_last else t.numpy()
        for name, t in found.items()
    }


def wanted(layer, geometry, x, dy, unit=UNIT):
    """What :func:`run` must return, with the bounds of its arithmetic in any order."""
    kernel = layer.weight.numpy()
    bias = None if layer.bias is None else layer.bias.numpy()
    reference = Reference(geometry, layer.coords)
    seen = layer._in_channels // geometry.groups + len(layer.coords)
    # of the input's gradient by counting: padding that copies reads a sample more than once
    ones = np.ones(dy.shape), np.ones(kernel.shape)
    terms_x = int(reference.input_gradient(*ones, x.shape[2:]).max())

    def bounded(terms, method, *args):
        return method(*args), gamma(terms, unit), method(*args, magnitudes=True)

    results = {
        "y": bounded(
            seen * geometry.taps + 1 + COORDINATE_ROUNDINGS, reference.forward, x, kernel, bias
        ),
        "x": bounded(terms_x, reference.input_gradient, dy, kernel, x.shape[2:]),
    }
    terms_w = len(x) * int(np.prod(dy.shape[2:])) + 2 + COORDINATE_ROUNDINGS
    values, relative, sizes = bounded(terms_w, reference.weight_gradients, x, dy)
    results |= {
        name: (values[name], relative, sizes[name])
        for name in values
        if name != "bias" or bias is not None
    }
    return {name: Expected(value, bound * size) for name, (value, bound, size) in results.items()}


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
    groups, axis = layer._groups, -1 if layer.channels_last else 1
    extra = "output_padding" if layer.transposed else "padding_mode"
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
        **{extra: getattr(layer, extra if layer.transposed else "_padding_mode")},
    )
    plain.to(dtype=layer.weight.dtype)
    assert plain.set_state_dict(layer.state_dict()) == ([], [])
    add = AddCoords(layer.coords, rank=layer.rank, data_format=layer._data_format)
    return plain(paddle.concat([add(part) for part in x.chunk(groups, axis)], axis), **call)


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
class TestAgainstPaddle:
    """Paddle's own convolution of the concatenation, with the same options, is the oracle."""

    @pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
    @pytest.mark.parametrize(("options", "_"), ZERO_PADDINGS[1:] + COPYING)
    def test_bitwise_where_arithmetic_is_exact(self, options, _, data_format):
        options = in_format(options, data_format)
        layer = CoordConv2D(3, 4, 2, coords="yx", data_format=data_format, **options)
        x = given(fill(layer, integers), integers(2, 3, 9, 5))
        assert np.array_equal(layer(x).numpy(), concatenated(layer, x).numpy())

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
def test_exact_arithmetic_gives_the_same_bits(way, shape, coords, mode, groups, data_format):
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
def test_exact_arithmetic_gives_the_same_bits_transposed(way, shape, coords, groups, last):
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


ATTRIBUTES = [
    None,
    initializer.KaimingUniform(),
    initializer.XavierNormal(),
    initializer.Constant(0.5),
    initializer.Dirac(),
    paddle.ParamAttr(initializer=initializer.Orthogonal()),
]


def by_name(attr):
    return type(getattr(attr, "initializer", attr)).__name__


class TestInit:
    @pytest.mark.parametrize("groups", [1, 4])
    @pytest.mark.parametrize("attr", ATTRIBUTES, ids=by_name)
    @pytest.mark.parametrize("kind", [CoordConv2D, CoordConv1DTranspose])
    def test_fan_in_is_what_paddle_draws_for_all_channels(self, kind, attr, groups):
        made = {"groups": groups, "weight_attr": attr, "bias_attr": initializer.Normal()}
        paddle.seed(3)
        layer = kind(8, 8, 3, coords="xr", **made)
        after = paddle.rand([1])
        paddle.seed(3)
        plain = base(layer)(8 + groups * 2, 8, 3, **made)
        assert paddle.equal_all(layer.weight, plain.weight)
        assert paddle.equal_all(layer.bias, plain.bias)
        assert paddle.equal_all(after, paddle.rand([1]))

    @pytest.mark.parametrize("groups", [1, 4])
    @pytest.mark.parametrize("attr", ATTRIBUTES, ids=by_name)
    @pytest.mark.parametrize("kind", [CoordConv2D, CoordConv1DTranspose])
    def test_zeros_is_what_paddle_draws_for_the_features(self, kind, attr, groups):
        made = {"groups": groups, "weight_attr": attr, "bias_attr": initializer.Normal()}
        paddle.seed(3)
        layer = kind(8, 8, 3, coords="xr", coord_init="zeros", **made)
        after = paddle.rand([1])
        paddle.seed(3)
        plain = base(layer)(8, 8, 3, **made)
        features, coordinates = layer.layout.split(layer.weight)
        assert paddle.equal_all(features, plain.weight)
        assert not coordinates.any()
        assert paddle.equal_all(layer.bias, plain.bias)
        assert paddle.equal_all(after, paddle.rand([1]))
        assert getattr(attr, "initializer", None) is not layer._param_attr.initializer  # a copy

    def test_a_global_initializer_counts(self):
        initializer.set_global_initializer(initializer.Constant(0.5))
        try:
            layer = CoordConv2D(2, 3, 3, coord_init="zeros")
            assert (CoordConv2D(2, 3, 3).weight == 0.5).all()
        finally:
            initializer.set_global_initializer(None)
        assert (layer.weight[:, :2] == 0.5).all()
        assert not layer.weight[:, 2:].any()

    def test_assigned_values_are_of_the_channels_that_are_drawn(self):
        assign = initializer.Assign
        drawn = normal(8, 8, 3, 3)
        layer = CoordConv2D(5, 8, 3, coords="xyr", weight_attr=assign(drawn))
        assert np.array_equal(layer.weight.numpy(), drawn)
        features = drawn[:, :5]
        layer = CoordConv2D(5, 8, 3, coords="xyr", weight_attr=assign(features), coord_init="zeros")
        assert np.array_equal(layer.weight.numpy()[:, :5], features)
        assert not layer.weight[:, 5:].any()

    @pytest.mark.parametrize("coord_init", ["fan_in", "zeros"])
    def test_lazily(self, coord_init):
        with paddle.LazyGuard():
            lazy = CoordConv2D(2, 3, 3, coord_init=coord_init)
        paddle.seed(3)
        for parameter in lazy.parameters():
            parameter.initialize()
        paddle.seed(3)
        layer = CoordConv2D(2, 3, 3, coord_init=coord_init)
        assert paddle.equal_all(lazy.weight, layer.weight)

    @pytest.mark.parametrize("coord_init", ["fan_in", "zeros"])
    def test_in_a_static_graph(self, coord_init):
        """Its startup program draws; the sizes of the batch and of the image are unknown."""
        x = normal(2, 2, 5, 6)
        paddle.enable_static()
        try:
            main, startup = paddle.static.Program(), paddle.static.Program()
            with paddle.static.program_guard(main, startup):
                fed = paddle.static.data("x", [None, 2, None, None], "float32")
                layer = CoordConv2D(2, 3, 3, padding=1, coord_init=coord_init)
                fetched = [layer(fed), layer.weight, layer.bias]
                executor = paddle.static.Executor(paddle.CPUPlace())
                executor.run(startup)
                y, weight, bias = executor.run(main, feed={"x": x}, fetch_list=fetched)
        finally:
            paddle.disable_static()
        assert weight[:, :2].any()
        assert weight[:, 2:].any() == (coord_init == "fan_in")
        geometry = ConvGeometry((3, 3), padding=1)
        eager = CoordConv2D(2, 3, 3, padding=1)
        eager.import_weights({"weight": weight, "bias": bias})
        result = wanted(eager, geometry, x, np.ones((2, 3, 5, 6)))["y"]
        assert result.error(y) <= 1

    def test_names(self):
        with paddle.utils.unique_name.guard():
            first = CoordConv2D(1, 1, 1)
            named = CoordConv2D(1, 1, 1, weight_attr="stem", bias_attr="b", coord_init="zeros")
            later = nn.Conv2D(1, 1, 1)
        assert first.weight.name == "coord_conv2d_0.w_0"
        assert [p.name for p in named.parameters()] == ["stem", "b"]
        assert later.weight.name == "conv2d_0.w_0"

    @pytest.mark.parametrize("coord_init", ["fan_in", "zeros"])
    def test_attributes_hold_for_the_whole_kernel(self, coord_init):
        decay = paddle.regularizer.L2Decay(0.5)
        attr = paddle.ParamAttr(learning_rate=0.25, regularizer=decay)
        layer = CoordConv2D(1, 2, 3, weight_attr=attr, coord_init=coord_init)
        assert attr.initializer is None  # the caller's attribute is left alone
        before = layer.weight.numpy()
        layer(paddle.zeros([1, 1, 5, 5])).backward(paddle.zeros([1, 2, 3, 3]))
        paddle.optimizer.SGD(0.5, parameters=layer.parameters()).step()
        # by learning rate, factor and decay
        assert np.array_equal(layer.weight.numpy(), before * np.float32(1 - 0.5 * 0.25 * 0.5))

    def test_frozen_parameters_get_no_gradient(self):
        attr = paddle.ParamAttr(trainable=False)
        layer = CoordConv2D(1, 1, 3, weight_attr=attr, bias_attr=False)
        assert layer.weight.stop_gradient
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
        for kind in (LAYERS[rank], TRANSPOSED[rank]):
            with pytest.raises(ValueError, match="out_channels must be divisible .* got 3 and 2"):
                kind(2, 3, 1, groups=2)
            with pytest.raises(ValueError, match="in_channels must be .* groups, got 3 and 2"):
                kind(3, 2, 1, groups=2)
            with pytest.raises(ValueError, match="groups must be positive, got 0"):
                kind(3, 2, 1, groups=0)
            wrong = FORMATS[rank % 3 + 1][1]
            with pytest.raises(ValueError, match=f"data_format must be one of .* got '{wrong}'"):
                kind(1, 1, 1, data_format=wrong)


class TestInput:
    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("kind", [*LAYERS.values(), *TRANSPOSED.values()])
    def test_wrong_shapes_of_each_format(self, kind, last):
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
        with pytest.raises(TypeError, match=r"floating-point, got paddle.int32"):
            layer(shaped(3, *(5,) * rank).astype("int32"))

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_output_that_would_be_empty(self, rank):
        """Paddle returns a tensor of a negative length, or crashes."""
        x = paddle.ones([1, 1] + [2] * rank)
        for padding in (1, [3, 2] * rank):
            with pytest.raises(ValueError, match="output would be empty"):
                TRANSPOSED[rank](1, 1, 1, padding=padding)(x)
        with pytest.raises(ValueError, match="output would be empty"):
            TRANSPOSED[rank](1, 1, 1, 3, 4)(x, output_size=-1)

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_output_padding_that_is_none(self, rank):
        x = paddle.ones([1, 1] + [4] * rank)
        for wrong in ([1] * (rank + 1), 1.0, "SAME"):
            with pytest.raises(TypeError, match="output_padding must be an int or"):
                TRANSPOSED[rank](1, 1, 3, 2, output_padding=wrong)(x)

    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("outside", ["zero", "extend"])
    def test_empty_batch(self, data_format, outside):
        coords = Coordinates("xy", outside=outside)
        layer = CoordConv2D(3, 4, 3, coords=coords, data_format=data_format)
        shape = [0, 3, 5, 6] if data_format == "NCHW" else [0, 5, 6, 3]
        made = [0, 4, 3, 4] if data_format == "NCHW" else [0, 3, 4, 4]
        assert layer(paddle.zeros(shape)).shape == made

    def test_by_either_name(self):
        layer, x = CoordConv2D(3, 4, 3), paddle.ones([1, 3, 5, 5])
        assert paddle.equal_all(layer(x=x), layer(input=x))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("batch", [1, 2])
class TestGradients:
    """P is added in place, with a gradient of its own."""

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

    @pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("coords", ["xy", "xyr", Coordinates("xy", outside="extend")], ids=repr)
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_penalty_on_the_inputs_gradient(self, batch, kernel, coords, data_format):
        """Its gradients are the differences of a polynomial of degree four, which are exact.

        Not of the kernel's gradient: the derivative of that in the input is wrong in Paddle 3.3,
        for its own convolutions, too.
        """
        layer = CoordConv2D(2, 3, kernel, coords=coords, data_format=data_format)
        fill(layer, integers).to(dtype="float64")
        x = given(layer, integers(batch, 2, 5, 4)).astype("float64")
        x.stop_gradient = False

        def penalty():
            (slope,) = paddle.grad(layer(x).square().sum(), [x], create_graph=True)
            return slope.square().sum()

        def moved(tensor, index, step):
            values = tensor.numpy()
            changed = values.copy()
            changed[index] += step
            tensor.detach().set_value(changed)
            found = float(penalty())
            tensor.detach().set_value(values)
            return found

        tensors = [x, layer.weight, layer.bias]
        for tensor, gradient in zip(tensors, paddle.grad(penalty(), tensors), strict=True):
            for index in (tuple(n - 1 for n in tensor.shape), (0,) * tensor.ndim):
                one, two = (
                    (moved(tensor, index, step) - moved(tensor, index, -step)) / (2 * step)
                    for step in (1, 2)
                )
                wanted = (4 * one - two) / 3
                assert gradient.numpy()[index] == pytest.approx(wanted, rel=1e-9)

    def test_no_grad_first_does_not_spoil_training_later(self, batch):
        layer, x = CoordConv2D(2, 3, 3, coords="xyr"), paddle.ones([batch, 2, 11, 13])
        with paddle.no_grad():
            assert layer(x).stop_gradient
        layer(x).sum().backward()
        assert (layer.weight.grad[:, 2:].abs().sum((1, 2, 3)) > 0).all()

    def test_an_output_of_another_layer_is_not_written_to(self, batch):
        layer, plain = CoordConv2D(2, 3, 3), nn.Conv2D(2, 2, 1)
        x = plain(paddle.to_tensor(normal(batch, 2, 5, 5)))
        before = x.numpy()
        layer(x)
        assert np.array_equal(x.numpy(), before)


class TestPrecision:
    @pytest.mark.parametrize(("dtype", "unit"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
    @pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
    def test_the_map_is_computed_in_float32_and_rounded_once(self, data_format, dtype, unit):
        """Paddle convolves no 16-bit input on a CPU, so the map alone is looked at."""
        layer = CoordConv2D(1, 4, 1, data_format=data_format)
        layer.to(dtype=dtype)
        shape = [1, 1, 512, 512] if data_format == "NCHW" else [1, 512, 512, 1]
        x = paddle.zeros(shape, dtype)
        assert adding.choose(layer, x) == position_bias.MAP
        output = paddle.zeros([4 if n == 1 and i else n for i, n in enumerate(shape)], dtype)
        kernel = layer.weight[:, 1:]
        y = adding.add_map(layer, output, x, kernel)
        assert y.dtype == layer.weight.dtype
        y = y.astype("float64").numpy()
        y = (np.moveaxis(y, -1, 1) if layer.channels_last else y)[0]
        grid = coordinate_grid((512, 512), dtype=np.float64)
        kernel = kernel.astype("float64").numpy()[:, :, 0, 0]
        exact = np.einsum("on,nhw->ohw", kernel, grid)
        size = np.einsum("on,nhw->ohw", np.abs(kernel), np.abs(grid))
        tiny = float(paddle.finfo(layer.weight.dtype).tiny)
        bound = unit * np.abs(exact) + tiny + 2 * gamma(3, 2.0**-24) * size
        assert (np.abs(y - exact) <= bound).all()

    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("kind", [*LAYERS.values(), *TRANSPOSED.values()])
    def test_float64_stays_float64(self, kind, last):
        """Cast later, after float32 constants may have been kept, which must not be used."""
        rank, shape = kind.rank, (5, 6, 7)[: kind.rank]
        layer = kind(2, 3, 3, coords="xr", data_format=FORMATS[rank][last])
        layer(paddle.ones([1, *shape, 2] if last else [1, 2, *shape]))
        layer.to(dtype="float64")
        geometry = ConvGeometry((3,) * rank, transposed=kind.transposed)
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

    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("coords", ["xy", "xyr", Coordinates("xy", outside="extend")], ids=repr)
    def test_autocast_leaves_the_map_alone(self, batch, coords, monkeypatch):
        """Paddle has no autocast on a CPU but keeps its state: it must be off in the map alone."""
        tracer = paddle.base.framework._dygraph_tracer()
        level = paddle.base.core.AmpLevel
        seen = []
        monkeypatch.setattr(adding, "_CONVOLVE", dict(adding._CONVOLVE))
        for key, made in list(adding._CONVOLVE.items()):

            def spy(*args, made=made, **steps):
                seen.append(tracer._amp_level)
                return made(*args, **steps)

            adding._CONVOLVE[key] = spy
        layer, x = CoordConv2D(1, 4, 3, coords=coords), paddle.ones([batch, 1, 9, 9])
        monkeypatch.setattr(position_bias, "FORCED", position_bias.MAP)
        state = tracer._amp_level, tracer._amp_dtype
        tracer._amp_level, tracer._amp_dtype = level.O1, "bfloat16"
        try:
            y = layer(x)
            assert tracer._amp_level == level.O1
        finally:
            tracer._amp_level, tracer._amp_dtype = state
        assert seen == [level.O1, level.O0]  # the features, and P
        geometry = ConvGeometry((3, 3))
        result = wanted(layer, geometry, x.numpy(), np.ones(y.shape))["y"]
        assert result.error(y.numpy()) <= 1

    @pytest.mark.parametrize("batch", [1, 2])
    def test_the_sum_has_the_dtype_of_the_convolution(self, batch):
        """Autocast on a GPU gives 16 bits from 32-bit parameters; the sum is rounded once."""
        layer, x = fill(CoordConv2D(1, 4, 3), integers), paddle.zeros([batch, 1, 9, 5])
        output = paddle.to_tensor(normal(batch, 4, 7, 3)).astype("bfloat16")
        kernel = layer.weight[:, 1:].detach()
        with paddle.no_grad():
            exact = adding.add_map(layer, output.astype("float32"), x, kernel)
            rounded = adding.add_map(layer, output, x, kernel)
        assert rounded.dtype == paddle.bfloat16
        exact = exact.astype("bfloat16").astype("float32")
        assert paddle.equal_all(rounded.astype("float32"), exact)


GRAPHS = [
    (CoordConv1D, {"padding": [1, 2], "stride": 2}),
    (CoordConv2D, {"padding": 1, "coords": "xyr"}),
    (CoordConv2D, {"padding": "SAME", "stride": 2, "data_format": "NHWC"}),
    (CoordConv2D, {"padding": 1, "padding_mode": "circular", "groups": 2}),
    (CoordConv2D, {"padding": 2, "coords": Coordinates("yx", outside="extend"), "stride": 2}),
    (CoordConv2D, {"padding": 1, "coords": Coordinates("xr", span=(0, 1), align="edges")}),
    (CoordConv3D, {"padding": "SAME", "data_format": "NDHWC"}),
    (CoordConv1DTranspose, {"stride": 2, "output_padding": 1, "data_format": "NLC"}),
    (CoordConv2DTranspose, {"padding": "SAME", "stride": 2, "groups": 2}),
    (CoordConv2DTranspose, {"padding": 1, "coords": Coordinates("yx", outside="extend")}),
    (CoordConv3DTranspose, {"padding": 1, "stride": 2}),
]


class TestGraphs:
    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize(("kind", "made"), GRAPHS)
    def test_of_unknown_batch_and_size(self, kind, made, tmp_path):
        """Saved once, run at several sizes, one of them a single sample on an axis."""
        layer = kind(4, 4, 3, **made)
        last = layer.channels_last
        unknown = [None] * kind.rank
        spec = InputSpec([None, *unknown, 4] if last else [None, 4, *unknown])
        path = str(tmp_path / "layer")
        paddle.jit.save(paddle.jit.to_static(copy.deepcopy(layer), full_graph=True), path, [spec])
        loaded = paddle.jit.load(path)
        for batch, size in ((2, (5, 6, 4)), (1, (9, 3, 3)), (3, (3, 8, 5))):
            x = normal(batch, 4, *size[: kind.rank])
            geometry = options.geometry(layer, size[: kind.rank])
            dy = np.ones((batch, 4, *geometry.output_shape(x.shape[2:])))
            y = loaded(given(layer, x)).numpy()
            y = np.moveaxis(y, -1, 1) if last else y
            assert wanted(layer, geometry, x, dy)["y"].error(y) <= 1

    @pytest.mark.parametrize("full_graph", [False, True])
    @pytest.mark.parametrize(("kind", "made"), GRAPHS)
    def test_compiled_as_eager(self, way, kind, made, full_graph):
        layer = kind(4, 4, 3, **made)
        geometry = options.geometry(layer, (5,) * kind.rank)
        compiled = paddle.jit.to_static(layer, full_graph=full_graph)
        hold(compiled, geometry, (5,) * kind.rank)

    @pytest.mark.usefixtures("way")
    def test_compiled_with_an_output_size(self):
        layer = CoordConv2DTranspose(2, 3, 3, 2)

        class Sized(nn.Layer):
            def __init__(self):
                super().__init__()
                self.conv = layer

            def forward(self, x, size):
                return self.conv(x, size)

        x, size = paddle.to_tensor(normal(1, 2, 5, 5)), paddle.to_tensor([12, 11])
        y = paddle.jit.to_static(Sized(), full_graph=True)(x, size)
        np.testing.assert_allclose(y.numpy(), layer(x, [12, 11]).numpy(), rtol=0, atol=1e-5)

    @pytest.mark.usefixtures("way")
    def test_compiled_for_inputs_of_many_shapes(self):
        """Paddle then takes the shape for unknown."""

        class Mine(CoordConv2D):
            pass

        module = nn.Sequential(nn.ReLU(), Mine(2, 3, 3, coords="xyr"), AddCoords())
        compiled = paddle.jit.to_static(copy.deepcopy(module), full_graph=False)
        for shape in ((5, 6), (7, 4), (8, 9)):
            x = paddle.to_tensor(normal(2, 2, *shape))
            assert np.array_equal(compiled(x).numpy(), module(x).numpy())

    def test_add_coords_of_unknown_size(self, tmp_path):
        """The default scale is the same bits inside a program."""
        add, path = AddCoords("yx", data_format="NHWC"), str(tmp_path / "add")
        paddle.jit.save(add, path, [InputSpec([None, None, None, 2])])
        for shape in ((2, 5, 7), (1, 1, 511)):
            x = paddle.to_tensor(normal(*shape, 2))
            assert np.array_equal(
                paddle.jit.load(path)(x).numpy(), AddCoords("yx", data_format="NHWC")(x).numpy()
            )

    def test_size_that_padding_depends_on(self, tmp_path):
        coords = Coordinates("xy", outside="extend")
        layer = CoordConv2D(2, 3, 3, 2, "SAME", coords=coords)
        with pytest.raises(ValueError, match="input_spec must fix the spatial shape"):
            paddle.jit.save(layer, str(tmp_path / "m"), [InputSpec([None, 2, None, None])])
        paddle.jit.save(layer, str(tmp_path / "m"), [InputSpec([None, 2, 5, 6])])
        x = paddle.to_tensor(normal(2, 2, 5, 6))
        y = paddle.jit.load(str(tmp_path / "m"))(x)
        np.testing.assert_allclose(y.numpy(), CoordConv2D.forward(layer, x).numpy(), atol=1e-5)


def folded(conv, bn):
    """Batch-norm folding by the usual recipe, on weight and bias."""
    factor = bn.weight / (bn._variance + bn._epsilon).sqrt()
    twin = copy.deepcopy(conv)
    twin.weight.set_value(conv.weight * factor.reshape([-1, 1, 1, 1]))
    twin.bias.set_value((conv.bias - bn._mean) * factor + bn.bias)
    return twin


def zeroed(layer):
    initializer.Constant(0.0)(layer.weight)
    return layer


def pruned(layer):
    weight = layer.weight.clone()
    weight[1] = 0
    layer.weight.set_value(weight)
    return layer


TOOLS = {
    "zeroed": zeroed,
    "pruned": pruned,
    "weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "Xavier": lambda layer: initializer.Constant(0.25)(layer.weight) or layer,
}


class TestTools:
    """What people do to a convolution, and what it is on the convolution over C + n channels."""

    @staticmethod
    def pair(seed=3, **made):
        paddle.seed(seed)
        layer = CoordConv2D(2, 4, 3, padding=1, coords="xyr", **made)
        paddle.seed(seed)
        return layer, nn.Sequential(AddCoords("xyr"), nn.Conv2D(2 + 3, 4, 3, padding=1, **made))

    @staticmethod
    def bound(plain, x):
        """Of the difference of two orders of summing the plain network's output."""
        conv, roundings = plain[1], 5 * 9 + 2 + COORDINATE_ROUNDINGS
        size = nn.functional.conv2d(plain[0](x).abs(), conv.weight.abs(), conv.bias.abs(), 1, 1)
        return 2 * gamma(roundings, UNIT) * size.numpy()

    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize("tool", TOOLS)
    def test_on_weight(self, tool):
        layer, plain = self.pair()
        paddle.seed(5)
        layer = TOOLS[tool](layer)
        paddle.seed(5)
        plain[1] = TOOLS[tool](plain[1])
        x = paddle.to_tensor(normal(2, 2, 6, 5))
        for _ in range(3):  # spectral norm's estimate goes on
            y, wanted = layer(x).numpy(), plain(x).numpy()
            assert (np.abs(y - wanted) <= self.bound(plain, x)).all()
        if tool == "zeroed":
            assert (y == layer.bias.numpy().reshape(-1, 1, 1)).all()
        if tool == "pruned":
            assert (y[:, 1] == layer.bias.numpy()[1]).all()

    @pytest.mark.usefixtures("way")
    def test_batch_norm_is_folded(self):
        layer, plain = self.pair()
        bn, x = nn.BatchNorm2D(4), paddle.to_tensor(normal(8, 2, 6, 5))
        for _ in range(20):
            bn(layer(x))
        bn.weight.set_value(normal(4, seed=1))
        bn.bias.set_value(normal(4, seed=2))
        bn.eval()
        twin, wanted = folded(layer, bn), bn(layer(x)).numpy()
        shift = np.abs(bn.bias.numpy() - twin.bias.numpy()).reshape(-1, 1, 1)
        plain[1].set_state_dict(twin.state_dict())
        bound = self.bound(plain, x) + 8 * UNIT * (shift + np.abs(wanted))
        assert (np.abs(twin(x).numpy() - wanted) <= bound).all()

    @pytest.mark.usefixtures("way")
    def test_an_optimizer_of_weights_trains_the_coordinates(self):
        layer, plain = self.pair()
        x = paddle.to_tensor(normal(2, 2, 6, 5))
        for module, conv in ((layer, layer), (plain, plain[1])):
            rule = paddle.optimizer.Momentum(0.01, parameters=[conv.weight], weight_decay=0.1)
            for _ in range(3):
                module(x).square().sum().backward()
                rule.step()
                rule.clear_grad()
        start, _ = self.pair()
        assert ((layer.weight - start.weight)[:, 2:].abs() > 0).all()
        np.testing.assert_allclose(layer.weight.numpy(), plain[1].weight.numpy(), atol=1e-4)

    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize("level", ["O1", "O2"])
    def test_amp(self, level):
        """Paddle has none on a CPU, and goes on in float32."""
        layer, plain = (
            paddle.amp.decorate(module, level=level, dtype="bfloat16") for module in self.pair()
        )
        x = paddle.to_tensor(normal(1, 2, 6, 5))
        with paddle.amp.auto_cast(level=level, dtype="bfloat16"):
            y, wanted = layer(x).numpy(), plain(x).numpy()
        assert (np.abs(y - wanted) <= self.bound(plain, x)).all()


class TestLayer:
    def test_state_saved_by_paddle(self, tmp_path):
        layer, loaded = CoordConv2D(2, 3, 3), CoordConv2D(2, 3, 3)
        paddle.save(layer.state_dict(), str(tmp_path / "layer.pdparams"))
        assert loaded.set_state_dict(paddle.load(str(tmp_path / "layer.pdparams"))) == ([], [])
        assert paddle.equal_all(loaded.weight, layer.weight)

    def test_a_network_takes_what_is_adapted(self):
        """Arrays of NumPy, as ``paddle.load(return_numpy=True)`` returns them, too."""
        net = nn.Sequential(CoordConv2D(2, 3, 3), nn.ReLU())
        plain = nn.Conv2D(2, 3, 3)
        for arrays in (False, True):
            state = {
                f"0.conv.{name}": t.numpy() if arrays else t
                for name, t in plain.state_dict().items()
            }
            adapted = adapt_state_dict(net, state)
            assert list(state) == ["0.conv.weight", "0.conv.bias"]
            assert net.set_state_dict(adapted) == ([], [])
            assert paddle.equal_all(net[0].weight[:, :2], plain.weight)
            assert not net[0].weight[:, 2:].any()

    def test_repr(self):
        assert repr(CoordConv2D(2, 3, 3, padding=1, coords="xyr")) == (
            "CoordConv2D(2, 3, kernel_size=[3, 3], padding=1, data_format=NCHW, "
            "coords=Coordinates('xyr'))"
        )

    @pytest.mark.usefixtures("way")
    def test_a_subclass_may_compute_its_kernel(self):
        """As standardised convolutions do: from ``weight``, at each call."""

        class Doubled(CoordConv2D):
            def forward(self, x):
                kept = self.weight
                self._parameters.pop("weight")
                self.weight = kept * 2
                try:
                    return super().forward(x)
                finally:
                    del self.weight
                    self._parameters["weight"] = kept

        layer = Doubled(2, 3, 3, bias_attr=False)
        plain = CoordConv2D(2, 3, 3, bias_attr=False)
        plain.set_state_dict(layer.state_dict())
        x = paddle.to_tensor(normal(2, 2, 5, 5))
        assert np.array_equal(layer(x).numpy(), 2 * plain(x).numpy())

    def test_appended_on_a_cpu_only_where_the_kernel_is_the_larger(self):
        layer = CoordConv2D(64, 64, 3)
        assert adding.choose(layer, paddle.zeros([1, 64, 7, 7])) == position_bias.APPEND
        assert adding.choose(layer, paddle.zeros([8, 64, 56, 56])) == position_bias.MAP


class TestAddCoords:
    @pytest.mark.parametrize("shape", [(5,), (5, 4), (2, 5, 4)])
    def test_of_each_format(self, shape):
        rank = len(shape)
        x, grid = normal(2, 3, *shape), coordinate_grid(shape)
        wanted = np.concatenate([x, np.broadcast_to(grid, (2, *grid.shape))], axis=1)
        first, final = FORMATS[rank]
        for data_format in (None, first):
            y = AddCoords(rank=rank, data_format=data_format)(paddle.to_tensor(x))
            assert np.array_equal(y.numpy(), wanted)
        y = AddCoords(rank=rank, data_format=final)(paddle.to_tensor(np.moveaxis(x, 1, -1)))
        assert np.array_equal(y.numpy(), np.moveaxis(wanted, 1, -1))

    def test_keeps_dtype_and_order(self):
        for dtype in ("float64", "bfloat16"):
            y = AddCoords("yx")(paddle.zeros([1, 1, 2, 3], dtype=dtype))
            assert y.dtype == getattr(paddle, dtype)
            assert y.astype("float32")[0, 1:, 0].tolist() == [[-1, -1, -1], [-1, 0, 1]]

    def test_repr(self):
        wanted = "AddCoords(coords=Coordinates('x'), rank=2, data_format=None)"
        assert repr(AddCoords("x")) == wanted

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"must have shape \(N, H, W, C\), got \(1, 1, 3\)"):
            AddCoords(data_format="NHWC")(paddle.zeros([1, 1, 3]))
        with pytest.raises(ValueError, match="data_format must be one of .* got 'NLC'"):
            AddCoords(data_format="NLC")


class TestOptions:
    @pytest.mark.parametrize(("made", "meant"), ZERO_PADDINGS[:4] + COPYING)
    def test_there_and_back(self, made, meant):
        geometry = ConvGeometry((3, 2), **meant)
        layer = CoordConv2D(2, 3, **options.arguments(geometry))
        assert options.geometry(layer) == geometry

    @pytest.mark.parametrize(
        ("made", "reason"),
        [
            ({"input_dilation": 2}, "input_dilation"),
            ({"padding": "same", "dilation": 2}, "dilation with padding='SAME'"),
            ({"padding": "same", "padding_mode": "reflect"}, "padding_mode with padding='SAME'"),
            (
                {"padding": (1, 2), "padding_mode": "circular"},
                "padding_mode with unequal padding",
            ),
            (
                {"padding": 1, "padding_mode": "circular", "transposed": True},
                "padding_mode in a transposed convolution",
            ),
            ({"padding": ((0, -1), (0, 0))}, "negative padding"),
            ({"padding": -1, "transposed": True}, "negative padding"),
            (
                {"transposed": True, "output_padding": 1, "dilation": 2},
                "output_padding of the stride or more",
            ),
        ],
    )
    def test_what_paddle_lacks(self, made, reason):
        with pytest.raises(NotImplementedError, match=f"^paddle convolutions have no {reason}$"):
            options.arguments(ConvGeometry((3, 3), **made))


class TestHabits:
    """What training scripts do to every convolution that they find."""

    @pytest.fixture(params=[*LAYERS.values(), *TRANSPOSED.values()])
    def kind(self, request):
        return request.param

    def test_each_parameter_is_listed_once(self, kind):
        module = nn.Sequential(kind(2, 3, 3), nn.ReLU())
        assert sorted(name for name, _ in module.named_parameters()) == ["0.bias", "0.weight"]
        assert len({parameter.name for parameter in module.parameters()}) == 2

    @pytest.mark.parametrize("frozen", ["weight", "bias"])
    def test_a_frozen_parameter_gets_no_gradient_while_others_do(self, kind, frozen):
        layer = kind(2, 3, 3)
        getattr(layer, frozen).stop_gradient = True
        layer(paddle.to_tensor(normal(1, 2, *[5] * kind.rank))).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert (parameter.grad is None) == (name == frozen)
            assert name == frozen or parameter.grad.any()

    def test_initialisers_of_paddles_class(self, kind):
        layer = kind(2, 3, 3)

        def initialise(module):
            if isinstance(module, base(layer)):
                initializer.Constant(0.5)(module.weight)
                initializer.Constant(2.0)(module.bias)

        nn.Sequential(layer, nn.ReLU()).apply(initialise)
        assert (layer.weight == 0.5).all()
        assert (layer.bias == 2).all()
