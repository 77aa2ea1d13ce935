"""Floor 0: what a setting is: its default, its sentence of help, its range, and the step that first reads it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal

from prunus.errors import UserError

ANYWHERE = "anywhere"  # the step of settings that say where to compute, not what: they may differ on an existing run


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    step: str,
    flag: str | None = None,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field that knows what a person asks about it; the range is low <= value <= high, value > above."""
    return field(
        default=default, metadata={"help": help, "step": step, "flag": flag, "low": low, "above": above, "high": high}
    )


@dataclass(frozen=True)
class Setting:
    """One setting of the configuration: its dotted key, its type, and what a value must be."""

    key: str
    type: Any
    default: Any  # dataclasses.MISSING where it must be given
    help: str
    step: str
    flag: str | None  # its name on the command line, without dashes; others are reached by --set key=value
    low: float | None
    above: float | None
    high: float | None

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a Literal type, or of the Literal type of a tuple's items; empty for others."""
        one = self.item if self.many else self.plain
        return typing.get_args(one) if typing.get_origin(one) is Literal else ()

    @property
    def many(self) -> bool:
        """True for a tuple of values."""
        return typing.get_origin(self.plain) is tuple

    @property
    def item(self) -> Any:
        """The type of a tuple's items."""
        return typing.get_args(self.plain)[0]

    @property
    def plain(self) -> Any:
        """The type without `| None`."""
        if isinstance(self.type, types.UnionType) or typing.get_origin(self.type) is typing.Union:
            return next(t for t in typing.get_args(self.type) if t is not types.NoneType)
        return self.type

    def parse(self, value: Any) -> Any:
        """The value as its type, from Python, YAML or a flag's text; raises UserError naming the key and the rule."""
        if self.plain is not self.type and (value is None or value == "none"):
            return None
        if self.many:
            items = value.replace(",", " ").split() if isinstance(value, str) else value
            items = items if isinstance(items, list | tuple) else [items]
            return tuple(self._chosen(item) if self.choices else self._one(self.item, item) for item in items)
        return self._chosen(value) if self.choices else self._one(self.plain, value)

    def _chosen(self, value: Any) -> Any:
        if value not in self.choices:
            raise UserError(f"{self.key} is one of {', '.join(self.choices)}; given {value!r}{self._guess(value)}")
        return value

    def _one(self, kind: Any, value: Any) -> Any:
        number = _as(kind, value)
        if number is None:
            what = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
            raise UserError(f"{self.key} is {what}; given {value!r}")
        if kind in (int, float) and not self._inside(number):
            percent = self.key == "keep" and 5 <= number <= 100
            hint = f"; for {number:g} per cent write {number / 100:g}" if percent else ""
            raise UserError(f"{self.key} lies in {self.range}; given {number:g}{hint}")
        return number

    def _inside(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.low is None or number >= self.low)
            and (self.above is None or number > self.above)
            and (self.high is None or number <= self.high)
        )

    @property
    def shown(self) -> str:
        """The default as it is typed; empty where it must be given."""
        if self.default is dataclasses.MISSING:
            return ""
        if isinstance(self.default, tuple):
            return " ".join(x if isinstance(x, str) else f"{x:g}" for x in self.default)
        return "none" if self.default is None else str(self.default).lower()

    @property
    def range(self) -> str:
        """The allowed interval, as mathematicians write it; empty where every value will do."""
        if self.low is None and self.above is None and self.high is None:
            return ""
        left = f"({self.above:g}" if self.above is not None else "(-inf" if self.low is None else f"[{self.low:g}"
        return f"{left}, inf)" if self.high is None else f"{left}, {self.high:.10g}]"

    def _guess(self, value: Any) -> str:
        near = difflib.get_close_matches(str(value), [str(c) for c in self.choices], 1)
        return f" (did you mean {near[0]!r}?)" if near else ""


class Section:
    """Checks and tidies its own values ("1e-3" -> 0.001, a list -> a tuple) when it is made; raises UserError."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for one in _own(type(self), self.prefix):  # type: ignore[arg-type]
            name = one.key.removeprefix(self.prefix)
            if "." not in name:
                object.__setattr__(self, name, one.parse(getattr(self, name)))


@cache
def _own(section: Any, prefix: str) -> tuple[Setting, ...]:
    return tuple(declared(section, prefix))


def declared(section: Any, prefix: str = "") -> Iterator[Setting]:
    """The settings of a dataclass and of the sections in it, in the order of declaration."""
    hints = typing.get_type_hints(section)
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from declared(hints[f.name], f"{f.name}.")
        else:
            yield Setting(prefix + f.name, hints[f.name], f.default, **f.metadata)


def _as(kind: Any, value: Any) -> Any:
    """value as an int, float, bool or str, or None where it is not one; "1e-3" is text to YAML 1.1, a number to us."""
    if kind is bool:
        named = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        return value if isinstance(value, bool) else named.get(str(value).lower())
    if kind is str:
        return value if isinstance(value, str) and value else None
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
        if kind is float:
            return number
        return int(value) if isinstance(value, int | str) else int(number) if number.is_integer() else None
    except (TypeError, ValueError, OverflowError):
        return None
