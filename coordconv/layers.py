"""What the layers of all frameworks share, without a framework.

A layer is its framework's convolution, constructed over ``C + groups * n`` channels. The mixin
here takes the two arguments that no framework knows; the adapters compute.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.functions import TOKENS
from coordconv.grid import Array
from coordconv.weights.canonical import Weights, checked
from coordconv.weights.kernels import KernelLayout


class FixedCoords:
    """A layer that keeps the coordinates that its kernel was made for."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "coords" and vars(self).get(name, value) != value:
            raise AttributeError(
                f"coords are fixed at construction, here {vars(self)[name]}, as the kernel is made "
                f"for them: make a new layer with coords={value!r}; import_weights of it takes "
                "exported weights for the same coordinates in any order"
            )
        super().__setattr__(name, value)


class CanonicalLayer(FixedCoords):
    """A layer whose parameters are canonical weights for its coordinates."""

    coords: Coordinates

    # Each adapter has these beside its layout: its parameters as canonical arrays, and what takes
    # such that have been checked.
    _canonical: Callable[[], dict[str, Array]]
    _assign: Callable[[Mapping[str, Array]], None]

    @property
    def layout(self) -> KernelLayout:
        """Where features and coordinates lie in the kernel."""
        raise NotImplementedError

    def export_weights(self) -> Weights:
        """The canonical weights: ``weight`` and, if the layer has one, ``bias``."""
        return Weights(self._canonical(), {"": self.coords})

    def import_weights(self, mapping: Mapping[str, Array]) -> None:
        """Take canonical weights.

        Raises:
            ValueError: arrays are missing, unexpected or wrongly shaped, or were made for other
                coordinates; all are listed and nothing is changed. In PyTorch and Paddle also a
                weight that is computed from others, as by a norm or in pruning.
        """
        shapes = {name: array.shape for name, array in self._canonical().items()}
        self._assign(checked(mapping, shapes, {"": self.layout}))


class CoordLayer(CanonicalLayer):
    """What makes a framework's convolution, whose own arguments it takes, a CoordConv.

    Args:
        coords: the coordinate channels: tokens such as ``"xyr"``, a
            :class:`~coordconv.Coordinates`, or None for all axes. Keyword only.
        coord_init: ``"fan_in"`` draws the kernel as the base class draws that of a convolution over
            ``C + groups * n`` channels: the same seed gives the same kernel. ``"zeros"`` draws the
            features' part as the base class draws that over ``C`` channels, and starts the
            coordinates' part at zero, so that the layer starts as the plain one. Keyword only.

    Attributes:
        map_only: whether the layer always computes P and adds it to what the plain convolution of
            the features computes, as it is after ``from_conv`` and ``add_coords``: as long as the
            coordinates' part is zero, outputs are those of the plain convolution to the bit. False
            lets the layer choose the faster way.

    The parameters are the base class's, too. The last ``n`` input channels of the kernel, of each
    group, are the coordinates'; ``in_channels`` stays ``C``, what the layer takes. A transposed
    layer sees the coordinates of its input. The coordinates stay those of the construction.

    Raises:
        TypeError: ``coords`` that are no tokens, or given by position; input channels that are no
            int; an input of a type that the base class refuses.
        ValueError: unknown tokens, or tokens beyond the rank of the layer; another ``coord_init``;
            fewer input channels than one; an input of the wrong rank or number of channels, or with
            an empty axis.

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank: int
    coord_init: str
    map_only: bool = False

    # What the base class calls its input channels, as an argument and as an attribute, and groups.
    CHANNELS: ClassVar[str] = "in_channels"
    CHANNELS_ATTRIBUTE: ClassVar[str] = "in_channels"
    GROUPS: ClassVar[str] = "groups"

    def __init_subclass__(cls, rank: int | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if rank is not None:
            cls.rank = rank
        # What editors show, and what tools such as torch.nn.utils.skip_init look into.
        owner, *bases = (each for each in cls.__mro__ if "__init__" in vars(each))
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]  # the class's own
        if owner is CoordLayer:
            own = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
            signature = inspect.signature(bases[0].__init__)  # type: ignore[misc]
            signature = signature.replace(parameters=_before_kwargs(signature, own))
        _, *parameters = signature.parameters.values()
        cls.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]

    def __init__(
        self, *args: Any, coords: CoordinatesLike = None, coord_init: str = "fan_in", **kwargs: Any
    ) -> None:
        check_arguments(args, kwargs)
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        given.apply_defaults()
        check_coord_init(coord_init)
        # Set before the base class draws the kernel, as these two say.
        self.coords = Coordinates.resolve(coords, self._rank(given.arguments))
        self.coord_init = coord_init
        channels = given.arguments.get(self.CHANNELS)
        if channels is None:  # a lazy layer: its first input will tell
            super().__init__(*args, **kwargs)
            return
        # What the coordinates' channels would make a number that the base class takes.
        check_channels(self.CHANNELS, channels)
        self._prepare(given.arguments)
        groups = given.arguments.get(self.GROUPS, 1)
        given.arguments[self.CHANNELS] = channels + groups * len(self.coords)
        super().__init__(*given.args, **given.kwargs)
        setattr(self, self.CHANNELS_ATTRIBUTE, channels)

    def _rank(self, arguments: Mapping[str, Any]) -> int:
        """The number of spatial axes, where the base class's arguments may be what says it."""
        return self.rank

    def _prepare(self, arguments: dict[str, Any]) -> None:
        """Change, in place, what the base class is constructed with, where that is needed."""


