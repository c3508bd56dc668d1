"""The private names of the frameworks that the adapters use, since nothing public does it.

Each test fails when a framework drops one, and its message says what to do then. They hold from
torch 2.4, Paddle 3.2 and Flax 0.10.7 on, up to the newest releases: tox runs them at both ends.
"""

import pytest

from coordconv.backends import BACKENDS


def module(name: str) -> object:
    if BACKENDS[name].missing:
        pytest.skip(f"{name} is not installed")
    return __import__(BACKENDS[name].imports[0])


@pytest.mark.parametrize(
    ("owner", "name", "otherwise"),
    [
        ("Conv2d", "_conv_forward", "override forward, and convolve by torch.nn.functional"),
        ("Module", "_save_to_state_dict", "write the Coordinates by register_state_dict_post_hook"),
        ("Module", "_load_from_state_dict", "fit a state by register_load_state_dict_pre_hook"),
    ],
)
def test_torch(owner: str, name: str, otherwise: str) -> None:
    module("torch")
    from torch import nn

    assert hasattr(getattr(nn, owner), name), f"torch.nn.{owner} has no {name}: {otherwise}"


@pytest.mark.parametrize(
    ("name", "hooks"),
    [
        ("torch", ("_forward_hooks", "_forward_pre_hooks")),
        ("paddle", ("_forward_post_hooks", "_forward_pre_hooks")),
    ],
)
def test_hooks(name: str, hooks: tuple[str, ...]) -> None:
    """Nothing public tells whether a batch normalization has hooks, which folding would lose."""
    relu = module(name).nn.ReLU()  # type: ignore[attr-defined]
    missing = {*hooks} - vars(relu).keys()
    assert not missing, f"modules of {name} have no {missing}: see has_hooks in coordconv/fusing.py"


# Paddle keeps what a layer was constructed with in attributes of these names alone.
PADDLE = {
    "_in_channels",
    "_out_channels",
    "_groups",
    "_kernel_size",
    "_stride",
    "_padding",
    "_dilation",
    "_data_format",
    "_padding_mode",
    "_updated_padding",
    "_padding_algorithm",
}


def test_paddle() -> None:
    module("paddle")
    from paddle import nn

    missing = PADDLE - vars(nn.Conv2D(1, 1, 1)).keys()
    copied = vars(nn.Conv2D(1, 1, 3, padding=1, padding_mode="reflect"))
    missing |= {"_reversed_padding_repeated_twice"} - copied.keys()
    assert not missing, f"paddle's convolutions have no {missing}: keep them in _prepare, as given"


@pytest.mark.parametrize("name", ["_param_groups", "_accumulators", "_master_weights"])
def test_paddle_optimizers(name: str) -> None:
    """Their state_dict has parameters by the beginnings of names, of which one begins another."""
    paddle = module("paddle")
    weight = paddle.nn.Linear(1, 1).weight  # type: ignore[attr-defined]
    adam = paddle.optimizer.Adam(parameters=[weight])  # type: ignore[attr-defined]
    assert hasattr(adam, name), f"an optimizer has no {name}: take names apart in converting.py"


@pytest.mark.parametrize(
    ("owner", "name", "otherwise"),
    [
        ("ParamAttr", "_to_attr", "take apart the kinds of weight_attr in initializer.py"),
        (
            "base.initializer",
            "_global_weight_initializer",
            'refuse coord_init="zeros" where set_global_initializer was called',
        ),
    ],
)
def test_paddle_initializers(owner: str, name: str, otherwise: str) -> None:
    found = module("paddle")
    for part in owner.split("."):
        found = getattr(found, part)
    assert hasattr(found, name), f"paddle.{owner} has no {name}: {otherwise}"


def test_flax() -> None:
    """The base class's own call is run on a view of a layer; see ``backends/jax/layers.py``."""
    module("flax")
    import inspect

    from flax import linen, nnx

    for kind in (nnx.Conv, nnx.ConvTranspose, linen.Conv, linen.ConvTranspose):
        call = inspect.unwrap(kind.__call__)
        assert inspect.isfunction(call), f"{kind} has no call that can be run on another object"
        # What the view replaces: were one of them no longer read, the whole kernel would be used.
        for name in ("kernel", "promote_dtype", "mask"):
            assert name in inspect.getsource(call), f"{kind}: {name} is read elsewhere, replace it"
