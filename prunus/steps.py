"""Floor 5: the first steps of a run: calibrate, score, reform; `choosing` and `finishing` go on.

Every step takes a `Session` and reads what earlier steps left in the run directory, or makes it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from prunus.config import CompressConfig
from prunus.errors import UserError
from prunus.models import checkpoint, costs
from prunus.models.families import Family, dims, family_of, full
from prunus.models.loading import Loaded, say_type
from prunus.models.memory import give_back
from prunus.models.slicing import sort
from prunus.models.stream import LayerStream
from prunus.progress import Progress
from prunus.recording.run import Run
from prunus.reforming import levels, sensitivity
from prunus.scoring import importance, moments
from prunus.searching.grids import Space, grid_of, searchable
from prunus.searching.objective import Divergence, no_weights
from prunus.searching.space import AttentionUnit, SearchSpace, space_of
from prunus.searching.storage import database, is_url
from prunus.subnetwork import SubNetwork
from prunus.targets import TIMES, UNITS, Target
from prunus.texts import calibration
from prunus.texts.sampling import check_length
from prunus.timing import runtimes
from prunus.timing.timetable import Request, Timetable

WINDOW = 1024  # tokens in a window that candidates are judged on: shorter ones overrate what short contexts need
RUNGS = (1, 2, 4)  # windows at each rung of successive halving
CURVED = 512  # tokens in a window that the curvature is taken from: first tokens, which sinks form on, count enough
MICRO = 4  # calibration windows that run together


@dataclass
class Session:
    """A model on its way through a run. `sort_model` permutes the model in place, once."""

    run: Run
    config: CompressConfig
    model: nn.Module
    tokenizer: Any
    generation_config: Any
    family: Family
    progress: Progress
    dtype: torch.dtype  # that checkpoints are written in; the model may compute in a wider one
    stream: LayerStream = field(init=False)
    layout: costs.Layout = field(init=False)
    whole: SubNetwork = field(init=False)
    timetable: Timetable | None = None  # of this device, where the targets are times
    is_sorted: bool = False
    nats: dict[str, list[float]] = field(default_factory=dict)  # held-out KL of networks refitted in this session
    layer_order: list[int] | None = None  # most important first, from the training on
    tier: Literal["", "-trained"] = ""  # "-trained" once the weights are those of the trained super-network

    @classmethod
    def of(cls, run: Run, config: CompressConfig, loaded: Loaded, progress: Progress) -> Session:
        """A loaded model at the beginning of its way through a run."""
        family = family_of(loaded.model.config)
        return cls(
            run, config, loaded.model, loaded.tokenizer, loaded.generation_config, family, progress, loaded.dtype
        )

    def __post_init__(self) -> None:
        self.stream = LayerStream(self.model, self.family)
        self.layout = costs.layout(self.model, self.family)
        self.whole = full(self.model.config)

    @property
    def device(self) -> torch.device:
        return self.stream.device

    def cost(self, sub: SubNetwork) -> float:
        """What the targets limit, of one sub-network: parameters, bytes, FLOPs, milliseconds."""
        kind, budget = self.config.constraint, self.config.budget
        if kind in TIMES:
            assert self.timetable is not None  # check_request fetches it
            return self.timetable.request_ms(sub) if kind == "request_ms" else self.timetable.ms(sub, "decode")
        if kind == "memory_bytes":
            return float(costs.memory_bytes(self.layout, sub, self.context, budget.batch, self.width))
        if kind == "flops":
            return float(costs.flops(self.layout, sub, length=WINDOW))
        if kind == "bytes":
            return float(costs.n_bytes(self.layout, sub, self.width))
        return float(costs.parameters(self.layout, sub, "all" if kind == "parameters-all" else "blocks"))

    def share(self, target: Target) -> float:
        """The share of the dense model's cost that a target leaves."""
        if target.kind == "keep":
            return target.value
        dense = self.cost(self.whole)
        return target.limit(dense, self.config.budget.batch) / dense

    @property
    def alike(self) -> bool:
        """True if the search looks at networks whose layers are all alike."""
        trained = self.config.search.space == "trained" and self.config.train.space not in ("layers", "medium")
        return self.config.uniform or trained

    @property
    def width(self) -> int:
        """Bytes of one parameter of a checkpoint."""
        return self.dtype.itemsize

    @property
    def grams(self) -> str:
        """The artefact of the second moments that belong to the weights of now."""
        return f"grams{self.tier}"

    @property
    def fisher(self) -> str:
        """The artefact of the curvature that belongs to the weights of now."""
        return f"fisher{self.tier}.safetensors"

    @property
    def request(self) -> Request:
        """What is timed."""
        return runtimes.request_of(self.config.budget)

    @property
    def context(self) -> int:
        """Tokens in the KV cache, for the memory."""
        budget = self.config.budget
        return budget.context or budget.prompt + budget.generate


