"""Floor 3: how important each unit of a super-network is: scores from weights, activations and gradients.

One interface for all of them: `score(model, family, ids, method) -> Importance`, higher = more important. The
calibration tokens pass through the model layer by layer; no activation outlives its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunus.errors import UserError
from prunus.models.families import UNCUT, Family, dims
from prunus.models.rows import Row, layers_of, rows
from prunus.models.stream import LayerStream
from prunus.scoring.moments import add_products
from prunus.scoring.scores import Aggregator, Sums, by_unit, curvature, levels, obs, one_level, wanda

Method = Literal["obs", "wanda", "activation", "taylor", "magnitude"]
Layers = Literal["influence", "perplexity"]
Neurons = Literal["product", "gate"]
Advance = Callable[[int], None]
PARTS: tuple[Literal["attention"], Literal["mlp"]] = ("attention", "mlp")


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores of every unit, float32 and finite; L layers, G KV groups, R query heads per group, I neurons."""

    hidden: Tensor  # (H,), summed over the layers
    kv_heads: Tensor  # (L, G), a group with its query heads
    q_per_kv: Tensor  # (L, G, R), what is a query head's own
    mlp: Tensor  # (L, I)
    attention_blocks: Tensor  # (L,)
    mlp_blocks: Tensor  # (L,)
    blocks: Tensor  # (L,), whole layers

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value.dtype != torch.float32:
                object.__setattr__(self, one.name, value.float())
            if not bool(torch.isfinite(value).all()):
                raise UserError(
                    f"the importance of {one.name} is not finite everywhere; the activations overflow in this dtype or "
                    "the score is undefined on these tokens: use float32, more calibration sequences, or another score"
                )

    def order(self) -> dict[str, Tensor]:
        """Members of every dimension, most important first (ties keep their order): what `slicing.sort` takes."""
        named = {unit: getattr(self, unit) for unit in ("hidden", "kv_heads", "q_per_kv", "mlp")}
        return {unit: value.argsort(dim=-1, descending=True, stable=True) for unit, value in named.items()}

    def save(self, path: Path | str, **metadata: str) -> None:
        """Write one safetensors file; metadata: strings kept beside the tensors, e.g. the method."""
        tensors = {one.name: getattr(self, one.name).cpu().contiguous().clone() for one in fields(self)}
        save_file(tensors, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: Path | str) -> Importance:
        """Read what `save` wrote."""
        with safe_open(str(path), framework="pt") as file:
            return cls(**{one.name: file.get_tensor(one.name) for one in fields(cls)})


def score(
    model: nn.Module,
    family: Family,
    ids: Tensor,
    method: Method = "obs",
    aggregator: Aggregator = "mean",
    *,
    layers: Layers = "influence",
    neurons: Neurons = "product",
    hidden: Literal["norms", "final"] = "norms",
    damping: float = 0.01,
    micro: int = 4,
    advance: Advance | None = None,
) -> Importance:
    """Importance of every unit, from calibration tokens ids (sequences, length).

    method: "obs" (Shen et al. 2024, arXiv:2409.17372, eq. 1-3, grouped for GQA), "wanda" (|W| |X|, Sun et al. 2023,
    arXiv:2306.11695), "activation" (Muralidharan et al. 2024, arXiv:2407.14679, as Sukthanker et al. use it),
    "taylor" (first order |w dL/dw|, one gradient per micro-batch; Ma et al. 2023, arXiv:2305.11627), "magnitude" (w^2).
    aggregator, neurons, hidden: of "activation" only: how tokens are gathered (see `gathered`), whether a neuron is
    judged by what the MLP's writer reads or by the gate before its non-linearity, and hidden channels by the norms of
    all layers or by the final norm.
    layers: sub-layers and layers by 1 - cosine of the residual stream before and after, or by the perplexity without.
    damping: ridge of "obs" as a share of the Gram matrix's mean diagonal.
    advance: called with the number of tokens that passed one layer. Adapters must be merged first.
    Raises UserError for unknown names, and where a score is undefined or not finite.
    """
    _check_names(method, aggregator, layers, ids)
    stream = LayerStream(model, family)
    total = _Totals(model, family)
    if method == "taylor":
        _add_taylor(model, family, ids, total, micro, advance)
    if method == "magnitude":
        for row in _inner(model, family):
            total.add(row, row.parameter.detach().double() ** 2)
    influence = _pass(stream, ids, total, method, _Options(aggregator, neurons, hidden, damping), micro, advance)
    blocks = influence if layers == "influence" else _perplexities(stream, ids, micro, advance)
    return Importance(**total.units, **blocks)


