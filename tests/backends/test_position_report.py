"""Where networks of torch get their position from; and the same shares in every framework."""

import numpy as np
import pytest

from coordconv import Coordinates, backends, networks
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network, ReLU
from coordconv.position_report import position_report as core
from coordconv.reference import Reference

COUNT, DRAWS = 32, 32
# What chance may make of the shuffled share of a network that is blind to position: five standard
# deviations, which tests/core/test_position_report.py derives.
CHANCE = 5 * np.sqrt(2 / (DRAWS * (DRAWS - 1))) / COUNT
# Rounding in float32, of a few sums in a row, squared as shares are.
ROUNDING = 1e-10


def images(*shape):
    return np.random.default_rng(0).random(shape or (COUNT, 3, 16, 16), np.float32)


def test_every_framework_finds_the_same(backend):
    """Of a network with padding and coordinates, described once, by the core and ``recorded``."""
    convs = [
        Conv("conv1", 3, 8, ConvGeometry((3, 3), padding=1)),
        Conv("conv2", 8, 8, ConvGeometry((3, 3), padding=1, stride=2), Coordinates("xyr")),
        Conv("up", 8, 4, ConvGeometry((2, 2), stride=2, transposed=True)),
    ]
    network = Network("report", (3, 16, 16), (convs[0], ReLU(), *convs[1:]))
    load = backends.load(backend)
    weights = networks.initial_weights(network)
    module = load.build(network, weights)
    given = (module, module.import_weights(weights)) if backend == "linen" else (module,)
    layers = {"channels_last": True} if backend in ("flax", "linen") else {}
    names = ["conv1", "conv2", "up"]
    report = core(load.recorded(*given, **layers), images(2, 3, 16, 16), draws=4, layers=names)
    assert not report.note

    rows = [report[name] for name in names]
    assert [row.shape[1:] for row in rows] == [(8, 16, 16), (8, 8, 8), (4, 16, 16)]
    assert rows[0].constant > 0.01
    assert rows[0].constant_middle < ROUNDING < rows[1].constant_middle
    exact = core(lambda x: reference(network, weights, x), images(2, 3, 16, 16), draws=4)
    # Three layers in a row sum about a hundred terms each; a share is a ratio of squares.
    bound = 2 * 3 * 100 * 2.0**-24
    for row in rows:
        for number in ("constant", "constant_middle", "shuffled", "shuffled_middle"):
            wanted = getattr(exact[row.name], number)
            assert getattr(row, number) == pytest.approx(wanted, abs=bound)


def reference(network, weights, x):
    """What each convolution of a network returns, by its definition, in float64."""
    found = {}
    for layer in network.layers:
        if isinstance(layer, ReLU):
            x = np.maximum(x, 0)
        else:
            own = (weights[f"{layer.name}.{part}"] for part in ("weight", "bias"))
            x = found[layer.name] = Reference(layer.geometry, layer.coords).forward(x, *own)
    return found


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    module.manual_seed(0)
    return module


def report(model, x=None, **options):
    import torch

    from coordconv.backends.torch import position_report

    given = torch.tensor(images() if x is None else x)
    return position_report(model, given, draws=DRAWS, **options)


def residual(torch, padding, pooling=None):
    """Two convolutions with a shortcut, then one with a stride; normalized as if trained."""
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 3, padding=1, padding_mode=padding)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1, padding_mode=padding)
            self.norm = nn.BatchNorm2d(8)
            self.relu = nn.ReLU(inplace=True)
            self.drop = nn.Dropout(0.5)
            self.pool = pooling or nn.Identity()
            self.down = nn.Conv2d(8, 8, 3, 2, 1, padding_mode=padding)
            self.parts = nn.ModuleList([nn.Linear(8, 4)])
            self.unused = nn.Linear(1, 1)

        def forward(self, x, scale=1.0):
            x = self.relu(self.conv1(x))
            x = self.relu(x + self.drop(self.norm(self.conv2(x))))
            return self.parts[0](scale * self.down(self.pool(x)).mean((2, 3)))

    net = Net()
    for name, value in (("running_mean", -1), ("running_var", 2), ("weight", 3), ("bias", 0.5)):
        getattr(net.norm, name).data.copy_(value + torch.rand(8))
    return net


