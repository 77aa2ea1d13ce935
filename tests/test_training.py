"""Training: a sandwich's gradients are sums, resuming changes nothing, two processes are one with twice the batches."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIGS, ragged, tiny, tokens
from torch.utils.flop_counter import FlopCounterMode

from prunus.errors import UserError
from prunus.models.families import family_of, full
from prunus.models.slicing import activate, extract
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.texts.instructions import Windows
from prunus.training import adapters, states, teaching
from prunus.training.learning import TrainConfig
from prunus.training.loop import Job, fit
from prunus.training.teaching import Teacher

CONFIG = TrainConfig(
    length=16, batch=2, steps=4, precision="float32", save_every=2, log_every=1, lr=1e-3, warmup=1, holdout=0
)


def windows(n: int = 24) -> Windows:
    ids = tokens(n, 16, seed=5)
    labels = ids.clone()
    labels[:, 0] = -100
    labels[::3, 5:9] = -100
    return Windows(ids, labels)


def job(out: Path, name: str = "llama", subs: list[SubNetwork | None] | None = None, **more: Any) -> Job:
    model: Any = tiny(name)
    config = more.pop("config", CONFIG)
    family = family_of(model.config)
    if config.rank:
        torch.manual_seed(3)
        adapters.attach(model, family, rank=config.rank, adapted=config.adapt, dropout=config.dropout)
    drawn = subs if subs is not None else [None, ragged(model.config), ragged(model.config, seed=4)]
    return Job(model, family, windows(), config, out, draw=lambda rng: drawn, **more)


def calm(model: Any) -> Any:
    """The model without dropout, which OPT and GPT-2 have by default."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def losses(history: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in history if "loss" in row]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_one_sandwich_step_is_the_sum_of_its_networks(name: str, tmp_path: Path) -> None:
    """One step of plain SGD-like size: the first AdamW step depends on the gradient's sign; compare the gradients."""
    one = job(tmp_path, name, config=replace(CONFIG, steps=1, kd=0.7, ce=0.3, temperature=1.3, clip=0.0))
    seen: dict[str, torch.Tensor] = {}
    calm(one.model)
    dense: Any = calm(tiny(name))
    subs = one.draw(random.Random(0))  # type: ignore[misc]

    class Stop(Exception):
        pass

    import prunus.training.loop as training

    class Watching(training.SandwichTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            loss = super().training_step(model, inputs, num_items_in_batch)
            seen.update({n: p.grad.clone() for n, p in self.network.model.named_parameters() if p.grad is not None})
            seen["ids"], seen["labels"], seen["loss"] = inputs["input_ids"], inputs["labels"], loss
            raise Stop

    original = training.SandwichTrainer
    training.SandwichTrainer = Watching  # type: ignore[misc]
    try:
        with pytest.raises(Stop):
            fit(one)
    finally:
        training.SandwichTrainer = original  # type: ignore[misc]
    ids, labels = seen.pop("ids"), seen.pop("labels")
    loss_found = seen.pop("loss")
    wanted = labels[:, 1:] != -100
    total = 0.0
    dense.train()

    def picked(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, :-1][wanted].float()

    reference = None
    for sub in subs:
        with activate(dense, one.family, sub or full(dense.config)):
            logits = picked(dense(input_ids=ids, use_cache=False).logits)
            ce = torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="sum")
            if reference is None:
                loss, reference = ce, logits.detach()
            else:
                p, q = (torch.log_softmax(x / 1.3, -1) for x in (reference, logits))
                loss = 0.3 * ce + 0.7 * 1.3**2 * (p.exp() * (p - q)).sum()
            loss = loss / int(wanted.sum()) / 3
            loss.backward()
            total += float(loss.detach())
    assert float(loss_found) == pytest.approx(total, rel=1e-4)
    for key, p in dense.named_parameters():
        if p.grad is not None:
            assert torch.allclose(seen[key], p.grad, atol=1e-5 + 1e-3 * float(p.grad.abs().max())), key


