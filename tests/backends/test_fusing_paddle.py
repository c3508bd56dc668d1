"""Paddle's layers and networks fused for inference: the same outputs, and what cannot be fused."""

import copy
import warnings

import numpy as np
import pytest

paddle = pytest.importorskip("paddle")

from harness import integers, normal
from paddle import nn
from paddle.static import InputSpec

from coordconv import Coordinates, position_bias
from coordconv.backends.paddle import (
    AddCoords,
    CoordConv1D,
    CoordConv1DTranspose,
    CoordConv2D,
    CoordConv2DTranspose,
    CoordConv3D,
    CoordConv3DTranspose,
    adding,
    fuse,
    options,
)
from coordconv.backends.paddle.fusing import FusedCoordConv
from coordconv.parity.bounds import PRECISIONS
from coordconv.reference import Reference

# Axis lengths of which every coordinate is a multiple of a power of two: all sums are exact.
SIZES = ((9, 5, 3), (5, 9, 17), (3, 9, 5), (17, 3, 9), (5, 5, 5))


def exact(layer):
    """Small integers for weights, so that no order of a sum makes a difference."""
    for i, parameter in enumerate(layer.parameters()):
        parameter.set_value(
            paddle.to_tensor(integers(*parameter.shape, seed=i, largest=3)).astype(parameter.dtype)
        )
    layer.eval()
    return layer


def inputs(layer, size, batch=2):
    shape = (*size, layer._in_channels) if layer.channels_last else (layer._in_channels, *size)
    x = paddle.to_tensor(integers(batch, *shape, largest=3))
    return x.astype(layer.weight.dtype)


def equal(found, wanted):
    assert found.dtype == wanted.dtype
    assert list(found.shape) == list(wanted.shape)
    return bool((found == wanted).all())


def in_float64():
    layer = CoordConv2D(3, 4, 3)
    layer.to(dtype="float64")
    return layer


