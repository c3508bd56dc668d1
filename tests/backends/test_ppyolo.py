"""PP-YOLO's neck, described once: one set of weights in torch, Paddle and NNX.

The network is that of ``benchmarks/ppyolo_neck.py``, here with few channels, and maps that are not
square. Each convolution is held to the float64 reference for what it was given in the run, within
the bound of ``coordconv.parity``; what the networks of two frameworks return, to ``compare``.
"""

from functools import cache

import numpy as np
import pytest

import ppyolo_neck
from coordconv.backends import BACKENDS
from coordconv.parity import compare
from ppyolo_neck import CONCAT, OURS

STEPS = ppyolo_neck.steps((64, 32, 16), 16)
STATE = ppyolo_neck.initial_state(STEPS)
FRAMEWORKS = [n for n in ("paddle", "torch", "flax") if not BACKENDS[n].missing]

in_each_framework = pytest.mark.parametrize(
    "framework",
    [
        pytest.param(n, marks=pytest.mark.skipif(n not in FRAMEWORKS, reason=f"{n} is missing"))
        for n in ("paddle", "torch", "flax")
    ],
)
at_each_size = pytest.mark.parametrize("size", [(5, 7), (6, 4), (10, 10)], ids=str)
in_each_mode = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])


@cache
def found(framework, size, training, variant=OURS):
    """What the neck computed, its weights those that the first framework has saved."""
    first = ppyolo_neck.build(FRAMEWORKS[0], STEPS)
    first.load_state(STATE)
    neck = ppyolo_neck.build(framework, STEPS, variant)
    neck.load_state(first.state())
    maps, gradients = ppyolo_neck.data(STEPS, [(size[0] << i, size[1] << i) for i in range(3)], 2)
    found = neck.evaluate(maps, gradients if training else None)
    after = (
        neck.state()
    )  # training takes means of the statistics, which would go on into later runs
    assert all(np.array_equal(after[name], array) for name, array in STATE.items())
    return found


def agree(arrays):
    """Hold all to the first; no gradient may have gone another way where a number is near zero."""
    first, *others = arrays.values()
    for name in first:
        if name.startswith(("input of", "tip")):
            assert all(np.array_equal(first[name] > 0, other[name] > 0) for other in others), name
    models = {name: lambda x, own=own: own for name, own in arrays.items()}
    report = compare(models, first["map0"])
    report.raise_if_different()
    assert not any(report.missing.values())
    assert not any(report.extra.values())


@in_each_framework
def test_weights_are_those_that_were_loaded(framework):
    neck = ppyolo_neck.build(framework, STEPS)
    neck.load_state(STATE)
    state = neck.state()
    assert state.keys() == STATE.keys()
    assert all(np.array_equal(state[name], array) for name, array in STATE.items())


@in_each_framework
@at_each_size
@in_each_mode
def test_every_convolution_is_within_its_bound(framework, size, training):
    errors = dict(ppyolo_neck.errors(STEPS, STATE, found(framework, size, training)))
    assert len(errors) == 21 * (3 if training else 1)
    assert max(errors.values()) <= 1, max(errors, key=errors.__getitem__)


@at_each_size
@in_each_mode
@pytest.mark.skipif(len(FRAMEWORKS) < 2, reason="only one of the frameworks is installed")
def test_the_frameworks_agree(size, training):
    agree({framework: found(framework, size, training) for framework in FRAMEWORKS})


@pytest.mark.parametrize("framework", [n for n in FRAMEWORKS if n != "flax"])
@at_each_size
@in_each_mode
def test_ours_is_what_it_replaces(framework, size, training):
    theirs = found(framework, size, training, CONCAT)
    agree({CONCAT: theirs, OURS: found(framework, size, training)})


@in_each_framework
def test_a_small_mistake_is_seen(framework):
    """That the checks can fail: of one kernel of 21, one output sees x by 1% otherwise."""
    arrays = dict(found(framework, (6, 4), True))
    state = dict(STATE)
    weight = state["tip1_conv.weight"].copy()
    weight[0, -2] *= 1.01
    state["tip1_conv.weight"] = weight
    errors = dict(ppyolo_neck.errors(STEPS, state, arrays))
    assert errors["tip1_conv"] > 1
