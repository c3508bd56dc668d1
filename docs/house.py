"""The picture of the rooms of the package, and of which imports from which, drawn from the imports.

`conf.py` puts it on the site; `python docs/house.py > house.svg` writes it. The rooms are those of
the table in CONTRIBUTING.md, and stand here in the rows in which they are drawn. A file in no room
is an error, and so is an import that does not go down.
"""

import sys
from itertools import pairwise
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "core"))

from test_imports import FILES, graph, parsed

# Of each room its files and folders, by its label.
ROWS = (
    {"cli": ("cli/", "__main__.py")},
    {
        "parity": ("parity/",),
        "protocols": ("backends/protocols.py",),
        "convert": ("convert.py",),
        "import coordconv": ("__init__.py",),
    },
    {
        "flax": ("backends/flax/",),
        "linen": ("backends/linen/",),
        "paddle": ("backends/paddle/",),
        "torch": ("backends/torch/",),
    },
    {
        "jax": ("backends/jax/",),
        "changing": ("changing.py", "tape_changing.py"),
        "position_report": ("position_report.py",),
    },
    {"recording, tape, fusing": ("recording.py", "tape.py", "fusing.py")},
    {
        "reference": ("reference.py",),
        "layers": ("layers.py",),
        "position_bias": ("position_bias.py",),
    },
    {"weights": ("weights/",)},
    {"networks, summary": ("networks.py", "summary.py")},
    {
        "coordinates, functions, windows, grid": (
            "coordinates.py",
            "functions.py",
            "windows.py",
            "grid.py",
        ),
        "registry": ("backends/__init__.py",),
    },
    {"geometry": ("geometry.py",)},
)
PLACES = {room: places for row in ROWS for room, places in row.items()}
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}

WIDTH, HEIGHT, STEP, CHARACTER, PAD = 360, 26, 58, 6.4, 16  # as wide as a page on a phone


def room_of(file: str) -> str:
    """The room of a file of the package."""
    found = [
        room
        for room, places in PLACES.items()
        if any(file == place or (place[-1] == "/" and file.startswith(place)) for place in places)
    ]
    if len(found) != 1:
        raise ValueError(f"{file} must be in one room of docs/house.py, is in {found}")
    return found[0]


def arrows() -> list[tuple[str, str]]:
    """From room to room, but for those that are also a way through other rooms."""
    to: dict[str, set[str]] = {room: set() for room in PLACES}
    for file, others in graph({file: parsed(file) for file in FILES}).items():
        to[room_of(file)] |= {room_of(other) for other in others} - {room_of(file)}
    for room, others in to.items():
        for other in others:
            if ROW_OF[other] <= ROW_OF[room]:
                raise ValueError(f"{room} imports {other}, which docs/house.py has no lower")

    def reached(room: str) -> set[str]:
        return to[room].union(*map(reached, to[room]))

    return [
        (room, other)
        for room, others in to.items()
        for other in sorted(others)
        if not any(other in reached(between) for between in others)
    ]


def boxes() -> dict[str, tuple[float, float]]:
    """The left and right end of each room's box."""
    found = {}
    for rooms in ROWS:
        widths = [len(room) * CHARACTER + PAD for room in rooms]
        gap = x = (WIDTH - sum(widths)) / (len(rooms) + 1)
        for room, width in zip(rooms, widths, strict=True):
            found[room] = (x, x + width)
            x += width + gap
    return found


def ways() -> dict[tuple[str, str], list[float]]:
    """Where each arrow is, across: in its room, in each row that it crosses, and in its end's.

    It crosses a row where nothing stands, as near as can be to the straight line.
    """
    placed, found = boxes(), {}
    for start, end in arrows():
        way = [sum(placed[start]) / 2]
        target = sum(placed[end]) / 2
        for row in range(ROW_OF[start] + 1, ROW_OF[end]):
            edges = [0, *(x for room in ROWS[row] for x in placed[room]), WIDTH]
            free = [(a + b) / 2 for a, b in zip(edges[::2], edges[1::2], strict=True)]
            straight = way[-1] + (target - way[-1]) / (ROW_OF[end] - row + 1)
            way.append(min(free, key=lambda x, straight=straight: abs(x - straight)))
        found[start, end] = [*way, target]
    return apart(found)


def apart(ways: dict[tuple[str, str], list[float]]) -> dict[tuple[str, str], list[float]]:
    """The same, with the arrows that are at one place side by side, as they come and go."""
    at: dict[tuple[int, float, str], list[tuple[float, tuple[str, str], int]]] = {}
    for arrow, way in ways.items():
        for i, x in enumerate(way):
            side = "from" if i == 0 else "to" if i == len(way) - 1 else "through"
            beside = way[i + 1] if i == 0 else way[i - 1]
            at.setdefault((ROW_OF[arrow[0]] + i, x, side), []).append((beside, arrow, i))
    found = {arrow: [*way] for arrow, way in ways.items()}
    for there in at.values():
        for k, (_, arrow, i) in enumerate(sorted(there)):
            found[arrow][i] += (k - (len(there) - 1) / 2) * 7
    return found


def line(start: str, way: list[float]) -> str:
    """An arrow's curve, straight down where it crosses a row."""
    top = ROW_OF[start] * STEP + HEIGHT
    points = [(way[0], top)]
    for i, x in enumerate(way[1:], 1):
        points += [(x, top - HEIGHT + i * STEP - 1), (x, top + i * STEP)]
    text = f"M{way[0]:.1f},{top}"
    for (x0, y0), (x1, y1) in pairwise(points[:-1]):
        text += f"C{x0:.1f},{(y0 + y1) / 2} {x1:.1f},{(y0 + y1) / 2} {x1:.1f},{y1}"
    return text


def kind(room: str) -> str:
    """Which colour a room has."""
    if any(place.startswith("backends/") for place in PLACES[room]):
        return "backend"
    return "core" if ROW_OF[room] > 1 else "use"


def svg() -> str:
    """The picture."""
    height = (len(ROWS) - 1) * STEP + HEIGHT + 2
    parts = [
        f'<svg class="house" role="img" viewBox="0 -1 {WIDTH} {height}" '
        'xmlns="http://www.w3.org/2000/svg">',
        "<title>The rooms of coordconv, and which imports from which</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto"><path d="M0,0L8,4L0,8z"/></marker></defs>',
    ]
    parts += [
        f'<path class="arrow" d="{line(start, way)}" marker-end="url(#tip)">'
        f"<title>{start} imports from {end}</title></path>"
        for (start, end), way in ways().items()
    ]
    for room, (left, right) in boxes().items():
        y = ROW_OF[room] * STEP
        parts.append(
            f'<g class="{kind(room)}"><rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" '
            f'height="{HEIGHT}" rx="5"/><text x="{(left + right) / 2:.1f}" y="{y + 17}">{room}'
            "</text></g>"
        )
    return "\n".join([*parts, "</svg>"])


if __name__ == "__main__":
    print(svg())