@pytest.mark.parametrize("rank", [0, 2])
def test_a_resumed_training_is_the_uninterrupted_one(rank: int, tmp_path: Path) -> None:
    config = replace(CONFIG, rank=rank, dropout=0.1 if rank else 0.0, steps=6, accumulation=2)
    whole = job(tmp_path / "whole", config=config)
    first = fit(whole)

    class Killed(Exception):
        pass

    broken = job(tmp_path / "broken", config=config)

    def kill(n: int) -> None:
        kill.steps += 1  # type: ignore[attr-defined]
        if kill.steps == 5:  # type: ignore[attr-defined]
            raise Killed

    kill.steps = 0  # type: ignore[attr-defined]
    with pytest.raises(Killed):
        fit(replace(broken, advance=kill))
    kept = states.last(tmp_path / "broken")
    assert kept is not None
    assert kept.name == "checkpoint-4"
    before = float((kept / "seconds.txt").read_text())
    (tmp_path / "broken" / "checkpoint-99").mkdir()  # a state that was not written whole does not count
    steps: list[int] = []
    again = job(tmp_path / "broken", config=config, advance=steps.append)
    second = fit(again)
    assert steps == [4, 1, 1]
    assert losses(second.history) == losses(first.history)
    assert second.seconds > before > 0
    wanted = weights(whole.model)
    for name, p in weights(again.model).items():
        assert torch.equal(p, wanted[name]), name
    third = job(tmp_path / "broken", config=config)  # nothing is left to do
    done = fit(third)
    assert done.steps == 6
    assert done.seconds > 0
    assert all(torch.equal(p, wanted[n]) for n, p in weights(third.model).items())


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    fit(job(tmp_path))
    with pytest.raises(UserError, match=r"other settings: lr \(0.001, now 0.002\)"):
        fit(job(tmp_path, config=replace(CONFIG, lr=2e-3)))
    with pytest.raises(UserError, match=r"other settings: seed \(0, now 1\)"):
        fit(job(tmp_path, seed=1))
    with pytest.raises(UserError, match="other settings: model"):
        fit(job(tmp_path, belongs_to={"model": "b"}))
    record = json.loads((tmp_path / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps({**record, "processes": 4}))
    with pytest.raises(UserError, match=r"processes \(4, now 1\)"):
        fit(job(tmp_path))


def after(step: int, do: Any) -> Any:
    """What `advance` is told of every step; after this one it does something."""
    seen = iter(range(1, 99))
    return lambda n: do() if next(seen) == step else None


def spoil(model: Any) -> None:
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = float("nan")


def stopped(one: Job, words: str) -> None:
    """The training ends with these words, and the newest state is the one of step 2, which is whole and finite."""
    with pytest.raises(UserError, match=rf"{words}.*the last good state is .*checkpoint-2"):
        fit(one)
    kept = states.last(one.out)
    assert kept == one.out / "checkpoint-2"
    assert all(bool(torch.isfinite(t).all()) for t in load_file(kept / "trainable.safetensors").values())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    one = job(tmp_path)
    one.advance = after(3, lambda: spoil(one.model))
    stopped(one, "the loss is nan at step 4, in the full network")


def test_weights_that_are_not_finite_are_no_state(tmp_path: Path) -> None:
    one = job(tmp_path)
    one.advance = after(4, lambda: spoil(one.model))  # a step that saves
    stopped(one, "up_proj.weight is not finite after step 4")


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_is_refused_before_the_step(clip: float, tmp_path: Path) -> None:
    one = job(tmp_path, config=replace(CONFIG, clip=clip))
    weight, bad = one.model.get_parameter("model.layers.1.mlp.up_proj.weight"), float("inf")
    one.advance = after(3, lambda: weight.register_hook(lambda g: g * bad))  # of step 4, which saves
    stopped(one, "the norm of the gradient is (inf|nan) at step 4")
    assert all(bool(torch.isfinite(p).all()) for p in one.model.parameters())


def test_a_loss_of_a_sub_network_is_told_with_its_size_and_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prunus.training.loop as training

    whole = full(tiny("llama").config)
    sub = SubNetwork(48, (whole.layers[0], LayerShape(2, 1, 7), LayerShape(0, 0, 80), LayerShape(4, 2, 0)))
    one = job(tmp_path, subs=[None, sub])
    real = training.divergence  # which only sub-networks have

    def spoilt(*given: Any) -> torch.Tensor:
        return real(*given) * (float("nan") if (tmp_path / "checkpoint-2").exists() else 1.0)

    monkeypatch.setattr(training, "divergence", spoilt)
    n = sum(p.numel() for p in extract(one.model, one.family, sub).parameters())
    share = n / sum(p.numel() for p in one.model.parameters())
    words = f"{n:,} parameters, {share:.1%} of all: hidden size 48, 2 to 8 query heads in 3 and 7 to 80 neurons in 3 of"
    stopped(one, rf"the loss is nan at step 3, in sub-network 1 of the step \({words} 4 layers; {sub.key()}\)")


@pytest.mark.parametrize("eased", [{"lr": 1e-4}, {"warmup": 3.0}, {"lr": 2e-4, "warmup": 0.5}])
def test_a_training_goes_on_with_what_helps_against_nan(eased: dict[str, Any], tmp_path: Path) -> None:
    one = job(tmp_path, config=replace(CONFIG, steps=6))
    one.advance = after(3, lambda: spoil(one.model))
    stopped(one, "the loss is nan")
    config = replace(CONFIG, steps=6, **eased)
    found = fit(job(tmp_path, config=config))
    changes = {key: [getattr(CONFIG, key), value] for key, value in eased.items()}
    assert found.eased == [{"step": 2, **changes}]
    rates = {int(row["step"]): row["learning_rate"] for row in found.history if "learning_rate" in row}
    fresh = fit(job(tmp_path / "fresh", config=config)).history
    wanted = [row["learning_rate"] for row in fresh if "learning_rate" in row]
    assert [rates[step] for step in (3, 4, 5, 6)] == pytest.approx(wanted[2:])
    assert [rates[1], rates[2]] != pytest.approx(wanted[:2])
    assert fit(job(tmp_path, config=config)).eased == found.eased  # done, and still told
    with pytest.raises(UserError, match="other settings: lr"):
        fit(job(tmp_path, config=replace(config, lr=5e-5)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "qwen2"])
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_every_sub_network_merge_into_it(name: str, tmp_path: Path) -> None:
    config = replace(CONFIG, rank=3, steps=3, lr=1e-2, adapt="linear")
    one = job(tmp_path, name, config=config)
    before = {n: p for n, p in weights(one.model).items() if "lora_" not in n}
    fit(one)
    after = weights(one.model)
    assert all(torch.equal(after[n], p) for n, p in before.items())  # only adapters were trained
    ids = tokens()
    subs = [full(one.model.config), ragged(one.model.config), ragged(one.model.config, seed=9, hidden=False)]
    adapted = []
    with torch.no_grad():
        for sub in subs:
            with activate(one.model, one.family, sub):
                adapted.append(one.model(ids, use_cache=False).logits)
        adapters.merge(one.model)
        assert not any("lora_" in n for n, _ in one.model.named_parameters())
        for sub, wanted in zip(subs, adapted, strict=True):
            found = extract(one.model, one.family, sub)(ids, use_cache=False).logits
            assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max())), sub
    assert float((adapted[0] - tiny(name)(ids).logits).abs().max()) > 1e-3  # the training did something