def calibrate(s: Session) -> tuple[Tensor, Tensor]:
    """Calibration and held-out windows, each (n, length), on the model's device."""
    c = s.config.calibration

    def compute() -> dict[str, Tensor]:
        say_type(s.model, s.dtype, s.config.dtype)
        source = calibration.auto_source() if c.source == "auto" else c.source
        s.run.note("calibration_source", source)
        n = c.samples + c.holdout
        with s.progress(f"calibration text: {source}", n * c.length) as advance:
            seen = 0

            def sampled(done: int, total: int) -> None:
                nonlocal seen
                advance(done - seen)
                seen = done

            ids = calibration.calibration_tokens(
                source, s.tokenizer, samples=n, length=c.length, seed=s.config.seed, model=s.model, device=s.device,
                column=c.column, progress=sampled,
            )  # fmt: skip
        fit, kept_aside = calibration.split(ids, c.holdout)
        return {"calibration": fit.contiguous(), "holdout": kept_aside.contiguous()}

    tokens = s.run.do("calibrate", "tokens.safetensors", compute)
    s.run.note("token_hash", calibration.token_hash(tokens["calibration"]))
    return tokens["calibration"].to(s.device), tokens["holdout"].to(s.device)


def measure_moments(s: Session, ids: Tensor, step: str = "score") -> dict[str, Tensor]:
    """Fisher matrices of the writers' outputs (returned) and Gram matrices of their inputs (a folder)."""
    r = s.config.reform
    fisher: dict[str, Tensor] = {}
    if r.fisher:
        sample = _windows(ids[: r.fisher], CURVED)

        def curvature() -> dict[str, Tensor]:
            with s.progress("curvature of the loss", sample.numel()) as advance:
                a, m = moments.fisher(s.model, s.family, sample, seed=s.config.seed, advance=_counted(s, advance, 3))
            return {"attention": a.cpu(), "mlp": m.cpu()}

        fisher = s.run.do(step, s.fisher, curvature)
    s.run.do(step, s.grams, lambda: _collect_grams(s, ids), save=_move, load=lambda path: path)
    return fisher


def score(s: Session, ids: Tensor) -> dict[str, Tensor]:
    """The orders that `slicing.sort` takes, most important members first; also leaves Fisher and Gram matrices."""
    r = s.config.reform
    fisher = measure_moments(s, ids)
    grams = s.run.path(s.grams)

    def orders() -> dict[str, Tensor]:
        if r.order == "score":
            found = importance.score(
                s.model, s.family, ids, method=s.config.score.method, aggregator=s.config.score.aggregator
            )
            return {unit: _stacked(order) for unit, order in found.order().items() if unit != "hidden"}
        with s.progress("order of heads and neurons", len(s.stream)) as advance:
            rows = []
            for i in range(len(s.stream)):
                attention, mlp = _weighted_writers(s, fisher, i)
                own = levels.read_grams(grams, i, s.device)
                rows.append(levels.order_layer(own, attention, mlp, dims(s.model.config), r.damping, r.block))
                advance(1)
        return {unit: torch.stack([row[unit].cpu() for row in rows]).contiguous() for unit in rows[0]}

    return s.run.do("score", "importance.safetensors", orders)


def openings(s: Session, ids: Tensor) -> Tensor | None:
    """Tokens that a text may begin with, (n, 1), besides those that the calibration windows begin with."""
    return calibration.openings(ids, s.config.reform.openings, seed=s.config.seed, bos=s.tokenizer.bos_token_id)


