"""The torch layers: against the definition, and under the habits of torch's users."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

from coordconv import Coordinates, coordinate_grid, load_weights, networks, save_weights
from coordconv.backends import torch as backend
from coordconv.backends.torch import AddCoords, CoordConv2d, CoordConvTranspose2d
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network
from coordconv.parity.comparison import expected, gamma


def with_gradients(layer, x, dy):
    """Output and gradients by name, in NumPy."""
    x = x.clone().requires_grad_()
    y = layer(x)
    tensors = {"x": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(y, list(tensors.values()), dy)
    found = {"y": y, **dict(zip(tensors, gradients, strict=True))}
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def concatenated(layer, x):
    """The definition in torch itself, for one group: concatenate, then convolve."""
    plain = nn.Conv2d(
        layer.in_channels + len(layer.coords),
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        padding_mode=layer.padding_mode,
        dtype=layer.weight.dtype,
    )
    with torch.no_grad():
        plain.weight.copy_(torch.cat([layer.weight, layer.coord_weight], dim=1))
        plain.bias.copy_(layer.bias)
    return plain(AddCoords(layer.coords)(x))


@pytest.mark.parametrize("coords", ["xy", "yx", "xyr", "r", Coordinates("ry", r_center=0.5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        *({"padding": 2, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    ],
)
def test_equals_the_concatenation_that_defines_it(options, coords):
    torch.manual_seed(0)
    layer = CoordConv2d(3, 4, 3, coords=coords, dtype=torch.float64, **options)
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    found, wanted = layer(x).detach(), concatenated(layer, x).detach()
    assert found.shape == wanted.shape
    terms = layer.weight[0].numel() + layer.coord_weight[0].numel() + 1
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.abs_()
        span = AddCoords(layer.coords)(x)[:, 3:].abs().max()
        size = (layer.weight.flatten(1).sum(1) * x.abs().max()).max()
        size += (layer.coord_weight.flatten(1).sum(1) * span).max() + layer.bias.max()
    assert (found - wanted).abs().max() <= 2 * terms * torch.finfo(x.dtype).eps * size


def test_unbatched_input_is_a_batch_of_one():
    layer = CoordConv2d(3, 4, 3, coords="xyr", padding=1)
    x = torch.randn(3, 6, 5)
    assert torch.equal(layer(x), layer(x[None])[0])


def test_every_group_sees_every_coordinate():
    layer = CoordConv2d(4, 8, 1, groups=4, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    y = layer(torch.zeros(1, 4, 5, 3))[0]
    grid = torch.tensor(np.array(coordinate_grid((5, 3))))
    torch.testing.assert_close(y, torch.einsum("on,nhw->ohw", layer.coord_weight[:, :, 0, 0], grid))
    assert (y.flatten(1).std(dim=1) > 0).all()


def test_options_changed_on_the_layer_count():
    """Dilating a trained backbone by hand is a habit of segmentation code."""
    layer = CoordConv2d(2, 3, 3, padding=1)
    layer.dilation, layer.padding = (2, 2), (2, 2)
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(layer(x), concatenated(layer, x))


class TestInit:
    def test_fan_in_is_what_torch_draws_for_all_channels(self):
        torch.manual_seed(3)
        layer = CoordConv2d(5, 8, 3, coords="xyr")
        torch.manual_seed(3)
        plain = nn.Conv2d(8, 8, 3)
        assert torch.equal(torch.cat([layer.weight, layer.coord_weight], 1), plain.weight)
        assert torch.equal(layer.bias, plain.bias)

    def test_fan_in_of_groups_counts_the_coordinates_in_each(self):
        layer = CoordConv2d(64, 64, 3, groups=64, coords="xy")
        limit = (3 * 9) ** -0.5
        for parameter in layer.parameters():
            assert 0.8 * limit < parameter.abs().max() <= limit

    def test_zeros_starts_as_the_plain_layer(self):
        torch.manual_seed(3)
        layer = CoordConv2d(5, 8, 3, coord_init="zeros")
        torch.manual_seed(3)
        plain = nn.Conv2d(5, 8, 3)
        x = torch.randn(1, 5, 6, 6)
        assert not layer.coord_weight.any()
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)

    def test_reset_parameters_draws_all_anew(self):
        layer = CoordConv2d(2, 3, 3)
        before = {name: p.clone() for name, p in layer.named_parameters()}
        layer.reset_parameters()
        assert all((p != before[name]).all() for name, p in layer.named_parameters())

    def test_initialisers_that_look_for_conv2d_find_it(self):
        assert isinstance(CoordConv2d(1, 1, 1), nn.Conv2d)

    def test_takes_device_and_dtype(self):
        layer = CoordConv2d(2, 3, 3, device="meta", dtype=torch.float16, bias=False)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}
        assert layer(torch.empty(1, 2, 5, 5, device="meta", dtype=torch.float16)).shape[1] == 3

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="coord_init must be one of .* got 'ones'"):
            CoordConv2d(1, 1, 1, coord_init="ones")
        with pytest.raises(ValueError, match="'z', which a 2-D grid does not have"):
            CoordConv2d(1, 1, 1, coords="xyz")
        with pytest.raises(TypeError, match="coords must be a string"):
            CoordConv2d(1, 1, 1, coords=3)


class TestInput:
    layer = CoordConv2d(3, 4, 3, padding=1)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((3, 5), r"input must have shape \(N, C, H, W\) or \(C, H, W\), got \(3, 5\)"),
            ((1, 1, 3, 5, 5), r"must have shape \(N, C, H, W\)"),
            ((1, 4, 5, 5), r"must have 3 channels, got 4 in shape \(1, 4, 5, 5\)$"),
            ((1, 5, 5, 5), "3 channels, got 5 .* the layer adds the coordinates itself"),
            ((1, 3, 0, 5), "no empty axis"),
        ],
    )
    def test_wrong_shapes(self, shape, message):
        with pytest.raises(ValueError, match=message):
            self.layer(torch.zeros(shape))

    def test_integers(self):
        with pytest.raises(TypeError, match="input must be floating-point, got torch.int64"):
            self.layer(torch.zeros(1, 3, 5, 5, dtype=torch.int64))


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_map_is_computed_in_float32_and_rounded_once(self, dtype):
        layer = CoordConv2d(1, 4, 1, bias=False, dtype=dtype)
        with torch.no_grad():
            layer.weight.zero_()
        y = layer(torch.zeros(1, 1, 512, 512, dtype=dtype))[0].double()
        grid = torch.tensor(np.array(coordinate_grid((512, 512), dtype=np.float64)))
        kernel = layer.coord_weight[:, :, 0, 0].double()
        exact = torch.einsum("on,nhw->ohw", kernel, grid)
        size = torch.einsum("on,nhw->ohw", kernel.abs(), grid.abs())
        once = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
        assert ((y - exact).abs() <= once + 2 * gamma(3) * size).all()

    def test_autocast_leaves_the_map_alone(self):
        layer = CoordConv2d(1, 4, 1, bias=False)
        with torch.no_grad():
            layer.weight.zero_()
        x = torch.zeros(1, 1, 512, 512)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, layer(x).bfloat16())

    def test_float64_stays_float64(self):
        layer = CoordConv2d(2, 3, 3, coords="xyr", dtype=torch.float64)
        x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
        wanted = concatenated(layer, x)
        assert (layer(x) - wanted).abs().max() < 1e-6 * torch.finfo(torch.float32).eps

    @pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
    def test_complex_weights(self):
        layer = CoordConv2d(2, 3, 3, coords="xyr", dtype=torch.complex64)
        x = torch.randn(1, 2, 5, 5, dtype=torch.complex64)
        wanted = concatenated(layer, x)
        assert (layer(x) - wanted).abs().max() < 100 * torch.finfo(torch.float32).eps


class TestModule:
    def test_inference_mode_first_does_not_spoil_training_later(self):
        layer = CoordConv2d(2, 3, 3, coords="xyr")
        x = torch.randn(1, 2, 11, 13)
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
        assert layer.coord_weight.grad.abs().sum() > 0

    def test_copies_and_state(self):
        layer = CoordConv2d(2, 3, 3, coords=Coordinates("yx", align="edges"))
        x = torch.randn(1, 2, 5, 5)
        other = CoordConv2d(2, 3, 3, coords=layer.coords)
        other.load_state_dict(layer.state_dict())
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
            assert twin.coords == layer.coords
            assert torch.equal(twin(x), layer(x))

    def test_repr_shows_the_coordinates(self):
        shown = repr(CoordConv2d(2, 3, 3, padding=1, coords="xyr"))
        assert shown == (
            "CoordConv2d(2, 3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), "
            "coords=Coordinates('xyr'))"
        )

    def test_frozen_parameters_get_no_gradient(self):
        layer = CoordConv2d(2, 3, 3).requires_grad_(False)
        assert not layer(torch.randn(1, 2, 5, 5)).requires_grad


class TestWeights:
    def test_round_trip_through_a_file(self, tmp_path):
        layer = CoordConv2d(2, 3, 3, coords="xyr")
        other = CoordConv2d(2, 3, 3, coords="xyr")
        save_weights(tmp_path / "layer.safetensors", layer.export_weights())
        other.import_weights(load_weights(tmp_path / "layer.safetensors"))
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name))

    def test_other_order_of_the_same_coordinates_is_permuted(self):
        layer, other = CoordConv2d(2, 3, 3, coords="xyr"), CoordConv2d(2, 3, 3, coords="ryx")
        other.import_weights(layer.export_weights())
        x = torch.randn(1, 2, 5, 4)
        torch.testing.assert_close(layer(x), other(x))

    def test_all_problems_at_once_and_nothing_changed(self):
        layer = CoordConv2d(2, 3, 3)
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
        for name, array in layer.export_weights().items():
            assert np.array_equal(array, before[name])

    def test_bfloat16_travels_as_float32(self):
        layer = CoordConv2d(2, 3, 3, dtype=torch.bfloat16)
        exported = layer.export_weights()
        assert {array.dtype for array in exported.values()} == {np.dtype(np.float32)}
        other = CoordConv2d(2, 3, 3, dtype=torch.bfloat16)
        other.import_weights(exported)
        assert torch.equal(layer.coord_weight, other.coord_weight)


LAYERS = [f"CoordConv{transpose}{rank}d" for transpose in ("", "Transpose") for rank in (1, 2, 3)]


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


def make(name, *arguments, **options):
    """A layer by name, and a batch for it with axes of different lengths."""
    layer = getattr(backend, name)(*arguments, **options)
    return layer, torch.randn(2, 4, *(5, 4, 3)[: layer.rank])


class TestEveryRank:
    def test_is_torchs_own_class(self, name):
        layer, _ = make(name, 4, 6, 3)
        assert isinstance(layer, getattr(nn, name.removeprefix("Coord")))
        assert layer.coords == Coordinates("xyz"[: layer.rank])

    def test_against_the_reference(self, name):
        torch.manual_seed(1)
        options = {"stride": 2, "padding": 1, "groups": 2}
        layer, x = make(name, 4, 6, 3, coords="rx", **options)
        transposed = "Transpose" in name
        geometry = ConvGeometry((3,) * layer.rank, transposed=transposed, **options)
        network = Network(
            "layer", tuple(x.shape[1:]), (Conv("conv", 4, 6, geometry, layer.coords),)
        )
        dy = torch.randn_like(layer(x))
        found = with_gradients(layer, x, dy)
        weights = {f"conv.{key}": array for key, array in layer.export_weights().items()}
        for key, wanted in expected(network, weights, x.numpy(), dy.numpy()).items():
            assert wanted.error(found[key.removeprefix("conv.")]) <= 1

    def test_unbatched(self, name):
        layer, x = make(name, 4, 6, 2, coords="rx")
        assert torch.equal(layer(x[0]), layer(x[:1])[0])

    def test_fan_in_is_what_torch_draws_for_all_channels(self, name):
        torch.manual_seed(3)
        layer, _ = make(name, 4, 6, 3, groups=2, coords="xr")
        torch.manual_seed(3)
        plain = getattr(nn, name.removeprefix("Coord"))(8, 6, 3, groups=2)
        fused = plain.weight.detach()
        if "Transpose" in name:  # (groups * (2 + 2), 3, *k): both kernels' inputs lead
            groups = fused.reshape(2, 4, 3, *fused.shape[2:])
            features = groups[:, :2].reshape(layer.weight.shape)
            coordinates = groups[:, 2:].transpose(1, 2).reshape(layer.coord_weight.shape)
        else:
            features, coordinates = fused[:, :2], fused[:, 2:]
        assert torch.equal(layer.weight, features)
        assert torch.equal(layer.coord_weight, coordinates)
        assert torch.equal(layer.bias, plain.bias)

    def test_lazy(self, name):
        lazy = getattr(backend, "Lazy" + name)(6, 3, groups=2, coords="rx")
        layer, x = make(name, 4, 6, 3, groups=2, coords="rx")
        torch.manual_seed(0)
        y = lazy(x)
        assert type(lazy) is type(layer)
        torch.manual_seed(0)
        layer.reset_parameters()
        assert torch.equal(y, layer(x))

    def test_wrong_rank(self, name):
        layer, x = make(name, 4, 6, 3)
        with pytest.raises(ValueError, match=r"input must have shape \(N, C, "):
            layer(x[..., None, None])

    def test_copies(self, name):
        layer, x = make(name, 4, 6, 3, coords="rx")
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), layer(x))

    def test_channels_last_memory(self, name):
        layer, x = make(name, 4, 6, 3, coords="rx")
        if layer.rank == 1:
            pytest.skip("torch has no channels-last memory in 1-D")
        memory = {2: torch.channels_last, 3: torch.channels_last_3d}[layer.rank]
        twin = copy.deepcopy(layer).to(memory_format=memory)
        torch.testing.assert_close(twin(x.to(memory_format=memory)), layer(x))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, name, dtype):
        layer, x = make(name, 4, 6, 3, coords="rx")
        y = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        # a kernel, an input and an output rounded: of sums of at most 108 products
        torch.testing.assert_close(y.float(), layer(x), atol=4 * torch.finfo(dtype).eps, rtol=0.05)

    def test_per_sample_gradients(self, name):
        layer, x = make(name, 4, 6, 3, coords="rx")
        parameters = dict(layer.named_parameters())

        def loss(parameters, x):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        together = torch.func.grad(loss)(parameters, x)
        for key, gradient in together.items():
            torch.testing.assert_close(each[key].sum(0), gradient)


class TestOutputSize:
    @pytest.mark.parametrize("size", [(9, 7), (10, 7), (10, 8)])
    def test_of_the_call_is_that_of_output_padding(self, size):
        layer = CoordConvTranspose2d(2, 3, 3, stride=2, padding=1, coords="yr")
        x = torch.randn(1, 2, 5, 4)
        other = copy.deepcopy(layer)
        other.output_padding = (size[0] - 9, size[1] - 7)
        assert layer(x, output_size=size).shape[2:] == size
        assert torch.equal(layer(x, output_size=size), other(x))

    def test_what_torch_refuses(self):
        layer = CoordConvTranspose2d(2, 3, 3, stride=2)
        with pytest.raises(ValueError, match="requested an output size"):
            layer(torch.zeros(1, 2, 5, 4), output_size=(99, 99))
        with pytest.raises(RuntimeError, match="output padding must be smaller"):
            CoordConvTranspose2d(2, 3, 3, output_padding=5)(torch.zeros(1, 2, 5, 4))


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_in_one_graph_as_eager(self, name):
        layer, x = make(name, 4, 6, 3, coords="rx", padding=1)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        compiled(x).square().sum().backward()
        found = layer.coord_weight.grad.clone()
        layer.zero_grad()
        layer(x).square().sum().backward()
        torch.testing.assert_close(found, layer.coord_weight.grad)

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_another_batch_compiles_nothing_anew(self, dynamic):
        layer = CoordConv2d(2, 3, 3, coords="xyr")
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=count)
        for batch in (2, 3):  # the second makes the batch dynamic
            compiled(torch.randn(batch, 2, 5, 7))
        before = len(graphs)
        for batch in (4, 5, 9):
            x = torch.randn(batch, 2, 5, 7)
            torch.testing.assert_close(compiled(x), layer(x))
        assert len(graphs) == before <= 2
        x = torch.randn(4, 2, 6, 8)  # another map
        torch.testing.assert_close(compiled(x), layer(x))

    def test_new_weights_count(self):
        layer = CoordConv2d(2, 3, 3)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(1, 2, 5, 5)
        compiled(x)
        layer.reset_parameters()
        torch.testing.assert_close(compiled(x), layer(x))


class TestAddCoords:
    @pytest.mark.parametrize("shape", [(5,), (5, 4), (2, 5, 4)])
    def test_appends_the_grid(self, shape):
        x = torch.randn(2, 3, *shape)
        y = AddCoords()(x).numpy()
        assert np.array_equal(y[:, :3], x.numpy())
        for sample in y[:, 3:]:
            assert np.array_equal(sample, coordinate_grid(shape))

    def test_bad_input(self):
        with pytest.raises(TypeError, match="floating-point"):
            AddCoords()(torch.zeros(1, 1, 3, dtype=torch.int32))
        with pytest.raises(ValueError, match="1, 2 or 3 axes"):
            AddCoords()(torch.zeros(1, 1))
        with pytest.raises(ValueError, match="'y', which a 1-D grid"):
            AddCoords("xy")(torch.zeros(1, 1, 3))


class TestNetworks:
    @pytest.mark.parametrize("name", networks.NETWORKS)
    def test_parameter_count_is_the_modules_own(self, name):
        module = networks.build(name, "torch")
        counted = sum(parameter.numel() for parameter in module.parameters())
        assert counted == networks.summary(name).parameters

    def test_a_step_of_training_lowers_the_loss(self):
        module = networks.build("deconv_classifier", "torch")
        step, export = backend.trainer(module, module.export_weights())
        x, labels = np.zeros((2, 2, 1, 1), np.float32), np.array([5, 4000])
        losses = [step(x, labels, 0.01) for _ in range(5)]
        assert losses[-1] < losses[0]
        assert not np.array_equal(
            export()["deconv1.bias"], networks.initial_weights("deconv_classifier")["deconv1.bias"]
        )

    def test_same_seed_same_weights(self):
        a, b = (networks.build("coord_cnn", "torch", seed=s).export_weights() for s in (1, 1))
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_gradients_of_the_coordinate_kernel_are_those_of_the_concatenation():
    torch.manual_seed(0)
    layer = CoordConv2d(2, 3, 3, padding=1, coords="xyr", dtype=torch.float64)
    x, dy = torch.randn(2, 2, 6, 5).double(), torch.randn(2, 3, 6, 5).double()
    found = with_gradients(layer, x, dy)["coord_weight"]
    channels = AddCoords("xyr")(x)[:, 2:]
    wanted = nn.grad.conv2d_weight(channels, layer.coord_weight.shape, dy, padding=1).numpy()
    size = nn.grad.conv2d_weight(
        channels.abs(), layer.coord_weight.shape, dy.abs(), padding=1
    ).numpy()
    assert (np.abs(found - wanted) <= 2 * gamma(2 * 30 + 2) * 2.0**-29 * size).all()
