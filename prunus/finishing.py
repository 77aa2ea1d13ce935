"""Floor 5: the step `extract`: refit the chosen networks, and save them as checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from prunus.models import checkpoint, costs, memory
from prunus.models.slicing import Override, extract
from prunus.recording.artefact import load_tensors
from prunus.reforming import sequential
from prunus.steps import MICRO, Prepared, Session, openings
from prunus.subnetwork import SubNetwork

COMPARED = 4  # held-out windows, the last ones, on which a whole network is compared before and after the pass
JUDGED, SHORT = 4, 512  # held-out windows, the first ones, and their tokens, by which layers take refitted weights


def refit(s: Session, p: Prepared, ids: Tensor, chosen: Mapping[str, SubNetwork]) -> None:
    """Write the weights of every chosen network (`stored`): one-shot, or after the sequential pass if that is better.

    Those that are missing travel together (the dense model then runs once for all), as many as there is memory for.
    """
    paths = {name: f"weights/{name}.safetensors" for name in chosen}
    inputs = {name: {"subnetwork": sub.key()} for name, sub in chosen.items()}
    missing = [name for name in chosen if not s.run.done(paths[name], inputs[name])]
    made: dict[str, dict[str, Tensor]] = {}

    def compute(name: str) -> dict[str, Tensor]:
        if name not in made:
            made.clear()
            rest = {n: chosen[n] for n in missing[missing.index(name) :]}
            made.update(_refit_missing(s, p, ids, _together(s, rest)))
        return {key: weight.to(s.dtype) for key, weight in made.pop(name).items()}

    for name in missing:
        s.run.do("extract", paths[name], lambda name=name: compute(name), inputs=inputs[name])  # type: ignore[misc]


def _together(s: Session, rest: Mapping[str, SubNetwork]) -> dict[str, SubNetwork]:
    """The first networks of `rest`, as many as half of the free memory holds the weights of; one at least."""
    free, need = memory.available(str(s.device)), 0
    width, found = next(s.model.parameters()).element_size(), dict[str, SubNetwork]()
    for name, sub in rest.items():
        need += width * costs.parameters(s.layout, sub, "blocks")
        if found and free is not None and need > free / 2:
            break
        found[name] = sub
    return found


def stored(s: Session, name: str) -> Override:
    """The weights that `refit` has written of a network."""
    return loaded_weights(s, load_tensors(s.run.path(f"weights/{name}.safetensors")))


def _refit_missing(
    s: Session, p: Prepared, ids: Tensor, chosen: Mapping[str, SubNetwork]
) -> dict[str, dict[str, Tensor]]:
    r = s.config.reform
    one_shot = {name: dict(p.database(sub)) for name, sub in chosen.items()}
    p.database.forget()
    found = {name: named(weights) for name, weights in one_shot.items()}
    chosen = {name: sub for name, sub in chosen.items() if sub.hidden == s.whole.hidden}  # others have no dense target
    if r.method == "none" or not r.sequential or not chosen:
        return found
    settings = sequential.SequentialSettings(
        drift=r.drift, damping=r.sequential_damping, reader_damping=r.readers, micro=MICRO
    )
    first = openings(s, ids)
    ids = ids[: r.sequential_samples]
    n = len(s.stream)
    with s.progress("sequential pass", n * len(chosen) * ids.numel()) as advance:

        def step(tokens: int) -> None:
            advance(tokens)
            s.run.count_tokens(round(tokens * 2.4 / n))

        pairs = [(sub, one_shot[name]) for name, sub in chosen.items()]
        assert p.objective.holdout is not None
        judge = sequential.Judge(s.stream, p.objective.holdout[:JUDGED, :SHORT], pairs)
        refitted = sequential.refit_all(s.stream, ids, pairs, settings, openings=first, accept=judge, advance=step)
    for (name, sub), fitted, taken in zip(chosen.items(), refitted, judge.taken, strict=True):
        new = {key: rounded(s, fitted.pop(key)) for key in list(fitted)}  # one at a time: it is a network's weights
        at_last = holdout_nats(s, p, sub, new)
        at_first = holdout_nats(s, p, sub, one_shot[name], COMPARED)
        before, after = fmean(at_first), fmean(at_last[-COMPARED:])
        figures = {
            "one_shot_nats": before,
            "sequential_nats": after,
            "layers_halved": taken[1],
            "layers_refused": taken[2],
        }
        s.run.note(f"sequential/{name}", figures)
        if after < before:
            found[name], s.nats[name] = named(new), at_last
    return found


def holdout_nats(s: Session, p: Prepared, sub: SubNetwork, weights: Override, last: int = 0) -> list[float]:
    """KL of one network on the `last` held-out windows; 0: on all of them.

    The dense model's states are kept from question to question.
    """
    held = replace(p.objective, weights=lambda _: weights, kind="kl", forward_tokens=0.0)
    assert held.holdout is not None
    values = held.measure([sub], range(len(held.holdout))[-last:], holdout=True)[0]
    s.run.count_tokens(int(held.forward_tokens))
    return values


def named(weights: Override) -> dict[str, Tensor]:
    """Weights as a safetensors file names them: `layer|path`."""
    return {f"{i}|{path}": weight.cpu().contiguous() for (i, path), weight in weights.items()}


def loaded_weights(s: Session, found: Mapping[str, Tensor]) -> Override:
    """What such a file holds, rounded as it is stored, on the model's device and in the type that it computes in."""
    own = next(s.model.parameters()).dtype
    return {address(key): rounded(s, weight).to(s.device, own) for key, weight in found.items()}


def rounded(s: Session, weight: Tensor) -> Tensor:
    """A weight as a checkpoint will hold it, in the type that it has here."""
    return weight.to(s.dtype).to(weight.dtype)


def address(key: str) -> tuple[int, str]:
    """The inverse: layer and path."""
    i, _, path = key.partition("|")
    return int(i), path


def save_network(
    s: Session,
    name: str,
    sub: SubNetwork,
    weights: Callable[[], Override],
    card: str,
    manifest: dict[str, Any],
    step: str = "extract",
) -> Path:
    """Extract one network and save it as a checkpoint `models/<name>/`; its weights are gone before it is written."""
    uniform = True if s.config.uniform else None

    def compute() -> nn.Module:
        return extract(s.model, s.family, sub, weights(), uniform=uniform)

    def save(model: nn.Module, path: Path) -> None:
        checkpoint.save(
            model, s.tokenizer, path, card=card, manifest=manifest, generation_config=s.generation_config, dtype=s.dtype
        )

    inputs = {"subnetwork": sub.key(), "weights": s.run.sha256(f"weights/{name}.safetensors"), "card": card}
    s.run.do(step, f"models/{name}", compute, save=save, load=lambda path: nn.Identity(), inputs=inputs)
    return s.run.path(f"models/{name}")
