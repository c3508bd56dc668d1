"""Giving coordinates to the convolutions of a network that exists: which, what changed, and back.

The adapters' ``add_coords`` change a network in place. What is here knows modules by their names.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np

from coordconv.grid import Array

Choice: TypeAlias = "str | re.Pattern[str] | Callable[[str, Any], bool] | Iterable[Any] | None"

ALREADY = "has coordinates already"


@dataclass(frozen=True)
class Change:
    """One layer that changed.

    Args:
        name: the layer's name in the network; ``""`` if it is the network itself.
        before: the class that the layer was.
        after: the class that the layer is now, and its coordinates.
        parameters: how many numbers the kernel has more than before.
        variance_share: of a removal that was given inputs, the coordinates' part of the output's
            variance, between 0 and 1.
    """

    name: str
    before: str
    after: str
    parameters: int
    variance_share: float | None = None


@dataclass
class Changes:
    """What ``add_coords`` or ``remove_coords`` changed: printed, a table.

    Args:
        layers: a :class:`Change` for each layer, in the network's order.
        skipped: why other convolutions were left as they are, by name.

    Example:
        >>> change = Change("stem.conv", "Conv2d", "CoordConv2d('xy')", 128)
        >>> print(Changes((change,), {"head": "its weight has no second spatial axis"}))
        layer      from    to                 parameters added
        stem.conv  Conv2d  CoordConv2d('xy')  128
        head: left, its weight has no second spatial axis
    """

    layers: tuple[Change, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    _undo: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def undo(self) -> None:
        """Make the layers plain convolutions again, with the features' part as it is by now.

        The coordinates' part is lost: outputs are what they were if no training changed it from
        zero. RuntimeError if it was done before, or for what ``remove_coords`` changed.
        """
        if self._undo is None:
            raise RuntimeError("there is nothing to undo: it was done, or coordinates were removed")
        self._undo()
        self._undo = None

    def to_json(self) -> str:
        """The layers and what was skipped, as JSON."""
        layers = [asdict(change) for change in self.layers]
        return json.dumps({"layers": layers, "skipped": dict(self.skipped)}, indent=2)

    def __str__(self) -> str:
        shares = any(change.variance_share is not None for change in self.layers)
        rows = [["layer", "from", "to", "parameters added"] + ["variance share"] * shares]
        for change in self.layers:
            row = [change.name or "(itself)", change.before, change.after, str(change.parameters)]
            if shares:
                share = change.variance_share
                row.append("not reached" if share is None else f"{share:.2%}")
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
        if not self.layers:
            lines = ["no layer changed"]
        left = [f"{name or '(itself)'}: left, {why}" for name, why in self.skipped.items()]
        return "\n".join([*(line.rstrip() for line in lines), *left])


@dataclass(frozen=True)
class Unfit:
    """Why a convolution is not changed.

    A ``fatal`` reason stops all, also where the user named no layer: to leave this layer out
    without being asked would pass for what was wanted.
    """

    reason: str
    fatal: bool = False


def plan(
    modules: Mapping[str, Any],
    is_convolution: Callable[[Any], bool],
    examine: Callable[[str, Any], Unfit | None],
    layers: Choice = None,
    exclude: Choice = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The convolutions to change, by name, and why others are left.

    Args:
        modules: all modules by name, one that is used twice under each of its names.
        is_convolution: whether a module is one that could be meant.
        examine: what is wrong with a convolution that is meant.
        layers: names of convolutions or of blocks, which are all convolutions in them, whole or, if
            no name is the whole of it, the end of names; a compiled regular expression that matches
            a whole name; a function of name and module; several of these; or None for all.
        exclude: those to leave out, in the same way.

    Raises:
        TypeError: ``layers`` or ``exclude`` of another type.
        ValueError: nothing is matched, by one of the names or by all; a layer was asked for that
            cannot be changed. All such layers are listed.
    """
    convolutions = {name: each for name, each in modules.items() if is_convolution(each)}
    if not convolutions:
        raise ValueError("model has no layer that could be changed")
    without = [] if exclude is None else _matched("exclude", exclude, modules, convolutions)
    left = {id(convolutions[name]) for name in without}
    found: dict[int, str] = {}  # by identity: a module may have several names
    for name in _matched("layers", layers, modules, convolutions):
        if id(convolutions[name]) not in left:
            found.setdefault(id(convolutions[name]), name)
    chosen: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    errors: dict[str, str] = {}
    for name in found.values():
        unfit = examine(name, convolutions[name])
        if unfit is None:
            chosen[name] = convolutions[name]
        elif unfit.fatal or (layers is not None and not unfit.reason.startswith(ALREADY)):
            errors[name] = unfit.reason
        else:
            skipped[name] = unfit.reason
    if errors:
        lines = "".join(f"\n  {name or '(itself)'}: {why}" for name, why in errors.items())
        raise ValueError(f"these cannot be changed (exclude= leaves them out):{lines}")
    if not chosen and not any(why.startswith(ALREADY) for why in skipped.values()):
        lines = "".join(f"\n  {name or '(itself)'}: {why}" for name, why in skipped.items())
        raise ValueError(f"layers and exclude leave nothing to change{lines}")
    return chosen, skipped


