"""Networks of torch and Paddle that are given coordinates, and lose them: what both do alike.

What one of them alone has is in ``test_changing.py`` and ``test_changing_paddle.py``.
"""

import copy
import json
import random
import re

import numpy as np
import pytest
from changing_cases import FACES, equal, refused, set_training

from coordconv import Coordinates, Window, window
from coordconv.backends import BACKENDS
from coordconv.changing import Change, Changes


@pytest.fixture(params=FACES)
def face(request):
    if BACKENDS[request.param].missing:
        pytest.skip(f"{request.param} is not installed")
    return FACES[request.param]()


@pytest.mark.parametrize("training", [False, True])
def test_outputs_are_what_they_were_to_the_bit(face, training):
    model = set_training(face.network(), training)
    x, before = face.images(), copy.deepcopy(model)
    changes = face.add_coords(model)
    assert equal(model(x), before(x))
    assert len(changes.layers) == 4
    assert [type(model[i]) for i in (0, 3, 4)] == [face.coord()] * 3
    assert type(model[5]) is face.coord(transposed=True)
    for name, tensor in before.state_dict().items():  # the statistics of training, too
        if "weight" not in name:
            assert equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("seed", range(60))
def test_outputs_of_one_layer_are_what_they_were_to_the_bit(face, seed):
    draw = random.Random(seed)
    rank = draw.choice([1, 2, 2, 2, 3])
    groups = draw.choice([1, 1, 1, 4])
    options = {
        "rank": rank,
        "transposed": draw.random() < 0.3,
        "stride": draw.choice([1, 2]),
        "dilation": draw.choice([1, 1, 2]),
        "groups": groups,
        "padding": draw.choice([0, 1]),
        "bias": draw.random() < 0.7,
    }
    mode = draw.choice(["zeros", "zeros", "reflect", "circular"])
    if not options["transposed"] and (face.name, rank, mode) != ("paddle", 3, "reflect"):
        options["padding_mode"] = mode
    widths = [4 * draw.choice([1, 8, 16]) if groups > 1 else draw.choice([3, 16, 64, 512])]
    widths.append(4 * draw.choice([1, 8, 16]))
    conv = face.conv(*widths, draw.choice([1, 3]), **options)
    sizes = [draw.choice([5, 7, 14]) for _ in range(rank)]
    x = face.images(draw.choice([1, 2, 8]), widths[0], *sizes)
    if face.name == "torch" and rank == 2 and draw.random() < 0.3:
        last = {"memory_format": face.package.channels_last}
        x, conv = x.contiguous(**last), conv.to(**last)
    wanted = conv(x)
    with face.without_gradients():
        without_gradient = conv(x)
    face.add_coords(conv, draw.choice([None, "x", "xr"]))
    assert equal(conv(x), wanted)
    with face.without_gradients():
        assert equal(conv(x), without_gradient)


def test_a_module_in_two_places_stays_one(face):
    conv = face.conv(4, 4, 3, padding=1)
    model = face.nn.Sequential(conv, face.nn.Sequential(conv, face.nn.ReLU()))
    changes = face.add_coords(model)
    assert [change.name for change in changes.layers] == ["0"]
    assert model[0] is model[1][0] is conv
    assert tuple(conv.weight.shape) == (4, 6, 3, 3)


def test_tied_kernels_stay_one_or_are_refused_by_name(face):
    model = face.nn.Sequential(*[face.conv(4, 4, 3, stride=n) for n in (1, 1, 2)])
    model[1].weight = model[0].weight
    kernel = model[0].weight
    refused(face, model, "0.weight and 1.weight are one parameter", layers="0")
    refused(face, model, "0.weight and 1.weight", exclude="1")
    face.add_coords(model, layers=["0", "1"])
    assert model[0].weight is model[1].weight is kernel
    assert tuple(kernel.shape) == (4, 6, 3, 3)
    with pytest.raises(ValueError, match="0.weight and 1.weight are one parameter"):
        face.remove_coords(model, layers="0")
    face.remove_coords(model)
    assert model[0].weight is model[1].weight is kernel
    assert tuple(kernel.shape) == (4, 4, 3, 3)


def test_a_kernel_tied_to_what_is_no_convolution_is_refused(face):
    model = face.nn.Sequential(face.conv(4, 4, 1, rank=1), face.nn.ReLU())
    model[1].table = model[0].weight
    refused(face, model, "0.weight and 1.table are one parameter", coords="x")


