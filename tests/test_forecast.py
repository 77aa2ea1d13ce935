"""Forecasts from known cases: exact where they follow a power law, honest about the rest."""

from __future__ import annotations

import math

import pytest

from prunus.timing.forecast import forecast


def test_a_power_law_is_continued_between_the_known_cases_without_error() -> None:
    known = [(x, 3 * x**0.7) for x in (0.5, 0.1, 0.9, 0.02)]
    found = forecast(known, 0.3)
    assert found.value == pytest.approx(3 * 0.3**0.7)
    assert found.factor == pytest.approx(1.0)


def test_beyond_the_known_cases_their_ratio_stays() -> None:
    known = [(0.1, 0.2), (0.4, 0.6)]
    assert forecast(known, 0.05).value == pytest.approx(0.1)
    assert forecast(known, 0.8).value == pytest.approx(1.2)
    three = [*known, (0.2, 0.3)]
    assert [forecast(three, x).factor is None for x in (0.05, 0.3, 0.8)] == [True, False, True]
    assert forecast(known[:1], 7.0).value == pytest.approx(14.0)


def test_known_cases_are_met_and_tell_how_far_off_the_others_put_them() -> None:
    known = [(0.1, 0.1), (0.2, 0.3), (0.4, 0.4)]  # the middle one is 1.5 times what its neighbours say
    found = forecast(known, 0.2)
    assert found.value == pytest.approx(0.3)
    assert found.factor == pytest.approx(1.5)
    assert forecast(known, math.sqrt(0.02)).value == pytest.approx(math.sqrt(0.03))


def test_two_cases_do_not_say_how_far_to_trust_them() -> None:
    assert forecast([(0.1, 0.2), (0.4, 0.6)], 0.2).factor is None
    with pytest.raises(ValueError, match="at least one"):
        forecast([], 0.2)


def test_a_network_that_loses_nothing_does_not_break_the_logarithm() -> None:
    assert 0 <= forecast([(0.0, 0.0), (0.4, 0.6)], 0.2).value < 0.6
    assert forecast([(0.2, 0.2), (0.2, 0.3), (0.4, 0.6)], 0.2).value == pytest.approx(0.2)