def check_ties(
    chosen: Mapping[str, Any],
    modules: Mapping[str, Any],
    parameters: Mapping[str, Any],
    layout: Callable[[Any], Any],
) -> None:
    """Raise ValueError if a kernel is shared with a layer that does not change in the same way.

    ``parameters`` has all parameters by name, one that is shared under each of its names;
    ``layout`` of a chosen module is what has to be alike.
    """
    meant = {id(module) for module in chosen.values()}
    holders: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        holders.setdefault(id(parameter), []).append(name)
    for names in holders.values():
        owners = [modules[name.rpartition(".")[0]] for name in names]
        if len({id(owner) for owner in owners}) == 1 or meant.isdisjoint(map(id, owners)):
            continue
        if not meant.issuperset(map(id, owners)) or len({*map(layout, owners)}) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one parameter: give coordinates to all of these layers "
                "or to none, and all must be alike"
            )


def shown(layer: Any) -> str:
    """A layer's class, and the coordinates of one of ours."""
    coords = getattr(layer, "coords", None)
    return type(layer).__name__ + (f"({coords.channels!r})" if coords else "")


def check_class(cls: type, conv: Any, namespace: str) -> None:
    """Raise TypeError if a convolution is not one that ``cls.from_conv`` takes."""
    plain = next(base for base in cls.__mro__ if base.__module__.startswith(namespace))
    if type(conv) is not plain:
        raise TypeError(f"conv must be a {namespace}.{plain.__name__}, got a {type(conv).__name__}")


class Shares:
    """The coordinates' part of the variance of what layers return, by name, from all their calls.

    The variances are over batch and positions, summed over channels.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Array] = {}

    def add(self, name: str, output: Any, features: Any, axis: int) -> None:
        """One call: the output, what the features alone give, and the axis of the channels."""
        rest = np.asarray(features).astype(np.float64)
        parts = np.asarray(output).astype(np.float64) - rest, rest
        axes = tuple(each for each in range(rest.ndim) if each != axis % rest.ndim)
        found = np.array([part.var(axes).sum() for part in parts])
        self._sums[name] = self._sums.get(name, np.zeros(2)) + found

    def get(self, name: str) -> float | None:
        """The share, or None if no call reached the layer."""
        sums = self._sums.get(name)
        if sums is None:
            return None
        position, rest = sums
        return float(position / (position + rest)) if position else 0.0


def _matched(
    argument: str, choice: Choice, modules: Mapping[str, Any], convolutions: Mapping[str, Any]
) -> list[str]:
    """The names of the convolutions that a user's choice matches; ValueError if it matches none."""
    if choice is None:
        return [*convolutions]
    if isinstance(choice, re.Pattern):
        found = [name for name in convolutions if choice.fullmatch(name)]
        wrong = f"the whole name of no layer matches {choice.pattern!r}"
    elif isinstance(choice, str):
        of = [name for name in modules if f".{name}".endswith(f".{choice}")]
        of = [choice] if choice in modules else of
        found = [
            name
            for name in convolutions
            if any(name == each or f"{name}.".startswith(f"{each}.") or not each for each in of)
        ]
        wrong = f"{choice!r} is a {type(modules[of[0]]).__name__}" if of else f"no layer {choice!r}"
    elif callable(choice):
        found = [name for name, module in convolutions.items() if choice(name, module)]
        wrong = "the function is true of no layer"
    elif isinstance(choice, Iterable) and not isinstance(choice, bytes):
        each = [_matched(argument, one, modules, convolutions) for one in choice]
        matched = {name for names in each for name in names}
        return [name for name in convolutions if name in matched]
    else:
        raise TypeError(
            f"{argument} must be names, a compiled regular expression, a function or None, "
            f"got {choice!r}"
        )
    if not found:
        word = choice.pattern if isinstance(choice, re.Pattern) else choice
        near = difflib.get_close_matches(str(word), [*convolutions], cutoff=0.3) or [*convolutions]
        raise ValueError(f"{argument}: {wrong}; there are {', '.join(near[:3])}, ...")
    return found