def _check_names(method: str, aggregator: str, layers: str, ids: Tensor) -> None:
    for what, given, known in (("score", method, Method), ("aggregator", aggregator, Aggregator)):
        if given not in get_args(known):
            raise UserError(f"unknown {what} {given!r}; known: {', '.join(get_args(known))}")
    if layers not in get_args(Layers):
        raise UserError(f"unknown score of layers {layers!r}; known: {', '.join(get_args(Layers))}")
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise UserError(f"calibration tokens must be (sequences, length >= 2), not {tuple(ids.shape)}")
    if method == "activation" and aggregator.startswith("variance"):
        raise UserError(
            f"aggregator {aggregator!r} is the variance of one number for neurons and hidden channels (not a number); "
            "choose mean, norm, norm-mean, mean-norm, mean-variance or norm-variance"
        )


class _Totals:
    """Sums of unit scores over the parameters of every layer, float64."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.whole = d = dims(model.config)
        n = len(layers_of(model, family))
        shapes = {
            "hidden": (d["hidden"],),
            "kv_heads": (n, d["kv_heads"]),
            "q_per_kv": (n, d["kv_heads"], d["q_per_kv"]),
            "mlp": (n, d["mlp"]),
        }
        self.device = next(model.parameters()).device
        self.units = {unit: torch.zeros(s, dtype=torch.float64, device=self.device) for unit, s in shapes.items()}

    def add(self, row: Row, each: Tensor) -> None:
        """Add scores `each` of a parameter's elements, in its storage order, to the units they belong to."""
        assert row.layer is not None
        for dim, axis in enumerate(row.axes):
            others = [k for k in range(each.ndim) if k != dim]
            values = each.sum(others, dtype=torch.float64) if others else each.double()
            for unit, value in by_unit(values, axis, self.whole).items():
                self.put(unit, row.layer, value)

    def put(self, unit: str, layer: int, value: Tensor) -> None:
        target = self.units[unit] if unit == "hidden" else self.units[unit][layer]
        target += value


def _inner(model: nn.Module, family: Family) -> Iterator[Row]:
    return (row for row in rows(model, family) if row.layer is not None and UNCUT not in row.axes)


# ------------------------------------------------------------------------------------- one pass, layer after layer


@dataclass(frozen=True)
class _Options:
    aggregator: str
    neurons: str
    hidden: str
    damping: float


@dataclass(frozen=True)
class _Seen:
    """What one module of a layer read and wrote in the last forward."""

    read: dict[str, Tensor]
    wrote: dict[str, Tensor]


