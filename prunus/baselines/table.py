"""Floor 1: every rival method by name: its paper, what it can serve, and where its function is. Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from prunus.errors import UserError

if TYPE_CHECKING:
    from prunus.baselines.subject import Outcome, Subject

Kind = Literal["width", "depth", "hidden", "search", "mask"]
# norms before the sub-layers, nothing behind them
ROTATED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "phi", "gpt_neox", "opt", "gpt2")


@dataclass(frozen=True)
class Baseline:
    """One method. Its function is `compress` in `prunus.baselines.<module>`, called with `options`."""

    name: str
    module: str
    title: str
    paper: str
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict)
    model_types: tuple[str, ...] | None = None  # the only ones it can serve; None: all that Prunus knows
    because: str = ""  # why not the others
    only: float | None = None  # the only share that it can keep

    @property
    def structured(self) -> bool:
        """True where the network is smaller; masks only put zeros into it."""
        return self.kind != "mask"

    @property
    def serves(self) -> str:
        """What it can serve, in words."""
        families = "all families" if self.model_types is None else ", ".join(self.model_types)
        return families if self.only is None else f"{families}; keeps {self.only:g} of each matrix, nothing else"

    def refusal(self, model_type: str, keep: float | None = None) -> str | None:
        """Why it cannot serve a model, or a share to keep; None if it can."""
        if self.model_types is not None and model_type not in self.model_types:
            return f"{self.name} cannot serve {model_type}: {self.because}; it serves {self.serves}"
        if keep is not None and self.only is not None and abs(keep - self.only) > 1e-9:
            return f"{self.name} keeps {self.only:g} of every matrix and nothing else, given {keep:g}"
        return None

    def run(self, subject: Subject, keep: float) -> Outcome:
        """Make the network that keeps at most the share `keep` of the decoder blocks' parameters.

        Raises UserError where the method cannot serve the model or the share.
        """
        refusal = self.refusal(str(subject.model.config.model_type), keep)
        if refusal:
            raise UserError(refusal)
        function = import_module(f"prunus.baselines.{self.module}").compress
        outcome: Outcome = function(subject, keep, **self.options)
        return outcome


_LLM_PRUNER = "Ma et al. 2023, arXiv:2305.11627"
_FLAP = "An et al. 2023, arXiv:2312.11983"
_WANDA = "Sun et al. 2023, arXiv:2306.11695"
_SPARSEGPT = "Frantar and Alistarh 2023, arXiv:2301.00774"
_MAGNITUDE = "Han et al. 2015, arXiv:1506.02626"

_ALL = (
    Baseline("magnitude", "magnitude", "norms of the writers' columns", f"as the control of {_FLAP}", "width"),
    Baseline("wanda-sp", "wanda_sp", "weights times activations, by units", f"{_FLAP}, after {_WANDA}", "width"),
    Baseline(
        "wanda-sp-dense", "wanda_sp", "the same, all layers judged in the dense model", f"{_FLAP}, after {_WANDA}",
        "width", {"sequential": False},
    ),
    Baseline("flap", "flap", "fluctuation of activations, one threshold, biases take over the mean", _FLAP, "width"),
    Baseline("flap-nobias", "flap", "the same without its biases", _FLAP, "width", {"bias": False}),
    Baseline("llm-pruner", "llm_pruner", "Taylor, elements, first order, block-wise", _LLM_PRUNER, "width"),
    Baseline(
        "llm-pruner-second", "llm_pruner", "Taylor, elements, second order, block-wise", _LLM_PRUNER, "width",
        {"taylor": "param_second"},
    ),
    Baseline(
        "llm-pruner-mix", "llm_pruner", "Taylor, elements, both orders, block-wise", _LLM_PRUNER, "width",
        {"taylor": "param_mix"},
    ),
    Baseline(
        "llm-pruner-vector", "llm_pruner", "Taylor, vectors, block-wise", _LLM_PRUNER, "width", {"taylor": "vector"}
    ),
    Baseline(
        "llm-pruner-channel", "llm_pruner", "Taylor, elements, first order, hidden channels", _LLM_PRUNER, "hidden",
        {"channels": True},
    ),
    Baseline(
        "slicegpt", "slicegpt", "PCA rotation of the residual stream, its least directions cut",
        "Ashkboos et al. 2024, arXiv:2401.15024", "hidden", model_types=ROTATED,
        because="its rotation needs a norm before each sub-layer and none behind it, so that a rotated residual "
        "stream is the same function",
    ),
    Baseline("shortgpt", "shortgpt", "layers of least influence leave", "Men et al. 2024, arXiv:2403.03853", "depth"),
    Baseline(
        "angular", "angular", "the run of layers leaves that turns the residual stream least",
        "Gromov et al. 2024, arXiv:2403.17887", "depth",
    ),
    Baseline("laco", "laco", "layers merged into earlier ones", "Yang et al. 2024, arXiv:2402.11187", "depth"),
    Baseline(
        "laco-released", "laco", "the same as its code does it: the last layer of a merge replaces the first",
        "Yang et al. 2024, arXiv:2402.11187", "depth", {"released": True},
    ),
    Baseline("sleb", "sleb", "greedily, the least needed layer leaves", "Song et al. 2024, arXiv:2402.09025", "depth"),
    Baseline(
        "blockpruner", "blockpruner", "greedy over attentions and MLPs by perplexity",
        "Zhong et al. 2024, arXiv:2406.10594", "depth",
    ),
    Baseline(
        "shen", "shen_search", "evolution of masks, then ADMM", "Shen et al. 2024, arXiv:2409.17372", "search"
    ),
    Baseline("random", "random_search", "the best of random networks: the control", "none", "search"),
    *(
        Baseline(f"mask-{name}{'' if n is None else f'-{n}:4'}", f"mask_{name}", title, paper, "mask",
                 {} if n is None else {"n_of_m": (n, 4)}, only=None if n is None else n / 4)
        for name, title, paper in (
            ("magnitude", "the smallest weights become zero", _MAGNITUDE),
            ("wanda", "weights times activations, row by row", _WANDA),
            ("sparsegpt", "optimal brain surgeon, column by column", _SPARSEGPT),
        )
        for n in (None, 2)
    ),
)  # fmt: skip

TABLE: Mapping[str, Baseline] = MappingProxyType({one.name: one for one in _ALL})
OURS = "prunus"


def names() -> tuple[str, ...]:
    """All names, ours first."""
    return (OURS, *TABLE)


def chosen(asked: Sequence[str]) -> tuple[str, ...]:
    """Methods by name; `all` stands for every one, `structured` for those whose networks are smaller."""
    groups = {"all": names(), "structured": (OURS, *(n for n, one in TABLE.items() if one.structured))}
    return tuple(dict.fromkeys(name for word in asked for name in groups.get(word, (word,))))


def listed() -> dict[str, Any]:
    """What `prunus bench --list` shows."""
    ours = {
        "name": OURS, "what it does": "error curves with a knapsack, evolution, closed-form reformation",
        "paper": "docs/method.md", "serves": "all families", "smaller network": True,
    }  # fmt: skip
    rows = [
        {
            "name": one.name, "what it does": one.title, "paper": one.paper, "serves": one.serves,
            "smaller network": one.structured,
        }
        for one in TABLE.values()
    ]  # fmt: skip
    return {"methods": [ours, *rows]}


def find(name: str) -> Baseline:
    """The method of a name; raises UserError with the nearest one that there is."""
    if name not in TABLE:
        near = difflib.get_close_matches(name, TABLE, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names())}"
        raise UserError(f"no method {name!r}; {hint}")
    return TABLE[name]


__all__ = ["OURS", "TABLE", "Baseline", "chosen", "find", "listed", "names"]
