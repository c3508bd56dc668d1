"""Which layers of a network change: matched by name, and all that cannot be is said at once."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from coordconv.changing import ALREADY, Change, Changes, Shares, Unfit, check_ties, plan


class Layer(SimpleNamespace):
    """Stands for a module: a convolution unless it says otherwise."""

    __hash__ = object.__hash__


SHARED = Layer(convolution=True)
MODULES = {
    "": Layer(convolution=False),
    "stem": Layer(convolution=True),
    "layer1": Layer(convolution=False),
    "layer1.conv1": Layer(convolution=True),
    "layer1.conv11": Layer(convolution=True),
    "layer1.norm": Layer(convolution=False),
    "layer2": Layer(convolution=False),
    "layer2.conv1": SHARED,
    "again": SHARED,
    "layer2.again": Layer(convolution=True),
}
ALL = ["stem", "layer1.conv1", "layer1.conv11", "layer2.conv1", "layer2.again"]


def chosen(layers=None, exclude=None, examine=lambda name, layer: None):
    found, skipped = plan(MODULES, lambda layer: layer.convolution, examine, layers, exclude)
    assert all(MODULES[name] is layer for name, layer in found.items())
    return [*found], skipped


@pytest.mark.parametrize(
    ("layers", "exclude", "wanted"),
    [
        (None, None, ALL),
        ("", None, ALL),  # the block that is the whole network
        ("stem", None, ["stem"]),
        ("conv1", None, ["layer1.conv1", "layer2.conv1"]),  # the end of a name, whole words of it
        ("layer1", None, ["layer1.conv1", "layer1.conv11"]),
        ("again", None, ["again"]),  # a whole name before the end of another
        (["layer2.conv1", "stem"], None, ["stem", "layer2.conv1"]),
        (re.compile(r"layer\d\.conv1"), None, ["layer1.conv1", "layer2.conv1"]),
        (lambda name, layer: layer is SHARED, None, ["layer2.conv1"]),
        (
            None,
            "again",
            ["stem", "layer1.conv1", "layer1.conv11", "layer2.again"],
        ),  # under any of its names
        (None, ["layer1", re.compile("st.*")], ["layer2.conv1", "layer2.again"]),
        (None, [], ALL),
    ],
)
def test_choice(layers, exclude, wanted):
    assert chosen(layers, exclude) == (wanted, {})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("conv2", "layers: no layer 'conv2'; there are .*layer1.conv1"),
        ("v1", "no layer 'v1'"),
        ("norm", "'norm' is a Layer"),
        (["stem", "nowhere"], "no layer 'nowhere'"),
        (re.compile("layer1"), "the whole name of no layer matches 'layer1'"),
        (lambda name, layer: False, "the function is true of no layer"),
        ([], "nothing to change"),
    ],
)
def test_no_match(layers, message):
    with pytest.raises(ValueError, match=message):
        chosen(layers)


def test_other_bad_choices():
    with pytest.raises(ValueError, match="exclude: no layer 'nowhere'"):
        chosen(exclude="nowhere")
    with pytest.raises(ValueError, match="nothing to change"):
        chosen("stem", "stem")
    with pytest.raises(TypeError, match="layers must be names, .* got 3"):
        chosen(3)
    with pytest.raises(TypeError, match="exclude must be names, .* got b'stem'"):
        chosen(exclude=b"stem")
    with pytest.raises(ValueError, match="no layer that could be changed"):
        plan({"": MODULES[""]}, lambda layer: layer.convolution, lambda name, layer: None)


def test_a_layer_that_does_not_fit_is_skipped_unless_it_was_asked_for():
    def examine(name, layer):
        return Unfit("it has one axis") if name == "stem" else None

    assert chosen(examine=examine) == (ALL[1:], {"stem": "it has one axis"})
    for layers in ("stem", ["stem", "again"], re.compile(".*")):
        with pytest.raises(ValueError, match="exclude= leaves them out.*\n  stem: it has one axis"):
            chosen(layers, examine=examine)
    assert chosen(re.compile(".*"), "stem", examine)[0] == ["layer1.conv1", *ALL[2:]]


def test_all_fatal_reasons_are_said_at_once():
    def examine(name, layer):
        return Unfit(f"why {name}", fatal=True) if "conv1" in name else None

    with pytest.raises(ValueError, match="cannot be changed") as caught:
        chosen(examine=examine)
    assert all(f"{name}: why {name}" in str(caught.value) for name in ALL[1:-1])


def test_what_has_coordinates_is_left_and_said_so():
    def examine(name, layer):
        return Unfit(f"{ALREADY}, xy") if layer is SHARED else None

    assert chosen(examine=examine)[1] == {"layer2.conv1": f"{ALREADY}, xy"}
    assert chosen("again", examine=examine) == ([], {"again": f"{ALREADY}, xy"})


def test_ties():
    def check(names, parameters, layout=lambda layer: 0):
        check_ties({name: MODULES[name] for name in names}, MODULES, parameters, layout)

    one, other = object(), object()
    tied = {"stem.weight": one, "layer1.conv1.weight": one, "layer2.conv1.weight": other}
    check(["stem", "layer1.conv1"], tied)
    check(["layer2.conv1"], tied)
    # Two names of one module are no tie.
    check(["layer2.conv1"], {"layer2.conv1.weight": one, "again.weight": one})
    with pytest.raises(ValueError, match="stem.weight and layer1.conv1.weight are one parameter"):
        check(["stem"], tied)
    with pytest.raises(ValueError, match="all must be alike"):
        check(["stem", "layer1.conv1"], tied, lambda layer: id(layer))


def test_the_share_of_the_variance_is_that_of_all_calls():
    shares, draw = Shares(), np.random.default_rng(0).normal
    calls = [(draw(size=(2, 3, 5, 4)), draw(size=(2, 3, 5, 4)) + 9) for _ in range(2)]
    for position, rest in calls:
        shares.add("layer", position + rest, rest, -1)
        shares.add("first", np.moveaxis(position + rest, -1, 1), np.moveaxis(rest, -1, 1), 1)
        shares.add("zero", rest, rest, 3)
        shares.add("nothing", 0 * rest, 0 * rest, 3)
    parts = [sum(x.var((0, 1, 2)).sum() for x in each) for each in zip(*calls, strict=True)]
    assert shares.get("layer") == pytest.approx(parts[0] / sum(parts))
    assert shares.get("first") == pytest.approx(shares.get("layer"))
    assert shares.get("zero") == shares.get("nothing") == 0.0
    assert shares.get("never") is None


def test_changes_are_a_table_and_json_and_are_undone_once():
    undone = []
    rows = (Change("stem", "Conv2d", "CoordConv2d('xy')", 12, 0.0316), Change("", "A", "B", 3))
    changes = Changes(rows, {"head": "it is small"}, lambda: undone.append(True))
    lines = str(changes).splitlines()
    assert lines[0].split() == ["layer", "from", "to", "parameters", "added", "variance", "share"]
    assert "3.16%" in lines[1]
    assert "(itself)" in lines[2]
    assert "not reached" in lines[2]
    assert lines[3] == "head: left, it is small"
    found = json.loads(changes.to_json())
    assert found["layers"][0]["parameters"] == 12
    assert found["skipped"] == {"head": "it is small"}
    changes.undo()
    assert undone == [True]
    with pytest.raises(RuntimeError, match="nothing to undo"):
        changes.undo()
    assert str(Changes((), {"a": "b"})) == "no layer changed\na: left, b"