LAYERS = {
    "1-D": lambda: CoordConv1D(3, 4, 3, padding=1),
    "2-D": lambda: CoordConv2D(3, 4, 3, padding=1, coords="yx"),
    "3-D": lambda: CoordConv3D(3, 4, 3, padding=1),
    "1-D transposed": lambda: CoordConv1DTranspose(3, 4, 3, stride=2),
    "2-D transposed": lambda: CoordConv2DTranspose(4, 4, 3, stride=2, padding=1, groups=2),
    "2-D transposed, output_padding": lambda: CoordConv2DTranspose(
        3, 4, 3, stride=2, output_padding=1
    ),
    "2-D transposed, SAME": lambda: CoordConv2DTranspose(3, 4, 3, stride=2, padding="SAME"),
    "3-D transposed": lambda: CoordConv3DTranspose(3, 4, 3),
    "pointwise": lambda: CoordConv2D(3, 4, 1),
    "groups": lambda: CoordConv2D(4, 6, 3, padding=1, groups=2, stride=2),
    "SAME": lambda: CoordConv2D(3, 4, 3, padding="SAME", stride=2),
    "a padding per end": lambda: CoordConv2D(3, 4, 3, padding=[1, 2, 0, 3]),
    "a pair per axis": lambda: CoordConv2D(3, 4, 3, padding=[[0, 0], [0, 0], [1, 2], [0, 3]]),
    "dilation": lambda: CoordConv2D(3, 4, 3, padding=2, dilation=2),
    "reflect": lambda: CoordConv2D(3, 4, 3, padding=1, padding_mode="reflect"),
    "replicate": lambda: CoordConv1D(3, 4, 3, padding=1, padding_mode="replicate"),
    "circular": lambda: CoordConv3D(3, 4, 3, padding=1, padding_mode="circular"),
    "extend": lambda: CoordConv2D(3, 4, 3, padding=1, coords=Coordinates("xy", outside="extend")),
    "NLC": lambda: CoordConv1D(3, 4, 3, padding=1, data_format="NLC"),
    "NHWC": lambda: CoordConv2D(4, 4, 3, padding=1, groups=2, data_format="NHWC"),
    "NHWC, reflect": lambda: CoordConv2D(
        3, 4, 3, padding=1, padding_mode="reflect", data_format="NHWC"
    ),
    "NHWC, extend": lambda: CoordConv2D(
        3, 4, 3, padding=1, data_format="NHWC", coords=Coordinates("xy", outside="extend")
    ),
    "NHWC transposed": lambda: CoordConv2DTranspose(3, 4, 3, stride=2, data_format="NHWC"),
    "NDHWC": lambda: CoordConv3D(3, 4, 3, data_format="NDHWC"),
    "no bias": lambda: CoordConv2D(3, 4, 3, bias_attr=False),
    "float64": in_float64,
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return exact(LAYERS[request.param]())


@pytest.mark.parametrize("gradients", [False, True])
def test_one_map_for_one_size(layer, gradients):
    size = (9, 5, 3)[: layer.rank]
    fused, x = layer.fuse(size), inputs(layer, size)
    with paddle.set_grad_enabled(gradients):
        for given in (x, x[:1]):
            assert equal(fused(given), layer(given))
    assert fused.map.dtype == layer.weight.dtype
    assert all(parameter.stop_gradient for parameter in fused.parameters())


def test_maps_as_they_come(layer):
    fused = layer.fuse()
    for size in 2 * SIZES:
        x = inputs(layer, size[: layer.rank])
        assert equal(fused(x), layer(x))
    assert 1 < len(fused._maps) <= len(SIZES)


@pytest.mark.parametrize("size", [None, (9, 5)])
def test_gradients_of_the_input(size):
    layer = exact(CoordConv2D(2, 3, 3))
    fused, x = layer.fuse(size), inputs(layer, (9, 5))
    with paddle.no_grad():
        fused(x)  # a map that is made here serves below
    x.stop_gradient = False
    found, wanted = (paddle.grad((f(x) ** 2).sum(), x)[0] for f in (fused, layer))
    assert equal(found, wanted)


def test_maps_are_bounded_and_follow_the_state():
    layer, other = exact(CoordConv2D(2, 3, 3)), CoordConv2D(2, 3, 3)
    other.eval()
    network = nn.Sequential(layer.fuse())  # of which Paddle asks the outermost layer alone
    for n in range(3, 30):
        network(paddle.zeros([1, 2, n, 3]))
    assert len(network[0]._maps) == 8
    x = paddle.to_tensor(normal(2, 2, 29, 3))
    network.set_state_dict(nn.Sequential(other.fuse()).state_dict())
    assert paddle.allclose(network(x), other(x), atol=1e-5)
    network.to(dtype="float64")
    other.to(dtype="float64")
    assert paddle.allclose(network(x.astype("float64")), other(x.astype("float64")))


@pytest.mark.parametrize("size", [None, (5, 9)])
def test_a_copy(size):
    layer = exact(CoordConv2D(2, 3, 3))
    fused, x = layer.fuse(size), inputs(layer, (5, 9))
    before = copy.deepcopy(fused)
    fused(x)
    for twin in (before, copy.deepcopy(fused)):
        assert equal(twin(x), layer(x))


@pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
def test_an_output_size(data_format):
    layer = exact(CoordConv2DTranspose(2, 3, 3, stride=2, data_format=data_format))
    fused, x = layer.fuse(), inputs(layer, (3, 2))
    for size in ([8, 5], [7, 6], None):
        assert equal(fused(x, size), layer(x, size))
    fused = layer.fuse((3, 2))
    assert equal(fused(x, [7, 5]), layer(x))
    with pytest.raises(ValueError, match=r"output must have the size that was fused.*\[8, 5\]"):
        fused(x, [8, 5])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_the_sum_is_rounded_once(dtype):
    """Paddle convolves no 16-bit input on a CPU, so another convolution stands in."""

    class Given(nn.Conv2D):
        def forward(self, x):
            return output

    layer = CoordConv2D(1, 4, 3)
    layer.to(dtype=dtype)
    exact(layer)  # of P; its sum with the output is rounded
    x, output = paddle.zeros([2, 1, 9, 5], dtype), paddle.to_tensor(normal(2, 4, 7, 3))
    output = output.astype(dtype)
    wanted = adding.add_map(layer, output, x, layer.weight[:, 1:].detach())
    for fused in (layer.fuse(), layer.fuse((9, 5))):
        fused.conv.__class__ = Given
        assert equal(fused(x), wanted)
        assert fused.map is None or fused.map.dtype == paddle.float32


@pytest.mark.parametrize("full_graph", [False, True])
@pytest.mark.parametrize("size", [None, (9, 5)])
def test_to_static(layer, size, full_graph):
    size = None if size is None else (9, 5, 3)[: layer.rank]
    x = inputs(layer, (9, 5, 3)[: layer.rank])
    static = paddle.jit.to_static(layer.fuse(size), full_graph=full_graph)
    with paddle.no_grad():
        assert equal(static(x), layer(x))


def saved(layer, shape, path):
    """The layer as ``paddle.jit.load`` returns it."""
    paddle.jit.save(layer, path, input_spec=[InputSpec(shape, "float32")])
    return paddle.jit.load(path)


def shape_of(layer, *size):
    """Of any number of inputs."""
    channels = layer._in_channels
    return [None, *size, channels] if layer.channels_last else [None, channels, *size]


def test_saved_with_an_open_size(layer, tmp_path):
    dtype = str(layer.weight.dtype).removeprefix("paddle.")
    spec = InputSpec(shape_of(layer, *[None] * layer.rank), dtype)
    paddle.jit.save(layer.fuse(), str(tmp_path / "model"), input_spec=[spec])
    loaded = paddle.jit.load(str(tmp_path / "model"))
    for size in SIZES:
        x = inputs(layer, size[: layer.rank])
        assert equal(loaded(x), layer(x))


def test_a_radius_saved_with_an_open_size(tmp_path):
    """Its square roots are rounded, by the program as by NumPy, but sums are in another order."""
    layer = CoordConv2D(4, 6, 3, padding=1, coords="xyr")
    layer.eval()
    loaded = saved(layer.fuse(), [None, 4, None, None], str(tmp_path / "model"))
    for size in SIZES:
        x = paddle.to_tensor(normal(2, 4, *size[:2]))
        wanted = layer(x)
        assert (loaded(x) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_saved_at_one_size(tmp_path):
    layer = exact(CoordConv2D(4, 6, 3, padding=1))
    loaded = saved(layer.fuse((9, 5)), [None, 4, 9, 5], str(tmp_path / "model"))
    for batch in (1, 3):
        x = inputs(layer, (9, 5), batch)
        assert equal(loaded(x), layer(x))
    program = str(loaded.program())
    assert "conv2d" in program
    for made in ("arange", "concat", "assign_value"):  # nothing is made at the call
        assert made not in program
    with pytest.raises(ValueError, match=r"fused, \(9, 5\), got one that input_spec leaves open"):
        saved(layer.fuse((9, 5)), [None, 4, None, None], str(tmp_path / "open"))


# --- networks --------------------------------------------------------------------------------


class ConvBNLayer(nn.Layer):
    """As a detector's toolbox has it."""

    def __init__(self, channels, out, norm=None, **options):
        super().__init__()
        self.conv = CoordConv2D(channels, out, 3, bias_attr=False, **options)
        self.batch_norm = nn.BatchNorm2D(out) if norm is None else norm

    def forward(self, x):
        return nn.functional.leaky_relu(self.batch_norm(self.conv(x)), 0.1)


class Block(nn.Layer):
    """Its order of calls is not the order of its layers."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2D(8)
        self.other = nn.BatchNorm2D(8)
        self.conv = CoordConv2D(8, 8, 3, padding=1, bias_attr=False)
        self.used_twice = CoordConv2D(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.used_twice(nn.functional.relu(self.bn(self.conv(x))))
        return self.other(y) + y


class Mixed(nn.Layer):
    """In ``twice`` a ReLU that also stands elsewhere is between the layer and the norm."""

    def __init__(self):
        super().__init__()
        relu = nn.ReLU()
        self.twice = nn.Sequential(relu, CoordConv2D(8, 8, 1), relu, nn.BatchNorm2D(8))
        self.stem = nn.Sequential(CoordConv2D(8, 8, 3), nn.BatchNorm2D(8), nn.ReLU())
        self.conv, self.bn = CoordConv2D(8, 8, 3), nn.BatchNorm2D(8)

    def forward(self, x):
        return self.bn(self.conv(self.stem(self.twice(x))))


def trained(model, *shape):
    """With statistics that are not those of the start."""
    with warnings.catch_warnings(), paddle.no_grad():
        warnings.simplefilter("ignore")  # batch_norm's, that it tracks statistics
        for seed in range(5):
            model(paddle.to_tensor(2 * normal(4, *(shape or (8, 17, 9)), seed=seed) + 1))
    model.eval()
    return model


def same(fused, model, *shape):
    """Whether two networks compute the same, but for the rounding of another order."""
    x = paddle.to_tensor(normal(2, *(shape or (8, 17, 9)), seed=9))
    with paddle.no_grad():
        wanted = model(x)
        return bool((fused(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def norms(fused):
    return {row.name: row.batch_norm for row in fused.fuse_report.layers}


SIZED = {
    "any": None,
    "size": (17, 9),
    "x": paddle.zeros([1, 8, 17, 9]),
    "arguments": (paddle.ones([3, 8, 17, 9]),),
}


@pytest.mark.parametrize("size", SIZED.values(), ids=SIZED)
@pytest.mark.parametrize("kind", [Block, Mixed])
def test_a_network(kind, size):
    model = trained(kind())
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model, size)
    assert same(fused, model)
    assert not any(isinstance(each, CoordConv2D) for each in fused.sublayers())
    report = fused.fuse_report
    if size is None:
        names = ("conv", "used_twice") if kind is Block else ("twice.1", "stem.0", "conv")
        assert norms(fused) == dict.fromkeys(names)  # the network may run any part by itself
        assert "other modules than nn.Sequential are left: no size was given" in str(report)
    elif kind is Block:
        assert norms(fused) == {"conv": "bn", "used_twice": None}
        assert isinstance(fused.bn, nn.Identity)
        assert isinstance(fused.other, nn.BatchNorm2D)
        assert report.notes == (
            "other is left: nothing shows that it alone takes the output of used_twice",
        )
    else:
        assert norms(fused) == {"twice.1": None, "stem.0": "stem.1", "conv": "bn"}
        assert not report.notes
    assert all((row.size is None) == (size is None) for row in report.layers)
    for name, tensor in model.state_dict().items():
        assert equal(tensor, before[name])


def test_a_sequence_that_is_run_in_parts():
    class Tapped(nn.Layer):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(CoordConv2D(8, 8, 3), nn.BatchNorm2D(8))

        def forward(self, x):
            y = self.parts[0](x)
            return self.parts[1](y) + y

    model = trained(Tapped())
    assert same(fuse(model), model)
    assert norms(fuse(trained(nn.Sequential(model.parts)))) == {"0.0": "0.1"}


def test_a_detectors_neck():
    """Layers that a list of Python refers to beside the sublayers, on features of two sizes."""

    class Neck(nn.Layer):
        def __init__(self):
            super().__init__()
            self.convs = [
                self.add_sublayer(f"conv.{i}", ConvBNLayer(8, 8, padding=1)) for i in range(2)
            ]
            self.heads = [self.add_sublayer("head", CoordConv2D(8, 4, 1))]
            self.norms = [self.add_sublayer("norm", nn.BatchNorm2D(4))]

        def forward(self, inputs):
            feats = inputs["feats"]
            first, second = (conv(x) for conv, x in zip(self.convs, feats, strict=True))
            return {"boxes": [self.norms[0](self.heads[0](first))], "second": (second, 3)}

    model = Neck()
    rng = np.random.default_rng(0)
    feats = [paddle.to_tensor(normal(2, 8, n, n)) for n in (16, 8)]
    for each in model.sublayers():
        if isinstance(each, nn.BatchNorm2D):
            each._mean.set_value(rng.normal(size=each._mean.shape).astype("float32"))
    model.eval()
    fused = fuse(model, ({"feats": feats},))
    assert norms(fused) == {
        "conv.0.conv": "conv.0.batch_norm",
        "conv.1.conv": "conv.1.batch_norm",
        "head": "norm",
    }
    assert [row.size for row in fused.fuse_report.layers] == [(16, 16), (8, 8), (16, 16)]
    with paddle.no_grad():
        found, wanted = (each({"feats": feats}) for each in (fused, model))
    assert paddle.allclose(found["boxes"][0], wanted["boxes"][0], atol=1e-5)
    assert paddle.allclose(found["second"][0], wanted["second"][0], atol=1e-5)
    assert isinstance(fused.heads[0], FusedCoordConv)
    assert isinstance(fused.norms[0], nn.Identity)


@pytest.mark.parametrize("change", [nn.functional.relu_, lambda y: y.clip_(-100, 100)])
def test_what_a_change_in_place_is_between_is_not_folded(change):
    """The norm is given the very tensor that the layer returned, but not the values.

    The second changes no value in the runs, but those of large inputs.
    """

    class InPlace(nn.Layer):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = CoordConv2D(8, 8, 3), nn.BatchNorm2D(8)

        def forward(self, x):
            return self.bn(change(self.conv(x)))

    model = trained(InPlace())
    fused = fuse(model, (17, 9))
    assert norms(fused) == {"conv": None}
    assert same(fused, model)


def test_an_input_that_the_network_writes_to():
    class Writes(nn.Layer):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = CoordConv2D(8, 8, 3), nn.BatchNorm2D(8)

        def forward(self, x):
            return self.bn(self.conv(x.add_(paddle.ones([1]))))

    x = paddle.to_tensor(normal(1, 8, 17, 9))
    before = x.clone()
    assert norms(fuse(trained(Writes()), x)) == {"conv": "bn"}
    assert equal(x, before)


def test_an_output_that_nothing_can_be_seen_of():
    class Hidden(nn.Layer):
        def __init__(self, hide):
            super().__init__()
            self.conv, self.bn, self.hide = CoordConv2D(8, 8, 3), nn.BatchNorm2D(8), hide

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y), self.hide(y)

    class Box:
        def __init__(self, y):
            self.y = y

    for hide in (
        Box,
        lambda y: y * np.nan,
        lambda y: paddle.where(y > 0, y, -y),
        lambda y: y > 100,  # which NaN is not
        lambda y: nn.functional.relu(y - 100),
    ):
        assert norms(fuse(trained(Hidden(hide)), (17, 9))) == {"conv": None}
    assert norms(fuse(trained(Hidden(lambda y: "a word")), (17, 9))) == {"conv": "bn"}


def test_a_layer_that_sees_two_sizes_or_is_in_two_places():
    conv = CoordConv2D(8, 8, 3, padding=1)
    norm = nn.BatchNorm2D(8)
    model = trained(nn.Sequential(conv, norm, nn.MaxPool2D(2), conv, norm, CoordConv2D(8, 4, 1)))
    for size in (None, (17, 9)):
        fused = fuse(model, size)
        assert fused[0] is fused[3]
        assert fused[1] is fused[4]
        assert norms(fused) == {"0": None, "5": None}
        assert [row.size for row in fused.fuse_report.layers] == [None, size and (8, 4)]
        assert same(fused, model)


def test_a_layer_of_which_a_call_wants_another_size():
    class Up(nn.Layer):
        def __init__(self):
            super().__init__()
            self.up = CoordConv2DTranspose(8, 8, 3, stride=2)

        def forward(self, x):
            return self.up(x, output_size=[36, 20])

    model = Up()
    model.eval()
    fused = fuse(model, (17, 9))
    assert fused.fuse_report.layers[0].size is None
    assert same(fused, model)


def test_without_batch_norms():
    model = trained(nn.Sequential(CoordConv2D(8, 8, 3), nn.BatchNorm2D(8)))
    for size in (None, (17, 9)):
        fused = fuse(model, size, batch_norm=False)
        assert isinstance(fused[1], nn.BatchNorm2D)
        assert not fused.fuse_report.notes
        assert isinstance(fuse(model, size)[1], nn.Identity)


NORMS = {
    "1-D": (lambda: CoordConv1D(8, 8, 3), lambda: nn.BatchNorm1D(8)),
    "1-D channels last": (
        lambda: CoordConv1D(8, 8, 3, data_format="NLC"),
        lambda: nn.BatchNorm1D(8, data_format="NLC"),
    ),
    "2-D channels last": (
        lambda: CoordConv2D(8, 8, 3, data_format="NHWC"),
        lambda: nn.BatchNorm2D(8, data_format="NHWC"),
    ),
    "3-D": (lambda: CoordConv3D(8, 8, 3), lambda: nn.BatchNorm3D(8, epsilon=1e-2)),
    "no scale": (lambda: CoordConv2D(8, 8, 3), lambda: nn.BatchNorm2D(8, weight_attr=False)),
    "no shift": (
        lambda: CoordConv2D(8, 8, 3, bias_attr=False),
        lambda: nn.BatchNorm2D(8, bias_attr=False),
    ),
    "global": (lambda: CoordConv2D(8, 8, 3), lambda: nn.BatchNorm2D(8, use_global_stats=True)),
    "older": (lambda: CoordConv2D(8, 8, 3), lambda: nn.BatchNorm(8)),
    "transposed": (lambda: CoordConv2DTranspose(8, 8, 3), lambda: nn.BatchNorm2D(8)),
    "transposed in groups": (
        lambda: CoordConv2DTranspose(8, 8, 3, groups=2),
        lambda: nn.BatchNorm2D(8),
    ),
}


@pytest.mark.parametrize("with_size", [False, True])
@pytest.mark.parametrize(("make", "make_norm"), NORMS.values(), ids=NORMS)
def test_what_is_folded_is_within_the_bound(make, make_norm, with_size):
    """Of the network as it is: its statement in float64, and the roundings of a fused layer."""
    layer, norm = make(), make_norm()
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=8) + shift
        for name, shift in (("_mean", 0), ("_variance", 4), ("weight", 1), ("bias", 0))
    }
    for name, array in arrays.items():
        tensor = getattr(norm, name)
        if tensor is None:
            arrays[name] = np.full(8, float(name == "weight"))
        else:
            tensor.set_value(array.astype("float32"))
            arrays[name] = tensor.numpy().astype(float)
    model = nn.Sequential(layer, norm)
    model.eval()
    size = (7, 6, 5)[: layer.rank]
    fused = fuse(model, size if with_size else None)
    assert isinstance(fused[1], nn.Identity)
    x = normal(2, 8, *size)
    given = np.moveaxis(x, 1, -1).copy() if layer.channels_last else x
    with paddle.no_grad():
        found = fused(paddle.to_tensor(given)).numpy()
    found = np.moveaxis(found, -1, 1) if layer.channels_last else found

    weights = layer.export_weights()
    reference = Reference(options.geometry(layer, size), layer.coords)
    bias = weights.get("bias", np.zeros(8))
    factor = arrays["weight"] / np.sqrt(arrays["_variance"] + norm._epsilon)
    shift = arrays["bias"] - arrays["_mean"] * factor
    column = (8, *(1,) * layer.rank)
    y = reference.forward(x, weights["weight"], bias)
    wanted = y * factor.reshape(column) + shift.reshape(column)
    sizes = reference.forward(np.abs(x), weights["weight"], bias, magnitudes=True)
    sizes = sizes * np.abs(factor).reshape(column) + np.abs(shift).reshape(column)
    # As many roundings as the layer's own sum has terms, and one of each folded weight.
    channels = 8 // layer._groups + len(layer.coords)
    terms = channels * 3**layer.rank + 3
    bound = PRECISIONS["float32"].error(sizes, terms, 0)
    assert (np.abs(found - wanted) <= bound).all()


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2D(8, use_global_stats=False),
        lambda: nn.BatchNorm(8, trainable_statistics=True),
        lambda: nn.BatchNorm(8, act="relu"),
        lambda: type("Own", (nn.BatchNorm2D,), {"forward": lambda self, x: x})(8),
    ],
    ids=["of the batch", "older, of the batch", "with a relu", "a subclass"],
)
def test_norms_that_are_not_folded(norm):
    model = trained(nn.Sequential(CoordConv2D(8, 8, 3), norm()))
    for size in (None, (17, 9)):
        fused = fuse(model, size)
        assert norms(fused) == {"0": None}
        assert same(fused, model)


def test_a_norm_over_another_axis_is_not_folded():
    model = nn.Sequential(CoordConv2D(8, 8, 3, padding=1), nn.BatchNorm2D(8, data_format="NHWC"))
    model = trained(model, 8, 17, 8)
    for size in (None, (17, 8)):
        fused = fuse(model, size)
        assert norms(fused) == {"0": None}
        assert same(fused, model, 8, 17, 8)


def test_a_layer_as_the_network():
    layer, x = CoordConv2D(3, 4, 3), paddle.to_tensor(normal(1, 3, 5, 5))
    layer.eval()
    fused = fuse(layer, (5, 5))
    assert paddle.allclose(fused(x), layer(x), atol=1e-5)
    assert str(fused.fuse_report) == "(itself)  CoordConv2D  one map for 5x5"


def test_a_network_saved_with_an_open_size(tmp_path):
    model = trained(nn.Sequential(ConvBNLayer(8, 8, coords="xyr"), nn.MaxPool2D(2)))
    fused = fuse(model, paddle.to_tensor(normal(1, 8, 17, 9)))
    assert norms(fused) == {"0.conv": "0.batch_norm"}
    loaded = saved(fused, [None, 8, 17, 9], str(tmp_path / "one"))
    assert same(loaded, model)
    report = fuse(model).fuse_report
    assert report.layers[0].batch_norm is None
    loaded = saved(fuse(model), [None, 8, None, None], str(tmp_path / "open"))
    for shape in ((8, 17, 9), (8, 9, 30)):
        assert same(loaded, model, *shape)


def test_what_cannot_be_fused():
    layer = CoordConv2D(3, 4, 3)
    with pytest.raises(ValueError, match="must be in evaluation mode.*call eval"):
        layer.fuse()
    layer.eval()
    model = nn.Sequential(layer, nn.BatchNorm2D(4))
    with pytest.raises(ValueError, match="must be in evaluation mode, '1' is not"):
        fuse(model)
    for size in ((5,), (5.0, 5.0), (5, True)):
        with pytest.raises(ValueError, match="size must have 2 lengths, got"):
            layer.fuse(size)
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        layer.fuse((2, 5))  # smaller than the kernel
    with pytest.raises(TypeError, match="size must be a spatial shape, got 5"):
        layer.fuse(5)
    plain = nn.Sequential(AddCoords(), nn.Conv2D(5, 3, 3))
    with pytest.raises(ValueError, match="model has no CoordConv to fuse"):
        fuse(plain)
    with pytest.raises(TypeError, match="model must be a paddle.nn.Layer, got int"):
        fuse(3)
    for size in (5, "xy", (), {"x": 3}):
        with pytest.raises(TypeError, match="size must be a spatial shape or an example of"):
            fuse(layer, size)
    fused = layer.fuse((5, 6))
    with pytest.raises(ValueError, match=r"the size that was fused, \(5, 6\), got \(6, 5\)"):
        fused(paddle.zeros([1, 3, 6, 5]))
    for f in (fused, layer.fuse()):
        with pytest.raises(ValueError, match="channels"):
            f(paddle.zeros([1, 4, 5, 6]))
        with pytest.raises(TypeError, match="floating-point"):
            f(paddle.zeros([1, 3, 5, 6], "int32"))


def test_in_a_static_graph_nothing_is_fused():
    paddle.enable_static()
    try:
        with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
            layer = CoordConv2D(3, 4, 3)
            layer.eval()
            with pytest.raises(ValueError, match=r"in eager mode: call paddle.disable_static\(\)"):
                layer.fuse()
    finally:
        paddle.disable_static()


def test_what_would_be_lost_is_refused():
    class Own(CoordConv2D):
        def forward(self, x):
            return nn.functional.relu(super().forward(x))

    own = Own(3, 4, 3)
    own.eval()
    with pytest.raises(ValueError, match="Own has a forward of its own, which would be lost"):
        own.fuse()
    normed = nn.utils.weight_norm(CoordConv2D(3, 4, 3))
    normed.eval()
    with pytest.raises(ValueError, match="weight must be a parameter.*remove_weight_norm"):
        fuse(nn.Sequential(normed))
    x = paddle.ones([1, 3, 5, 5])
    wanted = normed(x)
    nn.utils.remove_weight_norm(normed)
    assert paddle.allclose(normed.fuse()(x), wanted, atol=1e-5)
    replaced = CoordConv2D(3, 4, 3)
    replaced.eval()
    replaced.forward = lambda x: 2 * x
    with pytest.raises(ValueError, match="CoordConv2D has a forward of its own"):
        replaced.fuse()
    hooked = CoordConv2D(3, 4, 3)
    hooked.eval()
    hooked.register_forward_post_hook(lambda _, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="a layer must have no forward hooks to be fused"):
        hooked.fuse()
    static = nn.Sequential(CoordConv2D(3, 4, 3))
    static.eval()
    with pytest.raises(ValueError, match="forward of '' must be .*fuse the network before"):
        fuse(paddle.jit.to_static(static))


@pytest.mark.parametrize("size", [None, (17, 9)])
@pytest.mark.parametrize(
    "hook",
    [
        lambda norm: norm.register_forward_post_hook(lambda _, inputs, output: output.abs()),
        lambda norm: norm.register_forward_pre_hook(lambda _, inputs: inputs[0].abs()),
    ],
    ids=["after", "before"],
)
def test_a_batch_norm_with_a_hook_is_left(hook, size):
    model = trained(nn.Sequential(CoordConv2D(8, 4, 3), nn.BatchNorm2D(4)))
    hook(model[1])
    fused = fuse(model, size)
    assert fused.fuse_report.layers[0].batch_norm is None
    assert same(fused, model)


def test_a_network_whose_forward_paddle_flops_has_set_to_what_it_is():
    model = nn.Sequential(CoordConv2D(8, 4, 3))
    model.eval()
    model.forward = model.forward
    fused = fuse(model, (17, 9))
    assert fused.forward.__self__ is fused
    assert isinstance(fused[0], FusedCoordConv)
    assert same(fused, model)


@pytest.mark.parametrize("way", ["append", "map"])
def test_neither_way_is_forced_on_it(way, monkeypatch):
    monkeypatch.setattr(position_bias, "FORCED", way)
    layer = exact(CoordConv2D(3, 4, 3))
    x = inputs(layer, (5, 9))
    assert equal(layer.fuse((5, 9))(x), layer(x))
    assert equal(layer.fuse()(x), layer(x))


# What fuse reads of a batch normalization; all that is public is the names in a state dict.
def test_private_names():
    for kind in (nn.BatchNorm2D, nn.BatchNorm):
        found = vars(kind(1)).keys() | kind(1).state_dict().keys()
        own = {"_trainable_statistics", "_act", "_data_layout"}
        names = own if kind is nn.BatchNorm else {"_use_global_stats", "_data_format"}
        missing = ({"_mean", "_variance", "_epsilon"} | names) - found
        assert not missing, f"{kind} has no {missing}: do not fold it"


def test_counting():
    """As docs/deployment.md has it; a floor of tox runs it where the newest NumPy does not."""
    from paddle.hapi.dynamic_flops import count_convNd

    def count(layer, inputs, output):
        layer.total_ops += output.size * (layer.weight[0].size + 1)

    def plain(channels):
        return paddle.flops(nn.Sequential(nn.Conv2D(channels, 8, 3)), [1, channels, 16, 20])

    try:
        plain(3)
    except TypeError as error:
        pytest.skip(f"paddle.flops itself fails with NumPy {np.__version__}: {error}")
    model, shape = nn.Sequential(CoordConv2D(3, 8, 3)), [1, 3, 16, 20]
    assert paddle.flops(model, shape, custom_ops={CoordConv2D: count}) == plain(5)
    assert paddle.flops(model, shape, custom_ops={CoordConv2D: count_convNd}) == plain(3)
    assert paddle.summary(model, tuple(shape))["total_params"] == 8 * 5 * 9 + 8
    model.eval()
    assert isinstance(fuse(model, (16, 20))[0], FusedCoordConv)  # also after a count
