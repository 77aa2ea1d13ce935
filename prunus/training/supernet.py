"""Floor 5: the step `train`: the sorted super-network learns so that its prefixes are good networks by themselves.

It starts from the sorted dense weights: reformed weights differ from level to level, so no one super-network holds
them. What comes after (errors, search, reformation, the sequential pass) works on the trained weights as on a dense
model's.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunus import launched, machine
from prunus.errors import UserError
from prunus.evaluation import perplexity
from prunus.models import checkpoint, costs
from prunus.models.families import full
from prunus.models.precision import cast
from prunus.models.slicing import activate, sort
from prunus.recording.artefact import load_json, remove, write_text
from prunus.reforming import levels
from prunus.scoring import importance
from prunus.searching.grids import Space, cuts_hidden
from prunus.searching.objective import Divergence
from prunus.searching.space import Cost
from prunus.steps import Session, measure_moments, sort_model, space_of_run
from prunus.subnetwork import SubNetwork
from prunus.texts.instructions import Windows, windows_of
from prunus.training import adapters, draws, meeting, states
from prunus.training.nested import Nested
from prunus.training.teaching import Teacher

if TYPE_CHECKING:
    from prunus.training.loop import Job

WATCHED = (1.0, 0.5, 0.0)  # how far up its pool the networks stand that are watched while training
log = logging.getLogger(__name__)


def check(s: Session, anew: bool = False) -> None:
    """Raise UserError for what the training cannot do, before any long work; nothing where it is done already.

    anew: it will be done again.
    """
    c = s.config.train
    text = s.config.test_text
    if text and Path(text).resolve() == Path(str(c.data)).resolve():
        raise UserError(f"{text!r} is test text and training text at once; figures on it would mean nothing")
    if s.run.done("supernet") and not anew:
        return
    from prunus.training.telling import check_installed  # transformers' Trainer takes seconds to import

    if c.strategy == "standard" and c.teacher == "dense" and not c.ce:
        raise UserError(
            "the full network, which --strategy standard trains, is its teacher at the beginning, so that it would "
            "learn nothing by imitating it; give --ce, --teacher in-place, or another --strategy"
        )
    check_installed(c.report_to)
    states.refuse_processes(s.run.path("training"), launched.processes())
    paths = adapters.check(s.model, s.family, c.adapt) if c.rank else []
    ends = (sum(s.model.get_submodule(path).weight.shape) for path in paths)  # type: ignore[arg-type]
    n_trained = c.rank * sum(ends) if c.rank else sum(p.numel() for p in s.model.parameters())
    states.refuse_full_disk(s.run.path("training"), n_trained)
    space = space_of_run(s)
    draws.refuse_empty(
        space, _cost(s), _sampler(s), bins=c.bins, trials=c.trials, seed=s.config.seed,
        least=c.least * _cost(s)(space.largest()),
    )  # fmt: skip
    windows(s)


def windows(s: Session) -> tuple[Windows, Windows | None]:
    """The windows that a run trains on, and those that are held out, if any."""
    positions = getattr(s.model.config, "max_position_embeddings", None)
    return windows_of(s.config.train, s.tokenizer, positions, s.config.seed)


def train(s: Session, ids: Tensor, orders: dict[str, Tensor]) -> dict[str, Tensor]:
    """Train the super-network of a run (**in place**), or load it; returns the orders that are left: none.

    ids: calibration windows; the second moments that reformation needs are taken anew from the trained weights.
    """
    orders = _sort(s, ids, orders)
    space = space_of_run(s)

    def load(path: Path) -> nn.Module:
        from safetensors.torch import load_file

        state = {key: value for file in sorted(path.glob("*.safetensors")) for key, value in load_file(file).items()}
        missing, unexpected = s.model.load_state_dict(state, strict=False)
        tied = set(getattr(s.model, "all_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise UserError(f"{str(path)!r} holds another model; delete it, and the step is done again")
        return s.model

    def save(model: nn.Module, path: Path) -> None:
        manifest = {
            "source": dict(s.run.source),
            "train": s.run.notes.get("train"),
            "environment": machine.environment(),
        }
        checkpoint.save(
            model, s.tokenizer, path, card=_card(s), manifest=manifest, generation_config=s.generation_config,
            dtype=s.dtype,
        )  # fmt: skip

    s.run.do("train", "supernet", lambda: _train(s, ids, orders, space), save=save, load=load)
    meeting.part()
    _clear_states(s)
    s.tier = "-trained"
    measure_moments(s, ids, "train")
    return levels.unsorted(s.model)


def _clear_states(s: Session) -> None:
    """States of a finished training are of no more use, and large; its log stays."""
    for path in (*s.run.path("training").glob("checkpoint-*"), *s.run.path("training").glob("teacher-*")):
        remove(path)


def _sort(s: Session, ids: Tensor, orders: dict[str, Tensor]) -> dict[str, Tensor]:
    """Most important members first, hidden channels too where sub-networks may drop some; and the order of layers.

    Returns the orders that were taken: where `train.sort` is false, those in which everything stays where it is.
    """
    if not s.config.train.sort:
        orders = levels.unsorted(s.model)
    sort_model(s, orders)

    def units() -> dict[str, Tensor]:
        if not s.config.train.sort:
            return {"hidden": torch.arange(s.whole.hidden), "layers": torch.arange(len(s.whole.layers))}
        with s.progress("order of layers and hidden channels"):
            found = importance.score(s.model, s.family, ids[:8], method="activation")
        hidden = found.order()["hidden"]
        assert isinstance(hidden, Tensor)
        return {"hidden": hidden.contiguous(), "layers": found.blocks.argsort(descending=True).contiguous()}

    order = dict(s.run.do("train", "units.safetensors", units))
    s.layer_order = order.pop("layers").tolist()
    if cuts_hidden(space_of_run(s)):
        sort(s.model, s.family, order)
    return orders


def join(s: Session, ids: Tensor, orders: dict[str, Tensor]) -> None:
    """Train beside the first process, which does everything else of the run; `s.run` is only read."""
    from prunus.training.loop import fit

    orders = _sort(s, ids, orders)
    fit(_job(s, ids, orders, space_of_run(s), _folder(s))[0])


def _folder(s: Session) -> Path:
    """Where the training keeps its states: they outlive a change of its own settings, and no change before it."""
    return s.run.grow("score", "training")


def _train(s: Session, ids: Tensor, orders: Mapping[str, Tensor], space: Space) -> nn.Module:
    from prunus.training.loop import arguments, fit, identity, trainer_steps

    dtype = next(s.model.parameters()).dtype
    folder = _folder(s)
    folder.mkdir(exist_ok=True)
    anew = not s.run.done("pool.json")
    job, pool = _job(s, ids, orders, space, folder)
    if anew:  # the step was undone on purpose; a training may go on with eased settings, others begin again
        differs = states.differing(folder, identity(job, launched.processes()))
        if not differs or {*differs} - {*states.EASED}:
            if differs and (old := states.last(folder)):
                log.warning(
                    "the training begins again, and its state after step %d goes: other %s than there",
                    states.step_of(old), ", ".join(differs),
                )  # fmt: skip
            for path in folder.glob("checkpoint-*"):
                remove(path)
    meeting.call()
    with s.progress("training", trainer_steps(job, arguments(job))) as advance:
        job.advance = advance
        fitted = fit(job)
    assert job.draw is not None
    s.run.count_tokens(fitted.tokens * 3 * len(job.draw(random.Random(0))))  # a backward counts as two forwards
    adapters.merge(s.model)
    cast(s.model, dtype)
    s.run.note(
        "train",
        {
            "data": Path(str(s.config.train.data)).name, "windows": len(job.windows), "tokens": fitted.tokens,
            "steps": fitted.steps, "seconds": fitted.seconds, "processes": launched.processes(),
            **({"eased": fitted.eased} if fitted.eased else {}),
            "truncated_rows": job.windows.truncated, "skipped_rows": job.windows.skipped,
            "pool": len(pool.networks), "empty_bins": len(pool.empty), "bins": len(pool.bins),
            "held_out": [row for row in fitted.history if "eval_loss" in row],
            "versions": machine.versions(*machine.TRAINING),
        },
    )  # fmt: skip
    return s.model


def _job(s: Session, ids: Tensor, orders: Mapping[str, Tensor], space: Space, folder: Path) -> tuple[Job, draws.Pool]:
    """What is trained, in every process alike, and the networks that are drawn."""
    from prunus.training.loop import Job

    c = s.config.train
    some, holdout = windows(s)
    pool = _pool(s, ids, orders, space)
    teacher = None
    if c.teacher == "dense":
        dense = copy.deepcopy(s.model)
        teacher = Teacher(dense, folder, some.ids, _name_of_dense(s, space))
    if c.rank:
        adapters.attach(
            s.model, s.family, rank=c.rank, alpha=c.alpha, dropout=c.dropout, adapted=c.adapt, seed=s.config.seed
        )
    else:
        s.model.float()
    job = Job(
        s.model, s.family, some, c, folder, seed=s.config.seed, teacher=teacher, holdout=holdout,
        draw=draws.draw_of(space, pool, c.strategy, c.n_drawn), watched=_watched(s, space, pool),
        weights=Nested(s.model, s.family, sort_model(s, orders)) if c.reformed else None,
        belongs_to={"model": s.run.source.get("sha256"), "pool": [space.key(), *(n.key() for n in pool.networks)]},
    )  # fmt: skip
    return job, pool


def _name_of_dense(s: Session, space: Space) -> str:
    """What tells the hidden states of the dense model from others: its channels may have been sorted."""
    order = s.run.path("units.safetensors").read_bytes() if cuts_hidden(space) else b""
    return hashlib.sha256(f"{s.run.source.get('sha256')}".encode() + order).hexdigest()


def _pool(s: Session, ids: Tensor, orders: Mapping[str, Tensor], space: Space) -> draws.Pool:
    """The networks that are drawn, from the run where they were chosen before."""
    c, sampler, cost = s.config.train, _sampler(s), _cost(s)

    def choose() -> dict[str, Any]:
        n = 0 if sampler in ("random", "grid") else c.bins
        with s.progress(f"networks to train, {sampler}", n) as advance:
            found = draws.pool_of(
                space, cost, sampler, bins=c.bins, draws=c.draws, trials=c.trials, seed=s.config.seed,
                least=c.least * cost(space.largest()), score=_score(s, ids, orders, sampler), advance=advance,
            )  # fmt: skip
        if found.empty:
            named = ", ".join(f"{low / 1e6:.3g}-{high / 1e6:.3g}" for low, high in found.empty)
            log.warning(
                "%d of %d bins of sizes hold no network after %d draws: %s million parameters",
                len(found.empty), len(found.bins), found.attempts, named,
            )  # fmt: skip
        return {
            "networks": [sub.to_json() for sub in found.networks],
            "bins": [_as_data(b) for b in found.bins],
            "attempts": found.attempts,
            "histogram": {} if c.strategy == "standard" else {
                "random": draws.histogram(space, cost, None, seed=s.config.seed),
                "pool": draws.histogram(space, cost, found, seed=s.config.seed) if found.networks else [],
                "least": cost(space.smallest()), "most": cost(space.largest()), "sampler": sampler,
                "empty": found.empty, "bins": len(found.bins), "attempts": found.attempts,
            },
        }  # fmt: skip

    raw = s.run.do("train", "pool.json", lambda: _once(s, space, sampler, choose))
    bins = tuple(
        draws.Bin(b["low"], b["high"], (), SubNetwork.from_json(b["chosen"]) if b["chosen"] else None)
        for b in raw["bins"]
    )
    return draws.Pool(tuple(SubNetwork.from_json(text) for text in raw["networks"]), bins, raw["attempts"])


def _sampler(s: Session) -> draws.Sampler:
    """How networks are drawn; a training of the full network alone draws none."""
    asked: draws.Sampler = s.config.train.sampler  # type: ignore[assignment]
    return "random" if s.config.train.strategy == "standard" else asked


def _cost(s: Session) -> Cost:
    """What bins are made of: all parameters."""
    return lambda sub: float(costs.parameters(s.layout, sub, "all"))


def _once(s: Session, space: Space, sampler: str, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A pool as it was chosen for these very settings, which a change of others (a lower `--lr`) leaves as it is."""
    c = s.config.train
    asked = [space.key(), c.strategy == "standard", sampler, c.sort, c.bins, c.draws, c.trials, c.least, s.config.seed]
    file = _folder(s) / "pool.json"
    if file.is_file() and (kept := load_json(file))["asked"] == asked:
        found: dict[str, Any] = kept["pool"]
        return found
    found = choose()
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps({"asked": asked, "pool": found}))
    return found


