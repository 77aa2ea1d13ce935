"""The arithmetic of the table: sums, lines between points, stairs that never fall, and a cache that may break."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from prunus.errors import UserError
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.timing.timetable import (
    Grid,
    Request,
    Times,
    Timetable,
    cache_directory,
    cached_path,
    grid_of,
    recall,
    remember,
    rising,
    rising_table,
)

GRID = Grid((1, 2, 4), (1, 2), (32, 64, 128))
PREFILL = Times(outside=10.0, empty=1.0, attention=((2.0, 3.0), (4.0, 5.0), (8.0, 9.0)), mlp=(3.0, 5.0, 6.0))
DECODE = Times(outside=1.0, empty=0.5, attention=((0.6, 0.7), (0.8, 0.9), (1.2, 1.3)), mlp=(0.7, 0.9, 1.3))
TABLE = Timetable({"device": "a"}, Request(16, 2, 10), 48, GRID, PREFILL, DECODE, spread=0.01, check=0.02)


def network(*shapes: tuple[int, int, int], hidden: int = 48) -> SubNetwork:
    return SubNetwork(hidden, tuple(LayerShape(*shape) for shape in shapes))


def test_times_are_sums_over_layers_and_parts() -> None:
    # both: 4 + 5 - 1; attention alone: 9; MLP alone: 6; neither: nothing
    sub = network((2, 1, 64), (4, 2, 0), (0, 0, 128), (0, 0, 0))
    assert TABLE.ms(sub, "prefill") == pytest.approx(10 + 8 + 9 + 6)
    assert TABLE.ms(sub, "decode") == pytest.approx(1 + (0.8 + 0.9 - 0.5) + 1.3 + 1.3)
    assert TABLE.request_ms(sub) == pytest.approx(33 + 10 * 4.8)
    assert TABLE.tokens_per_second(sub) == pytest.approx(2000 / 4.8)
    alone = replace(TABLE, request=Request(16, 2, 0))
    assert alone.request_ms(sub) == pytest.approx(33)


def test_between_two_points_the_time_lies_on_their_line() -> None:
    assert TABLE.layer_ms("prefill", LayerShape(0, 0, 96)) == pytest.approx(5.5)
    assert TABLE.layer_ms("prefill", LayerShape(3, 2, 0)) == pytest.approx(7.0)
    assert TABLE.layer_ms("prefill", LayerShape(0, 0, 16)) == pytest.approx(2.0)  # below the first point
    assert TABLE.layer_ms("prefill", LayerShape(0, 0, 1)) >= 0


def test_a_part_more_never_takes_less() -> None:
    odd = replace(TABLE, prefill=replace(PREFILL, empty=4.0))  # an empty layer that was measured too long
    for shape in (LayerShape(1, 1, 32), LayerShape(4, 2, 128)):
        both = odd.layer_ms("prefill", shape)
        assert both >= odd.layer_ms("prefill", replace(shape, mlp=0))
        assert both >= odd.layer_ms("prefill", replace(shape, kv_heads=0, q_per_kv=0))


def test_another_hidden_size_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="hidden size of 48, the sub-network has 24"):
        TABLE.ms(network((1, 1, 32), hidden=24), "decode")


def test_rising_pools_what_falls() -> None:
    assert rising([1, 2, 3]) == [1, 2, 3]
    assert rising([3, 1, 2]) == [2, 2, 2]
    assert rising([1, 5, 3, 9, 8, 10]) == [1, 4, 4, 8.5, 8.5, 10]
    assert rising([]) == []


def test_a_rising_table_rises_both_ways_and_leaves_one_that_does() -> None:
    assert rising_table(PREFILL.attention) == PREFILL.attention
    rng = random.Random(0)
    noisy = [[i + j + 3 * rng.random() for j in range(4)] for i in range(5)]
    found = rising_table(noisy)
    assert all(a <= b for row in found for a, b in pairwise(row))
    assert all(a <= b for above, row in pairwise(found) for a, b in zip(above, row, strict=True))
    assert sum(map(sum, found)) == pytest.approx(sum(map(sum, noisy)), rel=0.05)


@pytest.mark.parametrize(
    ("mlp", "step", "widths"),
    [
        (1536, None, tuple(range(64, 1537, 64))),
        (80, None, (32, 64, 80)),
        (20, 8, (8, 16, 20)),
        (11008, None, (*range(480, 11008, 480), 11008)),
    ],
)
def test_the_grid_follows_the_hardware_and_ends_with_the_full_width(
    mlp: int, step: int | None, widths: tuple[int, ...]
) -> None:
    grid = grid_of({"mlp": mlp, "kv_heads": 3, "q_per_kv": 1}, step)
    assert grid.mlp == widths
    assert (grid.kv_heads, grid.q_per_kv) == ((1, 2, 3), (1,))


def test_many_heads_are_sampled_with_both_ends() -> None:
    grid = grid_of({"mlp": 64, "kv_heads": 32, "q_per_kv": 12})
    assert (grid.kv_heads[0], grid.kv_heads[-1], len(grid.kv_heads)) == (1, 32, 8)
    assert (grid.q_per_kv[0], grid.q_per_kv[-1], len(grid.q_per_kv)) == (1, 12, 6)
    with pytest.raises(UserError, match=r"a step of 65 neurons is outside 1\.\.64"):
        grid_of({"mlp": 64, "kv_heads": 1, "q_per_kv": 1}, 65)


# ------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_table_reads_itself_back() -> None:
    assert Timetable.from_json(TABLE.to_json()) == TABLE


def test_the_cache_gives_what_it_was_given_for_the_same_key_only(cache: Path) -> None:
    assert recall(TABLE.key) is None
    path = remember(TABLE)
    assert path is not None
    assert path.is_relative_to(cache)
    assert recall(TABLE.key) == TABLE
    assert recall({"device": "b"}) is None


def test_a_broken_table_is_measured_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = remember(TABLE)
    assert path is not None
    for text in ("{", "[]", "{}", TABLE.to_json().replace('"mlp"', '"mpl"', 1)):
        path.write_text(text)
        assert recall(TABLE.key) is None, text
    assert "cannot be read" in caplog.text


def test_a_file_of_another_key_is_not_believed(cache: Path) -> None:
    remember(TABLE)
    other = cached_path({"device": "b"})
    cached_path(TABLE.key).rename(other)
    assert recall({"device": "b"}) is None


def test_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "file"))
    assert remember(TABLE) is None
    assert "not kept" in caplog.text
    assert recall(TABLE.key) is None


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNUS_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_directory() == Path("/a")
    monkeypatch.delenv("PRUNUS_CACHE")
    assert cache_directory() == Path("/b/prunus")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "prunus"