def test_no_random_number_is_drawn_and_gradients_stay(face):
    model = face.network()
    model(face.images()).sum().backward()
    parameters = {n: p for n, p in model.named_parameters() if p.grad is not None}
    before = {name: p.grad.clone() for name, p in parameters.items()}
    face.seed(7)
    face.add_coords(model)
    drawn = face.package.rand([3])
    face.seed(7)
    assert equal(face.package.rand([3]), drawn)
    assert equal(model[0].weight.grad[:, :3], before["0.weight"])
    assert not model[0].weight.grad[:, 3:].any()
    face.remove_coords(model)
    assert all(equal(p.grad, before[name]) for name, p in parameters.items())


def kept_by(optimizer, face, parameter):
    if face.name == "torch":
        states = optimizer.state.get(parameter, {}).values()
    else:
        name = f"{parameter.name}_"
        states = [s for n, s in optimizer.state_dict().items() if n.startswith(name)]
    return [tuple(state.shape) for state in states if tuple(state.shape) not in ((), (1,))]


@pytest.mark.parametrize(
    ("face", "name"),
    [(face, name) for face, cls in FACES.items() for name in cls.optimizers],
    indirect=["face"],
)
def test_an_optimizer_of_before(face, name):
    model, x = face.network(), face.images()
    twin = copy.deepcopy(model)
    optimizers = [face.optimizer(name, each) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        face.step(each, optimizer, x)
    changes, (optimizer, other) = face.add_coords(model), optimizers

    def is_refused_until_updated():
        kernel = model[0].weight
        before = kernel.detach().clone()
        shapes = kept_by(optimizer, face, kernel)
        assert bool(shapes) == (name != "plain")
        if shapes:
            for _ in range(2):
                with pytest.raises(RuntimeError, match="call update_optimizer"):
                    optimizer.step()
            assert equal(kernel, before)
            assert kept_by(optimizer, face, kernel) == shapes
            changes.update_optimizer(optimizer)
            assert {*kept_by(optimizer, face, kernel)} == {tuple(kernel.shape)}

    is_refused_until_updated()
    face.step(model, optimizer, x)
    face.step(twin, other, x)  # which was not changed, and is not refused
    # One step further the features' part is where it would be, and the coordinates have moved.
    for one, two in ((model[i], twin[i]) for i in (0, 3, 4, 5)):
        features, coordinates = one.layout.split(one.weight)
        assert equal(features, two.weight)
        assert coordinates.abs().max() > 0
    changes.undo()
    is_refused_until_updated()
    face.step(model, optimizer, x)
    assert {*kept_by(optimizer, face, model[0].weight)} <= {(8, 3, 3, 3)}
    face.add_coords(model).undo()
    face.step(model, optimizer, x)  # since nothing is of another shape by now


@pytest.mark.parametrize("coords", ["xy", "yr"])
def test_an_optimizer_of_other_coordinates(face, coords):
    """Its momenta have the shape of the kernel, and are of the coordinates of before."""
    model, x = face.network(), face.images()
    changes = face.add_coords(model)
    optimizer = face.optimizer("momentum", model)
    face.step(model, optimizer, x)
    changes.undo()
    changes = face.add_coords(model, coords)
    for each in model.parameters():
        each.grad = each * 0
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="call update_optimizer"):
        optimizer.step()
    assert equal(model[0].weight, before)
    changes.update_optimizer(optimizer)
    optimizer.step()
    features, coordinates = model[0].layout.split(model[0].weight)
    assert not equal(features, model[0].layout.split(before)[0])  # whose momenta stay
    assert not coordinates.abs().max()
    face.step(model, optimizer, x)


def test_states_of_before_and_after(face):
    model, x = face.network(), face.images()
    set_training(model, False)
    before, wanted = copy.deepcopy(model.state_dict()), model(x)
    face.add_coords(model)
    for parameter in model.parameters():
        face.fill(parameter)
    face.load(model, before)
    assert equal(model(x), wanted)
    other = set_training(face.network(), False)
    face.add_coords(other)
    face.load(other, model.state_dict())
    assert equal(other(x), wanted)
    for copied in face.copies(model):
        assert equal(copied(x), wanted)
    face.remove_coords(model)
    face.load(model, before)
    assert equal(model(x), wanted)