def _as_data(one: draws.Bin) -> dict[str, Any]:
    chosen = one.chosen.to_json() if one.chosen else None
    return {"low": one.low, "high": one.high, "candidates": len(one.candidates), "chosen": chosen}


def _score(s: Session, ids: Tensor, orders: Mapping[str, Tensor], sampler: str) -> draws.Score | None:
    """What the best network of a bin is chosen by; reformed where it is ours and no hidden channel goes."""
    if sampler == "calibrated-magnitude":
        return draws.magnitude(s.model, s.family)
    if not sampler.startswith("calibrated"):
        return None
    windows = ids[:2, : min(512, ids.shape[1])]
    if sampler == "calibrated-ppl":

        def ppl(sub: SubNetwork) -> float:
            s.run.count_tokens(windows.numel())
            with activate(s.model, s.family, sub):
                return perplexity(s.model, windows.flatten(), length=windows.shape[1], bos=False).nats

        return ppl
    database = sort_model(s, orders)
    kl = Divergence(s.stream, windows, database, windows=(len(windows),), seed=s.config.seed)

    def nats(sub: SubNetwork) -> float:
        kl.forward_tokens = 0.0
        found = sum(kl.measure([sub], range(len(windows)))[0])
        s.run.count_tokens(round(kl.forward_tokens))
        return found

    return nats


def _watched(s: Session, space: Space, pool: draws.Pool) -> dict[str, SubNetwork | None]:
    """A few networks from the largest to the smallest."""
    rng = random.Random(f"watched {s.config.seed}")
    some = pool.networks or (space.smallest(), space.sample(rng), space.largest())
    ranked = sorted(some, key=lambda sub: costs.parameters(s.layout, sub, "all"))
    chosen = {ranked[round(share * (len(ranked) - 1))] for share in WATCHED} | {full(s.model.config)}
    return {f"{costs.parameters(s.layout, sub, 'all') / 1e6:.1f}M": sub for sub in chosen}


def _card(s: Session) -> str:
    note = s.run.notes.get("train", {})
    return f"""# A trained super-network: {s.run.source.get("id")}

Its heads, neurons and channels are sorted, most important first, and it was trained on {note.get("tokens", 0):,}
tokens of {note.get("data")} so that its prefixes are good networks by themselves.
It is an ordinary checkpoint of the full size.
"""


__all__ = ["check", "join", "train", "windows"]
