"""Floor 0: what a network is asked to come to: a share to keep, a speed, a time, a memory. Plain data.

Every target names its network (`keep-0.8`, `speedup-1.6`, `latency-40ms`, `rate-25tps`, `memory-180mb`), the cost that
it limits, and the limit in that cost's own unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["keep", "speedup", "latency_ms", "tokens_per_second", "memory_mb"]
NAMES: dict[Kind, tuple[str, str]] = {  # what stands before the number, and after it
    "keep": ("keep-", ""),
    "speedup": ("speedup-", ""),
    "latency_ms": ("latency-", "ms"),
    "tokens_per_second": ("rate-", "tps"),
    "memory_mb": ("memory-", "mb"),
}
LIMITS: dict[Kind, str] = {  # the cost that a budget limits; what `keep` is a share of is a setting of its own
    "speedup": "request_ms",
    "latency_ms": "request_ms",
    "tokens_per_second": "token_ms",
    "memory_mb": "memory_bytes",
}
UNITS: dict[Kind, str] = {
    "keep": "shares",
    "speedup": "speed-ups",
    "latency_ms": "milliseconds of a request",
    "tokens_per_second": "tokens per second",
    "memory_mb": "megabytes",
}
TIMES = ("request_ms", "token_ms")  # costs that only a measured table of the device can tell


@dataclass(frozen=True)
class Target:
    """One checkpoint that is asked for."""

    kind: Kind
    value: float

    @property
    def name(self) -> str:
        """The name of its network."""
        before, after = NAMES[self.kind]
        return f"{before}{self.value:g}{after}"

    def limit(self, dense: float, batch: int = 1) -> float:
        """The most that the network may cost, in the unit of the cost; dense: what the dense model costs.

        batch: sequences that are decoded together, for tokens per second.
        """
        if self.kind == "keep":
            return self.value * dense
        if self.kind == "speedup":
            return dense / self.value
        if self.kind == "tokens_per_second":
            return 1000 * batch / self.value
        return self.value * (1e6 if self.kind == "memory_mb" else 1.0)

    def worth(self, cost: float, dense: float, batch: int = 1) -> float:
        """The inverse of `limit`: the value that a network of this cost would meet exactly."""
        if self.kind == "keep":
            return cost / dense
        if self.kind == "speedup":
            return dense / cost
        if self.kind == "tokens_per_second":
            return 1000 * batch / cost
        return cost / (1e6 if self.kind == "memory_mb" else 1.0)