def test_training_goes_on(face):
    model, x = face.network(), face.images()
    face.add_coords(model, "xyr")
    target = face.tensor(np.linspace(-1, 1, 22, dtype="f").reshape(1, 1, 1, 22).repeat(4, 0))
    optimizer = face.optimizer("adam", model)
    losses = [face.step(model, optimizer, x, target) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert all(model[i].layout.split(model[i].weight)[1].abs().max() > 0 for i in (0, 3, 4, 5))
    model.eval()
    assert (face.ours.fuse(model, size=(18, 22))(x) - model(x)).abs().max() <= 1e-5


def test_fan_in_draws_the_coordinates_alone(face):
    model = face.network()
    before = model[0].weight.detach().clone()
    face.seed(3)
    face.add_coords(model, "xyr", layers="0", init="fan_in")
    face.seed(3)
    drawn = face.conv(6, 8, 3).weight
    assert equal(model[0].weight[:, :3], before)
    assert equal(model[0].weight[:, 3:], drawn[:, 3:])
    assert not model[0].map_only


def test_layers_are_chosen(face):
    model = face.network()
    assert [c.name for c in face.add_coords(model, layers=re.compile("[03]")).layers] == ["0", "3"]
    changes = face.add_coords(model, "yx", layers=["0", "4"])
    assert [change.name for change in changes.layers] == ["4"]
    assert changes.skipped == {"0": f"has coordinates already, {Coordinates('xy')}"}
    assert model[0].coords == Coordinates("xy")
    assert model[4].coords == Coordinates("yx")
    assert str(face.add_coords(model, layers="0")).startswith(
        "no layer changed\n0: left, has coord"
    )
    everything = face.nn.Sequential(face.conv(2, 2, 3, rank=1), face.conv(2, 2, 3))
    assert "'y'" in face.add_coords(everything, "xy").skipped["0"]
    refused(face, everything, "0: .*'y'", layers="0")
    assert type(everything[0]) is face.kind(1, False)


def test_what_changed_is_shown(face):
    plain = face.kind(2, False).__name__
    changes = face.add_coords(face.network(), "xyr", layers=["0", "3"])
    assert changes.layers == (
        Change("0", plain, f"Coord{plain}('xyr')", 216),
        Change("3", plain, f"Coord{plain}('xyr')", 24),
    )
    assert str(changes) == str(Changes(changes.layers))
    assert str(changes).splitlines()[1] == f"0      {plain}  Coord{plain}('xyr')  216"
    assert [each["name"] for each in json.loads(changes.to_json())["layers"]] == ["0", "3"]


def test_bad_arguments(face):
    model = face.network()
    refused(face, model, "coords 'q'", coords="q")
    refused(face, model, "init must be one of", init="ones")
    refused(face, model, "no layer 'conv7'; there are", layers="conv7")
    refused(face, model, "exclude: no layer 'conv7'", exclude="conv7")
    refused(face, model, "layers must be names", TypeError, layers=3)
    refused(face, face.nn.Sequential(), "no layer that could be changed")
    with pytest.raises(TypeError, match=rf"model must be a {face.name}\.nn\.\w+, got dict"):
        face.add_coords({})
    with pytest.raises(ValueError, match="no layer that could be changed"):
        face.remove_coords(model)


def test_a_network_that_is_one_convolution(face):
    conv, x = face.conv(3, 4, 3), face.images()
    wanted = conv(x)
    changes = face.add_coords(conv)
    assert type(conv) is face.coord()
    assert equal(conv(x), wanted)
    changes.undo()
    assert type(conv) is face.kind(2, False)
    assert equal(conv(x), wanted)
    assert not {"coords", "coord_init", "map_only"} & {*vars(conv)}
    with pytest.raises(RuntimeError, match="nothing to undo"):
        changes.undo()


def subclasses(face):
    """One that goes together with coordinates, and one that does not."""
    pad, convolve = face.nn.functional.pad, face.functional_conv

    class SamePadding(face.kind(2, False)):
        """Pads one end more than the other, as TensorFlow does."""

        def forward(self, x):
            return convolve(pad(x, [0, 1, 0, 1]), self.weight, self.bias, 2)

    class Standardized(face.kind(2, False)):
        """Starts with a scale of zero, so that its first outputs tell nothing of its kernel."""

        def __init__(self, *args):
            super().__init__(*args)
            self.scale = copy.deepcopy(self.bias)
            with face.package.no_grad():
                self.scale.copy_(0 * self.scale)

        def forward(self, x):
            mean, spread = (f([1, 2, 3], keepdim=True) for f in (self.weight.mean, self.weight.std))
            kernel = (self.weight - mean) / spread * self.scale.reshape([-1, 1, 1, 1])
            return convolve(x, kernel, self.bias)

    SamePadding.__qualname__ = "SamePadding"
    globals()["SamePadding"] = SamePadding  # where pickle looks for it
    return SamePadding, Standardized


def test_subclasses(face):
    same, standardized = subclasses(face)
    plain = face.kind(2, False).__name__
    face.seed(0)
    model = face.nn.Sequential(same(3, 8, 3), standardized(8, 8, 3))
    x, calls = face.images(), []
    register = "register_forward_hook" if face.name == "torch" else "register_forward_post_hook"
    handle = getattr(model[0], register)(lambda *_: calls.append(1))
    what = f"nothing to change\n  0: SamePadding is a subclass of {plain}.*subclasses=True"
    refused(face, model, what)
    what = "1: Standardized computes something else"
    refused(face, model, what, layers="1", subclasses=True)
    wanted = model[0](x)
    calls.clear()
    changes = face.add_coords(model, subclasses=True)
    assert not calls
    assert "something else" in changes.skipped["1"]
    handle.remove()  # no pickle takes it
    layer = model[0]
    assert isinstance(layer, same)
    bound = 46 * 2**-24 * (layer.weight.abs().sum([1, 2, 3]).max() * x.abs().max() + 1)
    assert (layer(x) - wanted).abs().max() <= bound  # the same terms, in any order
    face.fill(layer.weight)
    plain = same(5, 8, 3)
    with face.package.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    assert equal(layer(x), plain(face.ours.AddCoords("xy")(x)))
    for copied in face.copies(layer):
        assert equal(copied(x), layer(x))
        assert type(copied) is type(layer)
    with pytest.raises(ValueError, match="input must have 3 channels"):
        layer(face.images(1, 5, 8, 8))
    for of in (set_training(layer, False), set_training(model, False)):
        with pytest.raises(ValueError, match="CoordSamePadding has a forward of its own"):
            face.ours.fuse(of) if of is model else of.fuse()
    assert face.remove_coords(model).layers[0].after == "SamePadding"
    assert type(model[0]) is same
    assert tuple(model[0].weight.shape) == (8, 3, 3, 3)


def test_a_subclass_has_the_coordinates_of_a_window(face):
    same, _ = subclasses(face)
    model, x = face.nn.Sequential(same(3, 8, 3)), face.images()
    face.add_coords(model, subclasses=True, init="fan_in")
    plain = same(5, 8, 3)
    with face.package.no_grad():
        plain.weight.copy_(model[0].weight)
        plain.bias.copy_(model[0].bias)
    with window(Window({"x": 0.25, "y": 0.5}, {"x": 0.75, "y": 1.0})):
        assert equal(model(x), plain(face.ours.AddCoords("xy")(x)))


def test_a_subclass_has_no_coordinates_that_go_on_beyond_the_border(face):
    same, _ = subclasses(face)
    model = face.nn.Sequential(same(3, 8, 3))
    what = '0: SamePadding pads the coordinates as it pads the features.*want outside="zero"'
    coords = Coordinates("xy", outside="extend")
    refused(face, model, what, coords=coords, subclasses=True)


def test_the_share_of_the_variance(face):
    model, x = set_training(face.network(), False), face.images()
    face.add_coords(model, layers=["0", "5"])
    used = face.nn.Sequential(model[0], face.conv(8, 8, 3))
    face.fill(model[0].weight)
    features = face.functional_conv(x, model[0].weight[:, :3], model[0].bias, padding=1)
    position = (model[0](x) - features).detach().numpy()
    variance = position.var((0, 2, 3)).sum()
    wanted = variance / (variance + features.detach().numpy().var((0, 2, 3)).sum())
    changes = face.remove_coords(used, x)
    assert changes.layers[0].variance_share == pytest.approx(float(wanted), rel=1e-4)
    assert changes.layers[0].parameters == -144
    assert equal(used[0](x), features)

    reached = face.nn.Sequential(face.conv(3, 4, 1), face.conv(4, 4, 1))
    face.add_coords(reached)
    assert [c.variance_share for c in face.remove_coords(reached[:1], x).layers] == [0.0]
    assert face.remove_coords(reached).layers[0].variance_share is None


def test_measuring_leaves_batch_statistics_alone(face):
    one, other = face.network(), face.network()
    for model in (one, other):
        face.add_coords(model)
        model.train()
    face.remove_coords(one, face.images())
    face.remove_coords(other)
    found, wanted = one.state_dict(), other.state_dict()
    assert any("mean" in name for name in found)
    assert all(equal(found[name], wanted[name]) for name in wanted)


def test_a_layer_of_a_class_of_its_own_is_not_removed(face):
    class Mine(face.coord()):
        pass

    with pytest.raises(ValueError, match="0: it is a Mine, a class of its own"):
        face.remove_coords(face.nn.Sequential(Mine(3, 4, 1)))


def test_undo_keeps_what_training_made_of_the_features(face):
    model, x = face.network(), face.images()
    changes = face.add_coords(model)
    face.fill(model[0].weight)
    features = model[0].weight[:, :3].clone()
    changes.undo()
    assert type(model[0]) is face.kind(2, False)
    assert equal(model[0].weight, features)
    assert tuple(model(x).shape) == (4, 6, 18, 22)