def test_adapters_of_dropped_sub_layers_get_no_gradient(tmp_path: Path) -> None:
    model: Any = tiny("llama")
    whole = full(model.config)
    sub = SubNetwork(whole.hidden, (*whole.layers[:3], LayerShape(0, 0, 0)))
    one = job(tmp_path, subs=[sub], config=replace(CONFIG, rank=2, steps=2))
    before = weights(one.model)
    fit(one)
    changed = {n for n, p in weights(one.model).items() if not torch.equal(p, before[n])}
    assert changed
    assert not any("layers.3." in n for n in changed)


def test_tokens_are_those_of_the_windows_that_were_seen(tmp_path: Path) -> None:
    """24 windows in steps of 10: the third step of an epoch has 4."""
    config = replace(CONFIG, batch=5, accumulation=2, steps=None, epochs=1)
    for epochs, steps, seen in ((1, 3, 24), (2, 6, 48), (1.5, 5, 44)):
        fitted = fit(job(tmp_path / str(epochs), config=replace(config, epochs=epochs)))
        assert (fitted.steps, fitted.tokens) == (steps, seen * 16)


def test_adapters_begin_with_the_same_weights_for_the_same_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        model: Any = tiny("llama")
        before = torch.get_rng_state()
        adapters.attach(model, family_of(model.config), rank=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(next(p for name, p in model.named_parameters() if "lora_A" in name))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_losses_of_no_weight_are_refused() -> None:
    with pytest.raises(UserError, match=r"train.ce and train.kd are both 0"):
        replace(CONFIG, ce=0.0, kd=0.0)


@pytest.mark.parametrize("adapted", ["all", "embedding", "attention,head"])
def test_adapters_of_both_ends_are_refused_where_one_matrix_serves_them(adapted: str) -> None:
    model: Any = tiny("qwen2")
    with pytest.raises(UserError, match="use --adapt linear"):
        adapters.attach(model, family_of(model.config), rank=2, adapted=adapted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapted", ["all", "embedding", "head", "mlp, head"])
def test_embedding_and_head_can_be_adapted(adapted: str, tmp_path: Path) -> None:
    one = job(tmp_path, config=replace(CONFIG, rank=2, steps=3, lr=1e-2, adapt=adapted))
    before = weights(one.model)
    fit(one)
    changed = {name for name, p in weights(one.model).items() if not torch.equal(p, before[name])}
    assert any("embed_tokens.lora_" in name for name in changed) == (adapted in ("all", "embedding"))
    assert any("lm_head.lora_" in name for name in changed) == (adapted != "embedding")
    assert any("mlp.up_proj.lora_" in name for name in changed) == (adapted in ("all", "mlp, head"))
    sub = ragged(one.model.config)
    with torch.no_grad():
        with activate(one.model, one.family, sub):
            wanted = one.model(tokens(), use_cache=False).logits
        adapters.merge(one.model)
        found = extract(one.model, one.family, sub)(tokens(), use_cache=False).logits
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_a_teacher_keeps_nothing_where_the_disk_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))
    ids = tokens(3, 8)
    taught = Teacher(tiny("llama"), tmp_path, ids, "dense")
    assert taught.states is None and not any(tmp_path.iterdir())
    assert torch.equal(taught.hidden(torch.arange(3), ids), taught.compute(ids))