@contextmanager
def _watch(layer: nn.Module, paths: set[str]) -> Iterator[_Seen]:
    seen = _Seen({}, {})

    def at(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen.read[path] = inputs[0]
            seen.wrote[path] = output

        return layer.get_submodule(path).register_forward_hook(hook)

    hooks = [at(path) for path in sorted(paths)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _readers(family: Family) -> dict[str, str]:
    """For both sub-layers: a module that reads what all of their readers read."""
    tables = {"attention": family.attention, "mlp": family.mlp}
    return {part: next(p for p, row in table.items() if row.startswith("hidden ->")) for part, table in tables.items()}


def _norms(family: Family) -> list[str]:
    return [path for path, row in family.inner.items() if row == "hidden"]


def _adders(family: Family) -> dict[str, str]:
    """For both sub-layers: the module whose output is added to the residual stream."""
    if not family.post_norm:
        return {"attention": family.attention_writer, "mlp": family.mlp_writer}
    tables = {"attention": family.attention, "mlp": family.mlp}
    return {part: [p for p, row in table.items() if row == "hidden"][-1] for part, table in tables.items()}


@torch.no_grad()
def _pass(
    stream: LayerStream,
    ids: Tensor,
    total: _Totals,
    method: Method,
    options: _Options,
    micro: int,
    advance: Advance | None,
) -> dict[str, Tensor]:
    """All tokens through one layer, then the next; adds unit scores to `total`, returns the influence of blocks."""
    family = stream.family
    batches = list(torch.split(ids, micro))
    carried = [stream.embed(batch) for batch in batches]
    adders, influence = _adders(family), _Influence(len(stream), family.parallel, stream.device)
    matrices: list[list[Row]] = [[] for _ in stream.layers]
    for row in _inner(stream.model, family):
        if row.layer is not None and row.parameter.ndim == 2:
            matrices[row.layer].append(row)
    for i, layer in enumerate(stream.layers):
        watched: _Collector = _COLLECTORS.get(method, _Collector)(matrices[i], family, total, options)
        with _watch(layer, watched.paths | set(adders.values())) as seen:
            for b, batch in enumerate(batches):
                before, carried[b] = carried[b], stream.run(i, carried[b])
                watched.add(seen)
                added = [seen.wrote[adders[part]].view_as(before) for part in PARTS]
                influence.add(i, before, added[0], added[1], carried[b])
                if advance:
                    advance(batch.numel())
        watched.finish(i)
    if method == "activation" and options.hidden == "final":
        final = stream.model.get_submodule(family.final_norm)
        sums = Sums()
        for hidden in carried:
            sums.add(final(hidden).flatten(0, -2), 0)
        total.units["hidden"] = one_level(sums, options.aggregator)
    return influence.result(ids.numel())


class _Influence:
    """1 - mean cosine of the residual stream before and after each sub-layer and layer (block influence)."""

    def __init__(self, n_layers: int, parallel: bool, device: torch.device) -> None:
        self.parallel = parallel
        self.cosines = torch.zeros(3, n_layers, dtype=torch.float64, device=device)

    def add(self, layer: int, before: Tensor, attention: Tensor, mlp: Tensor, after: Tensor) -> None:
        x = before.float()
        middle = x + attention.float()
        pairs = [(x, middle), (x, x + mlp.float()) if self.parallel else (middle, middle + mlp.float()), (x, after)]
        for row, (a, b) in enumerate(pairs):
            self.cosines[row, layer] += nn.functional.cosine_similarity(a, b.float(), dim=-1).sum(dtype=torch.float64)

    def result(self, n_tokens: int) -> dict[str, Tensor]:
        values = 1 - self.cosines / n_tokens
        return dict(zip(("attention_blocks", "mlp_blocks", "blocks"), values, strict=True))


class _Collector:
    """Collects nothing: for the scores that need no activations."""

    def __init__(self, matrices: list[Row], family: Family, total: _Totals, options: _Options) -> None:
        self.matrices, self.family, self.total, self.options = matrices, family, total, options
        self.paths: set[str] = set()

    def add(self, seen: _Seen) -> None:
        """One batch has passed the layer."""

    def finish(self, i: int) -> None:
        """All batches have passed layer i."""


class _Weights(_Collector):
    """Scores of the layer's weights from the second moments of their inputs: OBS and Wanda."""

    def __init__(self, matrices: list[Row], family: Family, total: _Totals, options: _Options) -> None:
        super().__init__(matrices, family, total, options)
        self.readers = _readers(family)
        self.paths = {*self.readers.values(), family.attention_writer, family.mlp_writer}
        self.moments: dict[str, Tensor] = {}
        self.n = 0

    def gather(self, x: Tensor, total: Tensor | None) -> Tensor:
        """Add the second moments of x (tokens, inputs) to `total`, **in place**; None starts one."""
        raise NotImplementedError

    def each(self, weight: Tensor, moment: Tensor) -> Tensor:
        raise NotImplementedError

    def add(self, seen: _Seen) -> None:
        for path in self.paths:
            x = seen.read[path].flatten(0, -2)
            self.moments[path] = self.gather(x, self.moments.get(path))
        self.n += x.shape[0]

    def finish(self, i: int) -> None:
        prefix = f"{self.family.layers}.{i}."
        shared = {path: self.prepared(moment.div_(self.n)) for path, moment in self.moments.items()}
        for row in self.matrices:
            path = row.path.removeprefix(prefix).removesuffix(".weight")
            source = path if path in self.moments else self.readers["attention" if row.part == "attention" else "mlp"]
            weight = row.parameter.detach()
            if isinstance(row.module, nn.Linear):
                self.total.add(row, self.each(weight, shared[source]))
            else:  # GPT-2 stores (in, out)
                self.total.add(row, self.each(weight.T, shared[source]).T)

    def prepared(self, moment: Tensor) -> Tensor:
        """What `each` takes, computed once for all weights that share an input."""
        return moment


class _Obs(_Weights):
    def gather(self, x: Tensor, total: Tensor | None) -> Tensor:
        n = x.shape[1]
        total = torch.zeros(n, n, device=x.device) if total is None else total
        add_products(total, x, x)
        return total

    def prepared(self, moment: Tensor) -> Tensor:
        return curvature(moment, self.options.damping)

    def each(self, weight: Tensor, moment: Tensor) -> Tensor:
        return obs(weight, moment)


class _Wanda(_Weights):
    def gather(self, x: Tensor, total: Tensor | None) -> Tensor:
        square = x.float().pow(2).sum(0, dtype=torch.float64)
        return square if total is None else total.add_(square)

    def each(self, weight: Tensor, moment: Tensor) -> Tensor:
        return wanda(weight, moment)


class _Activation(_Collector):
    """Norms of what each unit puts out: channels after the norms, neurons, heads and groups before the writer."""

    def __init__(self, matrices: list[Row], family: Family, total: _Totals, options: _Options) -> None:
        super().__init__(matrices, family, total, options)
        self.gate = next(path for path, row in family.mlp.items() if row.startswith("hidden -> mlp"))
        self.norms = [] if options.hidden == "final" else _norms(family)
        self.paths = {*self.norms, self.gate, family.attention_writer, family.mlp_writer}
        self.outer, self.inner = levels(options.aggregator)
        self.channels = {path: Sums() for path in self.norms}
        self.neurons, self.heads, self.groups = Sums(), Sums(), Sums()

    def add(self, seen: _Seen) -> None:
        for path, sums in self.channels.items():
            sums.add(seen.wrote[path].flatten(0, -2), 0)
        if self.options.neurons == "gate":
            self.neurons.add(seen.wrote[self.gate].flatten(0, -2)[:, : self.total.whole["mlp"]], 0)
        else:
            self.neurons.add(seen.read[self.family.mlp_writer].flatten(0, -2), 0)
        d = self.total.whole
        x = seen.read[self.family.attention_writer].float()
        heads = x.unflatten(-1, [d["kv_heads"], d["q_per_kv"], d["head_dim"]])  # type: ignore[no-untyped-call]
        self.heads.add(Sums().add(heads.norm(dim=-1), 1).gathered(self.inner), 0)
        self.groups.add(Sums().add(heads.flatten(-2).norm(dim=-1), 1).gathered(self.inner), 0)

    def finish(self, i: int) -> None:
        for sums in self.channels.values():
            self.total.put("hidden", i, one_level(sums, self.options.aggregator))
        self.total.put("mlp", i, one_level(self.neurons, self.options.aggregator))
        self.total.put("q_per_kv", i, self.heads.gathered(self.outer))
        self.total.put("kv_heads", i, self.groups.gathered(self.outer))


_COLLECTORS: dict[str, type[_Collector]] = {"obs": _Obs, "wanda": _Wanda, "activation": _Activation}


# ---------------------------------------------------------------------------------------------- gradients and removal


def _add_taylor(
    model: nn.Module, family: Family, ids: Tensor, total: _Totals, micro: int, advance: Advance | None
) -> None:
    """Add |w dL/dw| of every parameter of the layers, summed over micro-batches; no gradient outlives its use."""
    wanted = {id(row.parameter): row for row in _inner(model, family)}
    n_predicted = ids.shape[0] * (ids.shape[1] - 1)

    def use(parameter: Tensor, grad: Tensor) -> None:
        total.add(wanted[id(parameter)], (parameter.detach().double() * grad.double()).abs())

    with handing_over_gradients(model, set(wanted), use):
        for batch in torch.split(ids.to(total.device), micro):
            with torch.enable_grad():
                _losses(model(input_ids=batch, use_cache=False).logits, batch).sum().div(n_predicted).backward()  # type: ignore[no-untyped-call]
            if advance:
                advance(batch.numel())


@contextmanager
def handing_over_gradients(
    model: nn.Module, wanted: Container[int], use: Callable[[Tensor, Tensor], None]
) -> Iterator[None]:
    """Inside the block every backward calls use(parameter, gradient) as soon as a gradient is whole, and drops it.

    wanted: the id() of each parameter that is to have a gradient; the others get none. The model is left as it was.
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def hand_over(parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        use(parameter, grad)
        parameter.grad = None

    hooks = []
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
            if id(parameter) in wanted:
                hooks.append(parameter.register_post_accumulate_grad_hook(hand_over))  # type: ignore[no-untyped-call]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag, grad in before:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Nats of every next token: logits (n, length, vocab), ids (n, length) -> (n * (length - 1),)."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")


@contextmanager
def _silent(layer: nn.Module, paths: list[str]) -> Iterator[None]:
    """Inside the block the named modules of a layer put out zeros."""
    hooks = [layer.get_submodule(p).register_forward_hook(lambda _, __, out: torch.zeros_like(out)) for p in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _perplexities(stream: LayerStream, ids: Tensor, micro: int, advance: Advance | None) -> dict[str, Tensor]:
    """Perplexity of the calibration tokens without each attention, MLP and layer; costs 1.5 L forwards."""
    adders = _adders(stream.family)
    without = {
        "attention_blocks": [adders["attention"]],
        "mlp_blocks": [adders["mlp"]],
        "blocks": list(adders.values()),
    }
    nats = {name: torch.zeros(len(stream), dtype=torch.float64, device=stream.device) for name in without}
    for batch in torch.split(ids, micro):
        hidden = stream.embed(batch)
        for i, layer in enumerate(stream.layers):
            for name, paths in without.items():
                with _silent(layer, paths):
                    changed = stream.run(i, hidden)
                logits = stream.logits(stream.run_from(i + 1, changed))
                nats[name][i] += _losses(logits, batch.to(stream.device)).sum(dtype=torch.float64)
                if advance:
                    advance(batch.numel() * (len(stream) - i))
            hidden = stream.run(i, hidden)
    n = ids.shape[0] * (ids.shape[1] - 1)
    return {name: (value / n).exp().clamp_max(torch.finfo(torch.float32).max) for name, value in nats.items()}