class TestTorch:
    def test_circular_padding_has_nothing(self, torch):
        found = report(residual(torch, "circular"))
        names = ["conv1", "relu", "conv2", "norm", "drop", "relu#2", "pool", "down"]
        assert [row.name for row in found.rows] == names
        for row in found.rows:
            assert max(row.constant, row.constant_middle) <= ROUNDING
            assert max(abs(row.shuffled), abs(row.shuffled_middle)) <= CHANCE
            assert np.abs(row.map).max() <= ROUNDING**0.5 * 10

    def test_zero_padding_starts_at_the_border_and_creeps_inwards(self, torch):
        found = report(residual(torch, "zeros"))
        shares = [row.shuffled for row in found.rows]
        assert min(shares) > CHANCE
        assert found["conv1"].constant_middle <= ROUNDING
        # After n layers n positions on each side differ from those further in.
        for name, reach in (("conv1", 1), ("conv2", 2), ("down", 2)):
            seen = np.abs(found[name].map) > 1e-5
            inside = slice(reach, len(seen) - reach)
            assert not seen[inside, inside].any()
            assert seen[reach - 1].any()

    def test_coordinates_are_everywhere_at_once(self, torch):
        from coordconv.backends.torch import add_coords

        net = residual(torch, "circular")
        add_coords(net, layers="conv1")
        assert report(net)["conv1"].constant <= ROUNDING  # their part is zero as yet
        net = residual(torch, "circular")
        add_coords(net, layers="conv1", init="fan_in")
        found = report(net)
        assert found["conv1"].kind == "CoordConv2d"
        for row in found.rows:
            assert min(row.constant_middle, row.shuffled_middle) > CHANCE
            assert row.constant > row.constant_middle

    def test_coordinates_alone_are_all(self, torch):
        from coordconv.backends.torch import CoordConv2d

        layer = CoordConv2d(3, 4, 1)
        layer.weight.data[:, :3] = 0
        found = report(torch.nn.Sequential(layer, torch.nn.ReLU()))
        for row in found.rows:
            shares = row.constant, row.constant_middle, row.shuffled, row.shuffled_middle
            assert shares == pytest.approx([1, 1, 1, 1], abs=1e-12)

    def test_a_mixture_is_its_share(self, torch):
        """Of variances that are known: of the pixels, and of 16 equal steps from -1 to 1."""
        from coordconv.backends.torch import CoordConv2d

        layer = CoordConv2d(3, 1, 1, coords="x")
        layer.weight.data = torch.tensor([1.0, 0, 0, 0.5]).reshape(1, 4, 1, 1)
        x = images()
        position = 0.25 * np.linspace(-1, 1, 16).var()
        content = x[:, 0].astype("f8").var(axis=(1, 2)).mean()
        share = position / (position + content)
        found = report(torch.nn.Sequential(layer))["0"]
        assert found.constant == pytest.approx(share, abs=4 * 4 * 2.0**-24)
        # The pixels meet the steps by chance: the core's tests derive the two deviations.
        ramp = 2 * np.sqrt(position * content / (255 * COUNT * DRAWS))
        pairs = content / COUNT * np.sqrt(2 / (255 * DRAWS * (DRAWS - 1)))
        total = position + content - 5 * ramp
        assert abs(found.shuffled - share) <= 5 * (ramp + pairs) / total

    def test_max_pooling_is_padded_too(self, torch):
        """Which constant images, whose largest value is the same with fewer, do not show."""
        pooling = torch.nn.MaxPool2d(3, 2, 1)
        found = report(residual(torch, "circular", pooling))
        assert found["relu#2"].shuffled <= CHANCE < found["pool"].shuffled
        assert found["pool"].constant <= ROUNDING
        assert abs(found["pool"].shuffled_middle) <= CHANCE

    def test_a_checkerboard_is_everywhere(self, torch):
        found = report(torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 4, 2, 2)))["0"]
        assert found.constant > 0.1
        assert found.constant_middle == pytest.approx(found.constant, rel=0.1)
        assert found.shuffled_middle == pytest.approx(found.shuffled, rel=0.1)

    def test_what_is_left_out(self, torch):
        found = report(residual(torch, "zeros"))
        shape = "not (N, C, *S) as the input's (32, 3, 16, 16)"
        unseen = {"unused": "no output was seen"}
        assert found.left_out == {"parts.0": shape, "model output": shape} | unseen
        assert found["relu#2"].kind == "ReLU"

    def test_channels_last_inside_is_left_out(self, torch):
        nn = torch.nn

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.LayerNorm(3)

            def forward(self, x):
                return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        found = report(Block())
        assert [row.name for row in found.rows] == ["conv", "model output"]
        assert found.rows[1].kind == "Block"
        assert found.left_out["norm"].startswith("of other axes than (N, C, *S)")

    @pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
    def test_a_scripted_part_is_said_to_be_unseen(self, torch):
        nn = torch.nn
        part = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), part)
        found = report(net)
        assert [row.name for row in found.rows] == ["0", "model output"]
        assert found.left_out == dict.fromkeys(("1", "1.0", "1.1"), "no output was seen")
        assert all(module.training for module in net.modules())

    def test_kernels_that_modules_compute_are_left_out(self, torch):
        conv = torch.nn.Conv2d(3, COUNT, 3, padding=1)
        net = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(conv))
        found = report(net)
        assert [row.name for row in found.rows] == ["0", "model output"]
        reason = "of other axes than (N, C, *S), as images of twice the length show"
        assert found.left_out == {"0.parametrizations.weight": reason} | {
            "0.parametrizations.weight.0": reason
        }

    def test_tokens_of_heads_are_left_out(self, torch):
        """As an attention has them, ``(N, heads, length, channels)``: four axes, as images."""

        class Heads(torch.nn.Module):
            def forward(self, x):
                return x.flatten(2).mT.unflatten(2, (1, -1)).transpose(1, 2)

        found = report(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), Heads()))
        assert [row.name for row in found.rows] == ["0"]
        assert "images of twice the length" in found.left_out["1"]

    def test_arguments_that_the_model_would_never_see(self, torch):
        with pytest.raises(ValueError, match="kwargs must not have names, output_gradient"):
            report(torch.nn.Conv2d(3, 4, 1), names={}, output_gradient=None)

    def test_a_position_embedding_of_one_size(self, torch):
        nn = torch.nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Parameter(torch.randn(3, 16, 16))
                self.conv = nn.Conv2d(3, 3, 1)

            def forward(self, x):
                return self.conv(x + self.embedding)

        found = report(Net())
        assert "RuntimeError" in found.note
        assert found["conv"].constant_middle > 0.5

    def test_the_model_is_left_as_it_was(self, torch):
        net = residual(torch, "zeros").train()
        net.norm.eval()
        net.conv2.weight.requires_grad_(False)

        def state():
            modes = [(m.training, len(m._forward_hooks)) for m in net.modules()]
            gradients = [(p.requires_grad, p.grad) for p in net.parameters()]
            values = [tensor.clone() for tensor in net.state_dict().values()]
            return modes, gradients, [*values, torch.get_rng_state()]

        def same(a, b):
            return a[:2] == b[:2] and all(map(torch.equal, a[2], b[2]))

        before, x = state(), images()
        first = report(net, x)
        assert same(state(), before)
        assert report(net.eval(), x) == first  # in evaluation mode anyway
        net.train().norm.eval()
        with pytest.raises(RuntimeError, match="channels"):
            report(net, x[:, :1])
        assert same(state(), before)

    def test_what_a_model_draws_moves_no_random_numbers(self, torch):
        class Noisy(torch.nn.Module):
            def forward(self, x):
                return x + torch.rand_like(x)

        torch.manual_seed(3)
        wanted = torch.rand(4)
        torch.manual_seed(3)
        report(torch.nn.Sequential(Noisy()))
        assert torch.equal(torch.rand(4), wanted)

    def test_eval_itself_is_not_called(self, torch):
        """It may merge weights, as adapters of low rank do, and train does not undo it for each."""

        class Merging(torch.nn.Conv2d):
            def train(self, mode=True):
                raise AssertionError("it was called")

        report(torch.nn.Sequential(Merging(3, 3, 3)))

    def test_arguments_go_to_the_model(self, torch):
        class Net(torch.nn.Module):
            def forward(self, x, ramp=0.0):
                return x + ramp

        assert abs(report(Net()).rows[0].constant) <= ROUNDING
        assert report(Net(), ramp=torch.linspace(-1, 1, 16)).rows[0].constant > 0.5

    @pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
    def test_of_other_types(self, torch, dtype):
        net = torch.nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        net = torch.nn.Sequential(net).to(getattr(torch, dtype))
        from coordconv.backends.torch import position_report

        given = torch.tensor(images()).to(getattr(torch, dtype))
        row = position_report(net, given, draws=4)["0"]
        assert row.constant <= ROUNDING
        assert row.shape == (COUNT, 8, 16, 16)

    @pytest.mark.parametrize("rank", [1, 3])
    def test_of_other_ranks(self, torch, rank):
        conv = getattr(torch.nn, f"Conv{rank}d")(2, 4, 3, padding=1)
        row = report(torch.nn.Sequential(conv), images(COUNT, 2, *[8] * rank))["0"]
        assert row.constant_middle <= ROUNDING
        assert min(row.constant, row.shuffled) > CHANCE >= abs(row.shuffled_middle)

    @pytest.mark.parametrize(
        ("given", "match"),
        [
            (lambda torch: ("model", torch.rand(1, 1, 4)), "model must be a torch.nn.Module"),
            (lambda torch: (torch.nn.ReLU(), np.ones((1, 1, 4))), "input must be a torch.Tensor"),
            (lambda torch: (torch.nn.ReLU(), torch.ones(1, 1, 4).int()), "got ndarray int32"),
        ],
    )
    def test_other_arguments_are_refused(self, torch, given, match):
        from coordconv.backends.torch import position_report

        with pytest.raises(TypeError, match=match):
            position_report(*given(torch))
