"""Layers of Paddle made from convolutions of Paddle."""

import pytest

paddle = pytest.importorskip("paddle")

from paddle import nn

from coordconv import Coordinates
from coordconv.backends.paddle import CoordConv2D, CoordConv2DTranspose


@pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
@pytest.mark.parametrize("cls", [CoordConv2D, CoordConv2DTranspose])
def test_from_conv(cls, data_format):
    paddle.seed(0)
    plain = getattr(nn, cls.__name__.removeprefix("Coord"))
    conv = plain(4, 8, 3, stride=2, groups=2, data_format=data_format)
    conv.weight.stop_gradient = True
    x = paddle.randn([2, 4, 9, 9] if data_format == "NCHW" else [2, 9, 9, 4])
    layer = cls.from_conv(conv, "xyr")
    assert paddle.equal_all(layer(x), conv(x))
    assert type(conv) is plain
    assert layer.map_only
    assert layer.coords == Coordinates("xyr")
    assert layer.weight.stop_gradient
    assert not layer.layout.split(layer.weight)[1].any()
    for wrong in (nn.Conv1D(3, 8, 3), nn.Linear(3, 8), layer, "conv"):
        with pytest.raises(TypeError, match=f"conv must be a paddle.nn.{plain.__name__}, got a"):
            cls.from_conv(wrong)
    with pytest.raises(ValueError, match="'z'"):
        cls.from_conv(conv, "xz")
    nn.utils.weight_norm(conv)
    with pytest.raises(ValueError, match="computed from other parameters"):
        cls.from_conv(conv)
