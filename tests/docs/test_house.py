"""The picture of the rooms: every import is in it, and every arrow can be followed."""

import pytest

import house
from test_imports import FILES, graph, parsed


def test_every_import_is_a_way_along_the_arrows():
    to = {}
    for start, end in house.arrows():
        to.setdefault(start, set()).add(end)

    def reached(room):
        return to.get(room, set()).union(*map(reached, to.get(room, ())))

    for file, others in graph({file: parsed(file) for file in FILES}).items():
        start = house.room_of(file)
        assert {house.room_of(other) for other in others} - {start} <= reached(start), file


def test_nothing_lies_on_anything_else():
    boxes = house.boxes()
    for (start, end), way in house.ways().items():
        for row, x in enumerate(way[1:-1], house.ROW_OF[start] + 1):
            assert 0 < x < house.WIDTH
            for room in house.ROWS[row]:
                left, right = boxes[room]
                assert not left <= x <= right, f"the arrow from {start} to {end} crosses {room}"
    for rooms in house.ROWS:
        edges = [0, *(x for room in rooms for x in boxes[room]), house.WIDTH]
        assert edges == sorted(edges)


def test_a_file_without_a_room_is_told(monkeypatch):
    with pytest.raises(ValueError, match=r"new\.py must be in one room .*, is in \[\]"):
        house.room_of("new.py")
    monkeypatch.setitem(house.ROW_OF, "geometry", 0)
    with pytest.raises(ValueError, match=r"imports geometry, which docs/house.py has no lower"):
        house.arrows()
