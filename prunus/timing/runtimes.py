"""Floor 5: times in the program that a network will run in (PyTorch, compiled or not; llama.cpp), by a budget."""

from __future__ import annotations

from typing import Any

from prunus.config import BudgetConfig
from prunus.errors import UserError
from prunus.models.families import Family, dims
from prunus.progress import Progress, silent
from prunus.searching.space import SearchSpace
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.timing import compiled_latency, latency, llamacpp_latency
from prunus.timing.timetable import Request, Timetable


def request_of(budget: BudgetConfig) -> Request:
    """What is timed."""
    return Request(budget.prompt, budget.batch, budget.generate)


def measure(
    model: Any,
    family: Family,
    budget: BudgetConfig,
    *,
    step: int | None = None,
    again: bool = False,
    progress: Progress = silent,
) -> Timetable:
    """The table of a model on this device and in the budget's runtime, from the cache where it was measured before."""
    request = request_of(budget)
    if budget.runtime == "torch":
        return latency.measure(model, family, request, step=step, again=again, progress=progress)
    if budget.runtime == compiled_latency.RUNTIME:
        return compiled_latency.measure(model, family, request, step=step, again=again, progress=progress)
    return llamacpp_latency.measure(
        model, family, request, quant=budget.quant, step=step, again=again, progress=progress
    )


def compare(dense: Any, small: Any, budget: BudgetConfig) -> dict[str, float]:
    """Both models on a request in turns: milliseconds of the small one, and how many times faster it is (medians)."""
    if budget.runtime == "torch":
        return latency.compare(dense, small, request_of(budget))
    if budget.runtime == compiled_latency.RUNTIME:
        return compiled_latency.compare(dense, small, request_of(budget))
    return llamacpp_latency.compare(dense, small, request_of(budget), budget.quant)


def check(model: Any, family: Family, budget: BudgetConfig, space: SearchSpace) -> None:
    """Raise UserError where the runtime is missing, or cannot run the networks of a space."""
    if budget.runtime == "torch":
        return
    if budget.runtime == compiled_latency.RUNTIME:
        compiled_latency.check_compiles(next(model.parameters()).device)
        return
    llamacpp_latency.check_installed()
    llamacpp_latency.carrier_of(model)
    if llamacpp_latency.architecture(model, family, narrow(space, dims(model.config))) is None:
        how = "fewer heads or neurons" if space.uniform else "layers of different widths"
        advice = "search.attention=none" if space.uniform else "--uniform"
        raise UserError(
            f"llama.cpp has no architecture that holds a {model.config.model_type} with {how}, so a search would "
            f"find nothing that runs there; search with {advice}, or leave --runtime out"
        )


def narrow(space: SearchSpace, size: dict[str, int]) -> SubNetwork:
    """A network of a space as far from the dense one as an architecture may mind."""
    if space.uniform:
        return space.smallest()
    least = [min((o for o in options if o != (0, 0)), key=lambda o: o[0] * o[1]) for options in space.attention]
    widths = [min(w for w in options if w) for options in space.mlp]
    layers = [LayerShape(*heads, width) for heads, width in zip(least, widths, strict=True)]
    first = LayerShape(size["kv_heads"], size["q_per_kv"], size["mlp"])
    return SubNetwork(space.hidden[0], (first, *layers[1:]))
