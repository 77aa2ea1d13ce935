"""Floor 4: rows of a results file as Markdown tables: what `prunus bench` writes and `benchmarks/render.py` redraws.

A results file has "rows" (plain data), "views" (how to show them), "command", "machine" and "versions", and "commands"
and "origins" (machine and versions) where its parts have one each; the views are described in benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from prunus.recording.report import table

RUIN = 1e5  # from here on a perplexity is a ruin's, and its digits say nothing


def view(data: Mapping[str, Any], wanted: str, origin: str) -> str:
    """One view as Markdown: its table, a sentence, and what was typed where to get it; wanted "": the first one."""
    views: Mapping[str, Any] = data["views"]
    one = views[wanted] if wanted else next(iter(views.values()))
    rows = [row for row in data["rows"] if all(row.get(k) == v for k, v in one.get("where", {}).items())]
    parts = [across(rows, one) if "across" in one else columns(rows, one)]
    parts += [one["note"]] if "note" in one else []
    part = one.get("where", {}).get("part")
    typed, made = data.get("commands", {}).get(part, data["command"]), data.get("origins", {}).get(part, data)
    versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
    parts.append(f"`{typed}` on {made['machine']}; {versions}. Figures: `{origin}`.")
    return "\n\n".join(parts)


def columns(rows: Sequence[Mapping[str, Any]], one: Mapping[str, Any]) -> str:
    """A table with a line for each row: `columns` lists [key, title, format] or [key, title, format, error's key]."""

    def cell(row: Mapping[str, Any], key: str, form: str, error: str = "") -> str:
        known = row.get(error) if error else None
        return number(row.get(key), form) + (f" ± {number(known, form.lstrip('+'))}" if known else "")

    head = [title for _, title, *_ in one["columns"]]
    return table(head, [[cell(row, key, *rest) for key, _, *rest in one["columns"]] for row in rows])


def across(rows: Sequence[Mapping[str, Any]], one: Mapping[str, Any]) -> str:
    """A table with a line for each `index` and a column for each value of `across`; the best of a column is bold.

    `best` is "min" or "max"; rows whose `index` is in `reference` (the dense model, say) are not compared, and those of
    one value of `among` only with each other. `error` is the key of the value's standard error.
    """
    lines = list(dict.fromkeys(row[one["index"]] for row in rows))
    heads = list(dict.fromkeys(row[one["across"]] for row in rows))
    value = {(row[one["index"]], row[one["across"]]): row.get(one["value"]) for row in rows}
    error = {(row[one["index"]], row[one["across"]]): row.get(one["error"]) for row in rows if "error" in one}
    group = {row[one["index"]]: row.get(one.get("among", "")) for row in rows}
    best = {}
    if "best" in one:
        choose = {"min": min, "max": max}[one["best"]]
        own = [line for line in lines if line not in one.get("reference", [])]
        for head, some in ((head, some) for head in heads for some in {group[line] for line in own}):
            rivals = [value.get((line, head)) for line in own if group[line] == some]
            best[head, some] = choose((v for v in rivals if v is not None), default=None)
    body = []
    for line in lines:
        cells = [str(line)]
        for head in heads:
            v = value.get((line, head))
            text = number(v, one["format"])
            bold = v is not None and v == best.get((head, group[line])) and line not in one.get("reference", [])
            known = error.get((line, head))
            cells.append((f"**{text}**" if bold else text) + (f" ± {number(known, one['format'])}" if known else ""))
        body.append(cells)
    titles = [number(head, one.get("across_format", "")) for head in heads]
    return table([one["title"], *titles], body)


def number(value: Any, form: str) -> str:
    """A cell: a dash for what was not measured; huge numbers of fixed digits after the point as 1.2e5."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if form.endswith("f") and "," not in form and isfinite(value) and abs(value) >= RUIN:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits}e{int(power)}"
    return format(value, form)