class PositionLayer(CanonicalLayer):
    """What makes a module a layer of position alone: ``x + P(S)``, for its input of shape ``S``.

    P is a learned linear map of the coordinates at each position: what a pointwise convolution
    makes of the coordinate grid, one for the whole batch. It is a CoordConv without features, with
    the same ``coords``, windows and canonical weights: ``weight (C, n, 1, ...)``, one 1 for each
    axis, and ``bias (C,)``.

    ``coord_init`` is ``"fan_in"``, to draw the parameters as the framework draws those of a
    pointwise convolution over ``n`` channels: the same seed gives the same parameters; or
    ``"zeros"``, to start all of them at zero, so that the layer starts as the identity. P is
    computed in float32 at least, also of parameters of 16 bits, and the sum is rounded once. The
    coordinates stay those of the construction.

    Raises:
        TypeError: ``coords`` that are no tokens; channels that are no int; an input that is not
            floating-point.
        ValueError: unknown tokens, or tokens beyond the rank of the layer; another ``coord_init``;
            fewer channels than one; an input of the wrong rank or number of channels, or with an
            empty axis; a window that does not fit the input.

    Source:
        Locatello et al., "Object-Centric Learning with Slot Attention", NeurIPS 2020, the soft
        position embedding.
    """

    @property
    def layout(self) -> KernelLayout:
        """The layout of a kernel over no features and all coordinates."""
        return KernelLayout(self.coords, 0)


def check_channels(name: str, channels: Any) -> None:
    """Raise TypeError or ValueError if a number of channels is none."""
    if not hasattr(channels, "__index__"):
        raise TypeError(f"{name} must be an int, got {channels!r}")
    if channels < 1:
        raise ValueError(f"{name} must be at least 1, got {channels}")


def check_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse what users of other CoordConvs write, and say what to write here."""
    for value in args:
        if isinstance(value, Coordinates) or (isinstance(value, str) and TOKENS.issuperset(value)):
            shown = f'"{value}"' if isinstance(value, str) else repr(value)
            raise TypeError(f"pass coords={shown} by keyword: in this place it is another argument")
    if "with_r" in kwargs:
        raise TypeError('there is no with_r: for the radius pass coords="xyr"')


def _before_kwargs(
    signature: inspect.Signature, own: list[inspect.Parameter]
) -> list[inspect.Parameter]:
    """The parameters of a signature with further ones, which must not follow ``**kwargs``."""
    found = list(signature.parameters.values())
    at = len(found) - (bool(found) and found[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return found[:at] + own + found[at:]