def test_a_network_learns_from_a_teacher_that_is_asked_once_for_each_window(tmp_path: Path) -> None:
    dense: Any = tiny("llama")
    family = family_of(dense.config)
    small: Any = extract(dense, family, ragged(dense.config, hidden=False))
    data = windows(8)
    teacher = Teacher(dense, tmp_path / "cache", data.ids, "dense")
    calls: list[int] = []
    compute = teacher.compute
    teacher.compute = lambda ids: (calls.append(len(ids)), compute(ids))[1]  # type: ignore[method-assign]
    config = replace(CONFIG, steps=None, epochs=30, lr=3e-3)
    one = Job(small, family, data, config, tmp_path / "out", teacher=teacher, holdout=windows(4))
    history = fit(one).history
    scored = [row["eval_network_kl"] for row in history if "eval_network_kl" in row]
    assert sum(calls) == 8 + 2 * 4  # the training windows once, the held-out ones before and after
    assert losses(history)[-1] < 0.5 * losses(history)[0]
    assert scored[-1] < scored[0]
    ids = data.ids[:2]
    assert torch.equal(teacher.hidden(torch.tensor([0, 1]), ids), compute(ids))


def test_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    plain, thrifty = job(tmp_path / "a"), job(tmp_path / "b", config=replace(CONFIG, checkpointing=True))
    assert losses(fit(thrifty).history) == pytest.approx(losses(fit(plain).history), rel=1e-5)


def test_a_sandwich_step_costs_what_its_networks_cost(tmp_path: Path) -> None:
    def cost(subs: list[SubNetwork | None], out: str) -> int:
        with FlopCounterMode(display=False) as counter:
            fit(job(tmp_path / out, subs=subs, config=replace(CONFIG, steps=1)))
        return int(counter.get_total_flops())

    config = tiny("llama").config
    subs: list[SubNetwork | None] = [None, ragged(config), ragged(config, seed=2), ragged(config, seed=3)]
    alone = sum(cost([sub], f"one{k}") for k, sub in enumerate(subs))
    assert alone <= cost(subs, "all") <= 1.1 * alone


def together(out: Path, accumulation: int, rank: int) -> Job:
    return job(out, config=replace(CONFIG, accumulation=accumulation, steps=3, rank=rank, kd=0.5, ce=0.5))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_training import fit, losses, together, weights
out = Path(sys.argv[1])
one = together(out, 1, int(sys.argv[2]))
history = fit(one).history
import os
if os.environ.get("RANK", "0") == "0":
    torch.save((losses(history), weights(one.model)), out / "found.pt")

import prunus.training.loop as training
from prunus.errors import UserError
if os.environ["RANK"] == "1":  # the other process's losses stay finite
    real = training.divergence
    training.divergence = lambda *a: real(*a) * float("nan")
try:
    fit(together(out / "spoilt", 1, int(sys.argv[2])))
except UserError as error:
    (out / ("said-" + os.environ["RANK"])).write_text(str(error))
"""


def test_two_processes_are_one_with_twice_the_accumulation(tmp_path: Path) -> None:
    """Adapters, in processes that import torch and start a group: some seconds. All weights: test_together.py."""
    rank = 2
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*launch, str(tmp_path / "two"), str(rank)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for said in ((tmp_path / "two" / f"said-{rank}").read_text() for rank in (0, 1)):
        assert re.match(r"the loss is nan at step 1, in sub-network 1 of the step \(.*\), in process 1 of 2;", said)
    two, w2 = torch.load(tmp_path / "two" / "found.pt")
    alone = together(tmp_path / "one", 2, rank)
    one, w1 = losses(fit(alone).history), weights(alone.model)
    assert two == pytest.approx(one, rel=1e-5)
    for name, p in w1.items():
        assert torch.allclose(p, w2[name], atol=1e-5), name
    trained = next(n for n in w1 if "lora_B" in n or not rank)  # what B begins with is zero
    assert not torch.equal(w1[trained], torch.zeros_like(w1[trained]) if rank else tiny("llama").get_parameter(trained))
