"""``paddle.quantization`` of CoordConvs: the kernel as a whole, coordinates included.

A number of 8 bits is ``round(value / largest * 127)``, so that of integers up to 127 nothing is
lost, and every comparison here is exact.
"""

import pytest

paddle = pytest.importorskip("paddle")

from harness import integers
from paddle import nn
from paddle.nn.quant.qat import QuantedConv2D
from paddle.quantization import PTQ, QAT, QuantConfig
from paddle.quantization.observers import AbsmaxObserver
from paddle.quantization.quanters import FakeQuanterWithAbsMaxObserver

from coordconv import Coordinates, Window, position_bias, window
from coordconv.backends.paddle import CoordConv1D, CoordConv2D, fuse
from coordconv.backends.paddle.quantizing import QuantedCoordConv2D

OBSERVER = AbsmaxObserver(quant_bits=8)
LARGEST = 127

LAYERS = {
    "plain": {"padding": 1},
    "groups": {"groups": 2, "stride": 2, "padding": [1, 2, 0, 3]},
    "SAME": {"padding": "SAME", "stride": 2, "bias_attr": False},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "extend": {"padding": 1, "coords": Coordinates("yx", outside="extend")},
    "NHWC": {"padding": 1, "data_format": "NHWC", "groups": 2},
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return filled(CoordConv2D(4, 6, 3, **LAYERS[request.param]))


def filled(layer, coordinates=1):
    """Integers up to 127, with the coordinates' part that many times as large."""
    for i, parameter in enumerate(layer.parameters()):
        parameter.set_value(integers(*parameter.shape, seed=i, largest=LARGEST))
    with paddle.no_grad():
        layer.weight[0, 0, 0, 0] = LARGEST
        features, rest = layer.layout.split(layer.weight)
        layer.weight.set_value(paddle.concat([features, coordinates * rest], 1))
        layer.weight[0, -1, 0, 0] = coordinates * LARGEST
    layer.eval()
    return layer


def inputs(layer, size=(9, 5)):
    shape = (*size, layer._in_channels) if layer.channels_last else (layer._in_channels, *size)
    x = integers(2, *shape, largest=LARGEST)
    x.flat[0] = LARGEST
    return paddle.to_tensor(x)


def by_type(config, _):
    config.add_type_config(CoordConv2D, activation=OBSERVER, weight=OBSERVER)


def by_layer(config, network):
    config.add_layer_config(network[0], activation=OBSERVER, weight=OBSERVER)


def configured(network, how):
    """A network's configuration, by ``how`` or for all of it."""
    if how is None:
        return QuantConfig(activation=OBSERVER, weight=OBSERVER)
    config = QuantConfig(activation=None, weight=None)
    how(config, network)
    return config


def quantized(network, x, how=by_type):
    """After training: observed with one input, and converted to numbers of 8 bits."""
    network.eval()
    method = PTQ(configured(network, how))
    observed = method.quantize(network)
    with paddle.no_grad():
        observed(x)
    return method.convert(observed)


@pytest.mark.parametrize("how", [by_type, by_layer, None], ids=["type", "layer", "all"])
def test_what_8_bits_hold_stays(layer, how):
    x = inputs(layer)
    found = quantized(nn.Sequential(layer), x, how)
    assert type(found[0]) is QuantedCoordConv2D
    with paddle.no_grad():
        assert (found(x) == layer(x)).all()
    assert found[0].weight.abs().max() == LARGEST


def test_the_coordinates_part_is_quantized_with_the_features():
    """One scale for both: by the coordinates' part, four times as large, features lose two bits."""
    layer = filled(CoordConv2D(4, 6, 3), coordinates=4)
    x, kernel = inputs(layer), layer.weight.detach()
    found = quantized(nn.Sequential(layer), x)
    rounded = 4 * (kernel / 4).round()
    assert (rounded != kernel)[:, :4].any()
    assert (rounded == kernel)[:, 4:].all()
    assert (found[0].weight_quanter(found[0].weight) == rounded).all()
    wanted = layer(x)
    layer.weight.set_value(rounded)
    with paddle.no_grad():
        assert (found(x) == layer(x)).all()
        assert (found(x) != wanted).any()


def test_training_with_quantization(layer, monkeypatch):
    """The quantized kernel is that of the whole, and gradients pass through to all of it."""
    quanter = FakeQuanterWithAbsMaxObserver(moving_rate=0.9)
    config = QuantConfig(activation=None, weight=quanter)
    network = nn.Sequential(layer)
    network.train()
    method = QAT(config)
    training, x = method.quantize(network), inputs(layer)
    assert type(training[0]) is QuantedCoordConv2D
    for _ in range(3):
        training(x).square().sum().backward()
    gradient = training[0].weight.grad
    assert gradient.shape == layer.weight.shape
    for part in layer.layout.split(gradient):
        assert (part != 0).any()
    training.eval()
    with paddle.no_grad():
        layer.weight.set_value(training[0].weight_quanter(training[0].weight))
        monkeypatch.setattr(position_bias, "FORCED", position_bias.MAP)  # the same sums
        assert (training(x) == layer(x)).all()


def test_the_coordinates_of_a_window(layer):
    """Where 8 bits hold all, the quantized layer computes what the layer computes."""
    x, part = inputs(layer), Window({"x": 0.25, "y": 0.5}, {"x": 0.75, "y": 1.0})
    found = quantized(nn.Sequential(layer), x)
    with paddle.no_grad():
        whole = found(x)
        with window(part):
            error = (found(x) - layer(x)).abs().max()
            assert error <= 1e-6 * layer(x).abs().max() < (whole - layer(x)).abs().max()


def test_paddles_own_class_in_the_mapping_is_an_error():
    """It would convolve the features with a kernel that has the coordinates' channels, too."""
    network = nn.Sequential(filled(CoordConv2D(4, 6, 3)))
    config = configured(network, by_type)
    config.add_qat_layer_mapping(CoordConv2D, QuantedConv2D)
    network.train()
    with pytest.raises(ValueError, match="input's channels is 4.*filter's channels is 6"):
        QAT(config).quantize(network)(inputs(network[0]))


def test_as_paddles_own_convolutions_only_two_dimensions():
    """Of another rank Paddle observes the output, and says so in what it prints."""
    for conv in (CoordConv1D(4, 6, 3), nn.Conv1D(4, 6, 3)):
        network = nn.Sequential(conv)
        network.eval()
        config = QuantConfig(activation=OBSERVER, weight=OBSERVER)
        assert type(PTQ(config).quantize(network)[0]).__name__ == "ObserveWrapper"


@pytest.mark.parametrize("size", [None, (9, 5)])
def test_a_fused_network(layer, size):
    """The convolution is Paddle's own, and is quantized; the map stays as it is."""
    x = inputs(layer)
    found = quantized(fuse(nn.Sequential(layer), size), x, None)
    assert type(found[0].conv) is QuantedConv2D
    with paddle.no_grad():
        assert (found(x) == layer(x)).all()


def test_a_wrong_input_is_refused():
    layer = filled(CoordConv2D(4, 6, 3))
    found = quantized(nn.Sequential(layer), inputs(layer))
    with pytest.raises(ValueError, match="channels"):
        found(paddle.zeros([1, 6, 9, 5]))
