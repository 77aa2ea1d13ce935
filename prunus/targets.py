"""Floor 0: what a network is asked to come to: a share to keep, a speed, a time, a memory; and the settings of these.

Every target names its network (`keep-0.8`, `speedup-1.6`, `latency-40ms`, `rate-25tps`, `memory-180mb`), the cost that
it limits, and the limit in that cost's own unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from prunus.errors import UserError
from prunus.setting import Section, setting

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


def unlike(targets: Sequence[Target]) -> bool:
    """True if all targets have networks of their own: names show six digits of a value."""
    return len({target.name for target in targets}) == len(targets)


def typed(values: Sequence[float]) -> str:
    """Values as they may be typed after a flag."""
    return " ".join(map(repr, values))


@dataclass(frozen=True)
class BudgetConfig(Section):
    """Targets in milliseconds, tokens per second or megabytes, instead of shares to keep."""

    prefix: ClassVar[str] = "budget."
    speedup: tuple[float, ...] = setting(
        (), "how many times faster than the dense model one request is to be, by the table of this device",
        step="search", flag="speedup", above=1,
    )  # fmt: skip
    latency_ms: tuple[float, ...] = setting(
        (), "milliseconds of one request on this device: its prompt and what is generated",
        step="search", flag="latency-ms", above=0,
    )  # fmt: skip
    tokens_per_second: tuple[float, ...] = setting(
        (), "tokens that this device is to decode in a second, all sequences of the batch together",
        step="search", flag="tokens-per-second", above=0,
    )  # fmt: skip
    memory_mb: tuple[float, ...] = setting(
        (), "megabytes (10^6 bytes) of weights and KV cache at --context",
        step="search", flag="memory-mb", above=0,
    )  # fmt: skip
    runtime: Literal["torch", "torch.compile", "llama.cpp"] = setting(
        "torch", "the program that times are measured in; torch.compile: every token after the prompt compiled",
        step="search", flag="runtime",
    )  # fmt: skip
    quant: Literal["f32", "f16", "q8_0", "q4_0"] = setting(
        "f16", "type of the matrices that llama.cpp is timed with", step="search", flag="quant"
    )
    prompt: int = setting(512, "tokens in the prompt of a request", step="search", flag="prompt", low=1)
    batch: int = setting(2, "sequences in a request", step="search", flag="batch", low=1)
    generate: int = setting(
        64, "tokens that a request generates; 0: the prompt alone", step="search", flag="generate", low=0
    )
    context: int | None = setting(
        None, "tokens in the KV cache, for --memory-mb; `none` for prompt and generated tokens of the request",
        step="search", flag="context", low=1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in LIMITS:
            values = getattr(self, kind)
            if not unlike([Target(kind, value) for value in values]):
                raise UserError(
                    f"each target counts once, given budget.{kind} {typed(values)}; networks are named by six digits, "
                    "so leave one of the same name out"
                )
        kinds = [kind for kind in LIMITS if getattr(self, kind)]
        if len(kinds) > 1:
            raise UserError(f"a run has one kind of target, given {' and '.join(kinds)}; start a run for each")

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets that were given, the mildest first."""
        for kind in LIMITS:
            values = sorted(getattr(self, kind), reverse=kind in ("latency_ms", "memory_mb"))
            if values:
                return tuple(Target(kind, value) for value in values)
        return ()
