"""One convolution of Paddle made a CoordConv in place, and back: :mod:`coordconv.tape_changing`.

``paddle.assign`` lets a parameter have another shape; name and hooks stay, and an output that was
computed before has no gradient any more, and says so. Optimizers have no hooks: those that are
there when kernels change are found, and ask from then on at each step.
"""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import paddle
from paddle import Tensor, nn

from coordconv.changing import Unfit
from coordconv.coordinates import Coordinates
from coordconv.tape_changing import Conversion, note_step, refuse_stale, replaced_forward
from coordconv.weights.kernels import KernelLayout


def _unfit(conv: Any) -> Unfit | None:
    weight = dict(conv.named_parameters(include_sublayers=False)).get("weight")
    if weight is None:
        return Unfit(
            "its weight is computed from other parameters by a hook: call "
            "paddle.nn.utils.remove_weight_norm or the like first",
            fatal=True,
        )
    if not isinstance(weight, Tensor):
        return Unfit("it was made in static mode, and is part of a program", fatal=True)
    if weight.is_dist():
        return Unfit("its weight is distributed: change the network before that", fatal=True)
    if weight.numpy().shape != tuple(weight.shape):
        return Unfit(
            "its weight has no values yet: call initialize() of its parameters", fatal=True
        )
    return replaced_forward(conv)


def _is_transposed(conv: Any) -> bool:
    return isinstance(conv, (nn.Conv1DTranspose, nn.Conv2DTranspose, nn.Conv3DTranspose))


def _layout(conv: Any, coords: Coordinates) -> KernelLayout:
    return KernelLayout(coords, conv._in_channels, conv._groups, _is_transposed(conv))


def _plain_class(conv: Any) -> Any:
    return getattr(nn, f"Conv{len(conv._kernel_size)}D{'Transpose' * _is_transposed(conv)}")


def _draw(conv: Any, channels: int) -> Tensor:
    sizes = channels, conv._out_channels, conv._kernel_size
    drawn = _plain_class(conv)(*sizes, groups=conv._groups, bias_attr=False)
    return drawn.weight.to(conv.weight.place).astype(conv.weight.dtype)  # type: ignore[no-any-return]


def _resize(parameter: Any, values: Tensor, gradient: Tensor | None) -> None:
    parameter.clear_gradient(set_to_zero=False)  # else the next one would be added to it
    with paddle.no_grad():
        paddle.assign(values, parameter)
    if gradient is not None:
        parameter.grad = gradient


# What an optimizer does with what it keeps for its parameters; the last two are of ModelAverage.
_USES = ("step", "minimize", "apply_gradients", "apply", "restore")
_MASTER = "master weight"


def _held(optimizer: Any) -> list[Any]:
    """An optimizer's parameters, those of all groups."""
    groups = getattr(optimizer, "_param_groups", None) or []  # none of a wrapper, or static
    groups = [each if isinstance(each, dict) else {"params": [each]} for each in groups]
    return [parameter for group in groups for parameter in group["params"]]


def _kept(optimizer: Any, kernel: Any) -> dict[str, Tensor]:
    """What an optimizer keeps for a parameter, which it has by the parameter's name alone.

    Of a parameter of 16 bits that may be a master weight, by whose name it has the rest.
    """
    master = optimizer._master_weights.get(kernel.name)
    name = kernel.name if master is None else master.name
    states = optimizer._accumulators.items()
    found = {kind: by_name[name] for kind, by_name in states if name in by_name}
    return found if master is None else {**found, _MASTER: master}


def _use(use: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """A method of an optimizer, which asks first."""
    kept = [(each, _kept(optimizer, each).values()) for each in _held(optimizer)]
    refuse_stale(optimizer, kept)
    return use(*args, **kwargs)


def _watch(kernels: list[Any]) -> None:
    changed = {id(kernel) for kernel in kernels}
    for each in gc.get_objects():
        if not issubclass(type(each), paddle.optimizer.Optimizer):  # isinstance may run any code
            continue
        if changed.isdisjoint(map(id, _held(each))):
            continue
        if getattr(each.step, "func", None) is not _use:  # it was not asked so far
            note_step(each, _held(each))
        for name in _USES:
            use = getattr(each, name, None)
            if use is not None and getattr(use, "func", None) is not _use:
                setattr(each, name, partial(_use, use, each))


def _states(optimizer: Any, kernel: Any) -> dict[str, Tensor]:
    states = _kept(optimizer, kernel)
    if _MASTER in states:
        raise ValueError(
            f"optimizer keeps master weights of {kernel.name}, which has 16 bits: make a new "
            f"{type(optimizer).__name__}, or change the network before paddle.amp.decorate"
        )
    flat = optimizer.state_dict().get("state", {})  # LBFGS's, of all parameters in one
    return states | {name: each for name, each in flat.items() if isinstance(each, Tensor)}


def _put(optimizer: Any, kernel: Any, name: str, values: Tensor) -> None:
    paddle.assign(values, _kept(optimizer, kernel)[name])  # in place: some have it twice


CONVERSION = Conversion(
    framework=paddle,
    unfit=_unfit,
    layout=_layout,
    plain_class=_plain_class,
    draw=_draw,
    like=lambda values, kernel: values.clone(),
    resize=_resize,
    watch=_watch,
    optimizer=paddle.optimizer.Optimizer,
    held=_held,
    states=_states,
    put=_put,
)
