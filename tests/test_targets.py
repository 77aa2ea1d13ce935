"""A target is a name and a limit in the unit of its cost; `worth` goes the other way."""

from __future__ import annotations

import pytest

from prunus.targets import Kind, Target


@pytest.mark.parametrize(
    ("kind", "value", "name", "limit"),
    [
        ("keep", 0.8, "keep-0.8", 160.0),
        ("speedup", 1.6, "speedup-1.6", 125.0),
        ("latency_ms", 40, "latency-40ms", 40.0),
        ("tokens_per_second", 25, "rate-25tps", 80.0),  # two sequences: 25 tokens are 12.5 steps
        ("memory_mb", 180.5, "memory-180.5mb", 180.5e6),
    ],
)
def test_a_target_knows_its_name_and_its_limit(kind: Kind, value: float, name: str, limit: float) -> None:
    target = Target(kind, value)
    assert target.name == name
    assert target.limit(200.0, batch=2) == pytest.approx(limit)
    assert target.worth(target.limit(200.0, batch=2), 200.0, batch=2) == pytest.approx(value)