def _collect_grams(s: Session, ids: Tensor) -> Path:
    """Gram matrices of all writers, one file per layer, in a directory that becomes the artefact."""
    d, n, first = dims(s.model.config), len(s.stream), openings(s, ids)
    size = 4 * n * ((d["kv_heads"] * d["q_per_kv"] * d["head_dim"]) ** 2 + d["mlp"] ** 2)
    s.run.require_space(size, "the Gram matrices of all layers")
    folder = s.run.directory / ".prunus" / "grams"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokens = ids.numel() + (0 if first is None else first.numel())
    with s.progress("second moments of the calibration tokens", n * tokens) as advance:

        def layer_done(passed: int) -> None:
            advance(passed)
            s.run.count_tokens(passed // n)

        def use(i: int, grams: moments.Grams) -> None:
            levels.save_grams(grams, folder, i)

        moments.collect(s.stream, ids, use, openings=first, micro=MICRO, advance=layer_done)
    return folder


def _weighted_writers(s: Session, fisher: Mapping[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
    """Both writers' weights of one layer (out, in), times the square root of the Fisher matrix where there is one."""
    found = []
    for which, path in (("attention", s.family.attention_writer), ("mlp", s.family.mlp_writer)):
        weight = moments.writer_weight(s.stream.layers[i], path).float()
        if fisher:
            weight = moments.square_root(fisher[which][i], s.config.reform.shrinkage).to(s.device) @ weight
        found.append(weight)
    return found[0], found[1]


def sort_model(s: Session, orders: Mapping[str, Tensor]) -> levels.Levels:
    """Sort the super-network (**in place**, once per session) and give access to its reformed levels."""
    if not s.is_sorted:
        before = {id(p): p.data_ptr() for p in s.model.parameters()}
        sort(s.model, s.family, orders)
        _leave_file([p for p in s.model.parameters() if p.data_ptr() == before[id(p)]])
        s.is_sorted = True
    r = s.config.reform
    return levels.Levels(
        s.model, s.family, s.run.path(s.grams), orders=orders, damping=r.damping, method=r.method,
        iterations=r.iterations,
    )  # fmt: skip


def _leave_file(unsorted: Sequence[nn.Parameter]) -> None:
    """Weights that sorting left as they were are still pages of the checkpoint's file, and keep all of it in memory
    beside the sorted ones; they get memory of their own."""
    for parameter in unsorted:
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    give_back()


@dataclass(frozen=True)
class Prepared:
    """What the search stands on."""

    database: levels.Levels
    errors: levels.Errors
    space: SearchSpace
    curves: list[sensitivity.Curve]
    objective: Divergence
    factors: Mapping[tuple[int, sensitivity.Which], float]  # what the measured levels made of the curves

    def believed(self, belief: float) -> list[sensitivity.Curve]:
        """The curves with the measured levels believed more or less: 1 is `curves`, 0 without them."""
        return sensitivity.believing(self.curves, self.factors, belief)


def reform_levels(s: Session, ids: Tensor, holdout: Tensor, orders: Mapping[str, Tensor]) -> Prepared:
    """Reformed error of every nested level, and what it means in nats; sorts the model."""
    database = sort_model(s, orders)
    r, c = s.config.reform, s.config.search
    fisher = load_file(s.run.path(s.fisher)) if r.fisher else {}

    def curves() -> dict[str, Tensor]:
        d, rows = dims(s.model.config), []
        with s.progress("errors of all levels", len(s.stream)) as advance:
            for i in range(len(s.stream)):
                attention, mlp = _weighted_writers(s, fisher, i)
                rows.append(levels.layer_errors(database.grams(i), attention, mlp, d, r.damping))
                advance(1)
        return {"attention": torch.stack([a for a, _ in rows]), "mlp": torch.stack([m for _, m in rows])}

    found = s.run.do("reform", "errors.safetensors", curves)
    errors = levels.Errors(found["attention"], found["mlp"])
    published = c.method == "shen"  # judges before reformation, on one small fixed set (Shen et al. 2024, sec. 3.3)
    objective = Divergence(
        s.stream, _windows(ids), no_weights if published else database, kind="ppl" if published else c.objective,
        windows=RUNGS, holdout=_windows(holdout), seed=s.config.seed,
    )  # fmt: skip
    trained = c.space == "trained"  # its networks may have every number of heads, and layers may leave
    space = space_of(  # a uniform one comes later: its order of layers is read off these curves
        s.model.config, mlp_step=min(c.mlp_step, s.whole.layers[0].mlp), depth=c.depth or trained,
        attention="grid" if s.config.uniform or trained else c.attention,
    )  # fmt: skip

    def anchors() -> list[dict[str, Any]]:
        kl = Divergence(s.stream, objective.pool, database, windows=RUNGS, seed=s.config.seed + 1)
        with s.progress("divergence of single levels", len(s.stream)) as advance:
            points = r.sensitivity
            measured = sensitivity.measure(
                kl, s.whole, space, errors, kl.draw(0, 1)[:2], points=points, advance=advance
            )
        s.run.count_tokens(int(kl.forward_tokens))
        return [asdict(anchor) for anchor in measured]

    measured = s.run.do("reform", "sensitivity.json", anchors) if r.sensitivity else []
    known = [sensitivity.Anchor(**a) for a in measured]
    curve_list = sensitivity.curves(errors, known, s.layout, space, s.whole.hidden)
    if s.config.uniform or trained:
        space = _space(s, s.layer_order or _price_of_layers(curve_list, space.n_layers))
    return Prepared(database, errors, space, curve_list, objective, sensitivity.factors(known))


def _space(s: Session, layer_order: Sequence[int]) -> SearchSpace:
    """The space that is searched: per layer; or uniform, with the layers in the given order of importance."""
    c, uniform = s.config.search, s.config.uniform
    if c.space == "trained":
        found = searchable(space_of_run(s), s.model.config, mlp_step=c.mlp_step)
        return _stock(s, found) if uniform and found.uniform else found
    heads: AttentionUnit = "none" if uniform and not s.family.stock_heads else c.attention
    found = space_of(
        s.model.config, mlp_step=min(c.mlp_step, s.whole.layers[0].mlp), depth=c.depth, attention=heads,
        uniform=uniform, layer_order=layer_order if uniform else None,
    )  # fmt: skip
    return _stock(s, found) if uniform else found


def _stock(s: Session, space: SearchSpace) -> SearchSpace:
    """A uniform space without the heads, depths and hidden sizes that the family's stock configuration cannot hold."""

    def held(gene: int) -> tuple[Any, ...]:
        options = space.genes[gene].options
        networks = (space.build([level if g == gene else 0 for g in range(4)]) for level in range(len(options)))
        refused = [checkpoint.uniform_refusal(s.model.config, s.family, sub) for sub in networks]
        return tuple(option for option, reason in zip(options, refused, strict=True) if reason is None)

    return replace(space, attention=(held(0),) * space.n_layers, depths=held(2), hidden=held(3))


def space_of_run(s: Session) -> Space:
    """The space that a run's training draws from."""
    c = s.config
    return grid_of(s.model.config, c.train.space, layer_order=s.layer_order, mlp_step=c.search.mlp_step)


def widest_space(s: Session) -> SearchSpace:
    """The space that is searched, before anything is known of the importance of layers."""
    return _space(s, list(range(len(s.stream))))


def _price_of_layers(curves: Sequence[sensitivity.Curve], n_layers: int) -> list[int]:
    """Layers in the order of what dropping them whole costs, the dearest first."""
    price = {i: sum(curve.nats[-1] for curve in curves if curve.layer == i) for i in range(n_layers)}
    return sorted(price, key=lambda i: price[i], reverse=True)


def check_request(s: Session, own_table: bool = True) -> None:
    """Refuse, before any long work, what cannot be reached: targets outside the space, a uniform export that the
    family's stock configuration cannot hold. Where targets are times, the table of this device is fetched or measured;
    own_table: and becomes the run's.
    """
    c, text = s.config.search, s.config.calibration
    if not s.run.done("tokens.safetensors"):
        calibration.check(text.source, text.samples + text.holdout, column=text.column)
        check_length(s.model, text.length)
    if s.config.uniform and (refusal := checkpoint.uniform_refusal(s.model.config, s.family, s.whole)):
        raise UserError(refusal)
    kept = sum(t.value if t.kind == "keep" else 1.0 for t in s.config.targets)
    s.run.require_space(
        int(2 * kept * costs.n_bytes(s.layout, s.whole, s.width)), "the checkpoints and their refitted weights"
    )
    space = widest_space(s)
    if s.config.search.workers > 1 and not s.config.search.storage:
        raise UserError(
            f"search.workers is {s.config.search.workers}, but a run directory takes one process at a time; give each "
            "its own --out, and --storage FILE.journal (or a database's URL) for what they share"
        )
    _check_trained_space(s, space)
    if is_url(c.storage):
        database(str(c.storage))
    if s.config.constraint in TIMES:
        runtimes.check(s.model, s.family, s.config.budget, space)
        s.timetable = timetable_of(s) if own_table else _measured_table(s)
    for target in s.config.targets:
        if target.kind == "keep":
            space.window(s.cost, target.value, of=s.cost(s.whole), slack=slack(s))
        else:
            check_reach(s, space, target)


def _check_trained_space(s: Session, space: SearchSpace) -> None:
    """What a search in the space of the training cannot do."""
    c = s.config
    if c.search.space != "trained":
        return
    if len(space.hidden) > 1 and c.constraint in TIMES:
        raise UserError(
            f"times are measured at the model's own hidden size, but --space {c.train.space} has {len(space.hidden)}; "
            "give --keep or --memory-mb, or --space groups"
        )
    if c.uniform and not space.uniform:
        raise UserError(f"--uniform wants all layers alike, but in --space {c.train.space} each has widths of its own")
    asked = searchable(space_of_run(s), s.model.config, mlp_step=c.search.mlp_step)
    if c.uniform and not s.family.stock_heads and len(set(asked.attention[0])) > 1:
        raise UserError(
            f"--uniform: a stock configuration of this family cannot lose heads, but --space {c.train.space} cuts "
            "them; leave --uniform out, or take --space llama"
        )
    if c.search.method == "shen" and (space.uniform or len(space.hidden) > 1):
        raise UserError("--search shen chooses for every layer by itself; leave --search-space trained out")


def timetable_of(s: Session) -> Timetable:
    """The table that this run goes by: the run's own, so that the same command again decides alike."""

    def save(table: Timetable, path: Path) -> None:
        path.write_text(table.to_json(), encoding="utf-8")

    def load(path: Path) -> Timetable:
        return Timetable.from_json(path.read_text(encoding="utf-8"))

    return s.run.do("search", "latency.json", lambda: _measured_table(s), save=save, load=load)


def _measured_table(s: Session) -> Timetable:
    return runtimes.measure(s.model, s.family, s.config.budget, progress=s.progress)


def check_reach(s: Session, space: SearchSpace, target: Target) -> None:
    """A budget that no network meets, or that the dense model meets, raises UserError with the reachable range."""
    batch, dense = s.config.budget.batch, s.cost(s.whole)
    least, most = space.reach(s.cost)
    limit = target.limit(dense, batch)
    if least <= limit <= dense * (1 + 1e-9) and limit * (1 - slack(s)) <= most:
        return
    ends = sorted(target.worth(cost, dense, batch) for cost in (least, min(most, dense)))
    if s.timetable is None:
        where = f"with {s.context} tokens of context for {batch} sequences in {s.dtype}".replace("torch.", "")
    else:
        where = (
            f"on this device ({s.timetable.key['device']}; {s.request.batch} x {s.request.prompt} tokens of prompt, "
            f"{s.request.generate} generated)"
        )
    easy = "the dense model meets it already" if limit > dense else "no network of this search space meets it"
    raise UserError(
        f"{target.name}: {easy}. {UNITS[target.kind].capitalize()} go from {ends[0]:.4g} to {ends[1]:.4g} {where}; "
        "choose a value in this range"
    )


def slack(s: Session) -> float:
    """How far below its budget a network may stay; uniform spaces have coarse steps: all layers change at once."""
    c = s.config.search
    return max(c.slack, 2 * c.mlp_step / s.whole.layers[0].mlp) if s.alike else c.slack


def _windows(ids: Tensor, most: int = WINDOW) -> Tensor:
    """The tokens in windows of at most `most`, as many as fit."""
    length = min(most, ids.shape[1])
    per_row = ids.shape[1] // length
    return ids[:, : per_row * length].reshape(-1, length)


def _stacked(order: Tensor | list[Tensor]) -> Tensor:
    return (torch.stack(list(order)) if isinstance(order, list) else order).cpu().contiguous()


def _counted(s: Session, advance: Callable[[int], None], passes: int) -> Callable[[int], None]:
    """Progress that also counts forward tokens; a backward pass counts as two forwards."""

    def step(n: int) -> None:
        advance(n)
        s.run.count_tokens(passes * n)

    return step


def _move(folder: Path, target: Path) -> None:
    os.replace(folder, target)
