"""Floor 3: the final pass over chosen sub-networks: refit every matrix on what the compressed prefix really produces.

Layer by layer, from the inputs that the already compressed layers give. Writers (output and down projections) aim at
the dense sub-layer's output plus a share of the drift between the dense and the compressed residual stream, so that
each layer mends what the earlier ones broke; readers (query, key, value, gate, up) aim at what they gave on the dense
model's inputs. Closed form, no gradients. All candidates travel together: the dense model runs once for all of them.
The residual stream is float32 (`LayerStream.carrying_float32`); candidates carry their difference to the dense model's,
in the dtype of the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunus.models.families import Family
from prunus.models.memory import give_back
from prunus.models.slicing import Override, activate
from prunus.models.stream import LayerStream, inputs_of
from prunus.reforming.reform import refit
from prunus.scoring.moments import add_products, stored, writer_weight
from prunus.searching.objective import kl_from_logits
from prunus.subnetwork import SubNetwork

Advance = Callable[[int], None]
Accept = Callable[[int, int, Sequence[Override]], int]  # (candidate, layer, weights to choose from) -> which one


@dataclass(frozen=True)
class SequentialSettings:
    """drift: share of the residual stream's drift in the target (0: the plain output of the dense sub-layer).

    damping: ridge towards the weights of before, relative to the mean diagonal of the Gram matrix.
    reader_damping: the same for readers; None leaves them alone. reader_stride: they see every n-th batch, since
    their problems are smaller.
    """

    drift: float = 1.0
    damping: float = 0.3
    reader_damping: float | None = 0.3
    reader_stride: int = 2
    micro: int = 4


@dataclass
class _Traveller:
    """One candidate on its way through the layers."""

    sub: SubNetwork
    weights: dict[tuple[int, str], Tensor]
    carried: list[Tensor]  # hidden states of each batch; their difference to the dense ones where the sizes agree
    readers: dict[tuple[int, str], tuple[Tensor, Tensor | None]]  # as the super-network has them: (weight, bias)

    def hidden(self, b: int, dense: Tensor) -> Tensor:
        """Hidden states of batch b; `dense` are those of the dense model at the same place."""
        own = self.carried[b]
        return dense + own if own.shape == dense.shape else own


def _difference(hidden: Tensor, dense: Tensor, dtype: torch.dtype) -> Tensor:
    """What a traveller carries of its hidden states."""
    return (hidden - dense).to(dtype) if hidden.shape == dense.shape else hidden


class _Stop(Exception):
    """Raised by a hook once the input it waited for is there: the rest of the layer need not run."""


@torch.no_grad()
def refit_all(
    stream: LayerStream,
    ids: Tensor,
    candidates: Sequence[tuple[SubNetwork, Override]],
    settings: SequentialSettings,
    *,
    openings: Tensor | None = None,
    accept: Accept | None = None,
    advance: Advance | None = None,
) -> list[dict[tuple[int, str], Tensor]]:
    """Refitted weights of every candidate, in storage order; ids (n, length) are calibration windows.

    candidates: sub-networks of the sorted super-network with the weights that the ridge pulls towards: one-shot ones
    (`levels.Levels`), or those of an earlier pass. openings (m, 1): tokens that a text may begin with, fitted as
    sequences of their own (`calibration.openings`). accept: asked once per candidate and layer, to
    choose among the refitted weights, those halfway, and those of before.
    """
    batches = [] if openings is None else [openings]  # first: readers see every n-th batch from the first on
    batches += torch.split(ids, settings.micro)
    with stream.carrying_float32():
        dense = [stream.embed(batch) for batch in batches]
        travellers = [_start(stream, sub, override, batches, dense) for sub, override in candidates]
        for i in range(len(stream)):
            truth = _dense_layer(stream, i, dense, settings.reader_stride)
            for c, traveller in enumerate(travellers):
                _refit_layer(stream, i, c, traveller, truth, settings, accept)
                give_back()
                if advance:
                    advance(ids.numel())
            dense = truth.after
    return [t.weights for t in travellers]


def _start(
    stream: LayerStream, sub: SubNetwork, override: Override, batches: list[Tensor], dense: list[Tensor]
) -> _Traveller:
    """One candidate before layer 0."""
    dtype = next(stream.model.parameters()).dtype
    with activate(stream.model, stream.family, sub):
        carried = [_difference(stream.embed(batch), h, dtype) for batch, h in zip(batches, dense, strict=True)]
        return _Traveller(sub, dict(override), carried, _dense_readers(stream, sub))


@dataclass(frozen=True)
class _Truth:
    """What the dense layer does, batch by batch: states before and behind it, its writers' outputs, readers' inputs."""

    before: list[Tensor]
    after: list[Tensor]
    outputs: dict[str, list[Tensor]]
    inputs: dict[str, dict[int, Tensor]]  # of the first reader of each sub-layer; its other readers see the same
    scales: dict[str, list[Tensor]]  # of each token, by the writer whose errors they scale (`_per_size`)


def readers_of(family: Family, part: Literal["attention", "mlp"]) -> list[str]:
    """The matrices of a sub-layer that read the residual stream; all of them have the same input."""
    table = family.attention if part == "attention" else family.mlp
    return [path for path, row in table.items() if row.startswith("hidden ->")]


def _dense_readers(stream: LayerStream, sub: SubNetwork) -> dict[tuple[int, str], tuple[Tensor, Tensor | None]]:
    """What the active sub-network's readers are without any override: their outputs on dense inputs are the target."""
    found: dict[tuple[int, str], tuple[Tensor, Tensor | None]] = {}
    for i, shape in enumerate(sub.layers):
        paths = readers_of(stream.family, "attention") if shape.attends else []
        paths += readers_of(stream.family, "mlp") if shape.mlp else []
        for path in paths:
            bias = getattr(stream.layers[i].get_submodule(path), "bias", None)
            own = bias.detach() if isinstance(bias, Tensor) else None
            found[i, path] = writer_weight(stream.layers[i], path), own
    return found


def _dense_layer(stream: LayerStream, i: int, dense: list[Tensor], stride: int) -> _Truth:
    layer, family = stream.layers[i], stream.family
    writers = (family.attention_writer, family.mlp_writer)
    readers = (readers_of(family, "attention")[0], readers_of(family, "mlp")[0])
    truth = _Truth(
        dense, [], {path: [] for path in writers}, {path: {} for path in readers}, {path: [] for path in writers}
    )
    for b, hidden in enumerate(dense):
        with inputs_of(layer, *readers) as seen, _outputs_of(layer, *writers) as given:
            truth.after.append(stream.run(i, hidden))
        for path, states in zip(writers, (hidden, truth.after[-1]), strict=True):
            truth.outputs[path].append(given[path].view_as(hidden))
            truth.scales[path].append(_per_size(states))
        if b % stride == 0:
            for path in readers:
                truth.inputs[path][b] = seen[path]
    return truth


@contextmanager
def _outputs_of(layer: nn.Module, *paths: str) -> Iterator[dict[str, Tensor]]:
    """Inside the block, the dict holds the last output of each named module of one layer."""
    given: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            given[path] = out

        return layer.get_submodule(path).register_forward_hook(hook)

    hooks = [watch(path) for path in paths]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def _refit_layer(
    stream: LayerStream,
    i: int,
    c: int,
    traveller: _Traveller,
    truth: _Truth,
    settings: SequentialSettings,
    accept: Accept | None,
) -> None:
    shape = traveller.sub.layers[i]
    before = dict(traveller.weights)
    whole = traveller.sub.hidden == truth.before[0].shape[-1]  # else there is no dense output to aim at
    replay: list[Tensor] = []
    if shape.attends and whole:
        _refit_readers(stream, i, traveller, "attention", truth, settings, replay)
        replay = _refit_attention(stream, i, traveller, truth, settings)
    if shape.mlp and whole:
        _refit_readers(stream, i, traveller, "mlp", truth, settings, replay)
        moved = _refit_mlp(stream, i, traveller, truth, settings, replay)
    else:
        moved = _advance(stream, i, traveller, truth, replay)
    if accept is not None:
        choice = [traveller.weights, _halfway(stream, i, traveller.sub, before, traveller.weights), before]
        taken = accept(c, i, choice)
        if taken > 0:
            traveller.weights = dict(choice[taken])
            moved = _advance(stream, i, traveller, truth, [])
    traveller.carried = moved


def _halfway(stream: LayerStream, i: int, sub: SubNetwork, before: Override, after: Override) -> Override:
    """Weights in the middle between two sets that differ in layer i."""
    out = dict(after)
    with activate(stream.model, stream.family, sub, before):
        for (layer, name), new in after.items():
            if layer == i:
                path, _, kind = name.rpartition(".")
                old = getattr(stream.layers[i].get_submodule(path), kind)
                out[layer, name] = ((new.float() + old.float()) / 2).to(new.dtype)
    return out


def _per_size(states: Tensor) -> Tensor:
    """One factor per token, (tokens, 1): the power of two next to 1 / rms of its hidden states, so exact to scale by.

    Errors are then relative: the norm of the next layer divides by that size, and a few massive tokens (attention
    sinks) do not outweigh all others.
    """
    rms = states.flatten(0, -2).float().square().mean(-1, keepdim=True).sqrt()
    return torch.exp2(torch.round(-torch.log2(rms.clamp(min=1e-6))))


def _advance(stream: LayerStream, i: int, traveller: _Traveller, truth: _Truth, replay: list[Tensor]) -> list[Tensor]:
    """What the candidate carries behind layer i."""
    moved = []
    with activate(stream.model, stream.family, traveller.sub, traveller.weights), _replayed(stream, i, replay) as tell:
        for b, (before, after) in enumerate(zip(truth.before, truth.after, strict=True)):
            hidden = stream.run(i, tell(b, traveller.hidden(b, before)))
            moved.append(_difference(hidden, after, traveller.carried[b].dtype))
    return moved


class _Replay(nn.Module):
    """Stands in for an attention whose output on each batch is known already."""

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__()
        self.outputs, self.batch = outputs, 0

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.outputs[self.batch], None


@contextmanager
def _replayed(stream: LayerStream, i: int, outputs: list[Tensor]) -> Iterator[Callable[[int, Tensor], Tensor]]:
    """Inside the block the attention of layer i is not run again; call the yielded function before each batch."""
    if not outputs:
        yield lambda b, hidden: hidden
        return
    layer, path = stream.layers[i], stream.family.attention_module
    attention, replay = layer.get_submodule(path), _Replay(outputs)

    def tell(b: int, hidden: Tensor) -> Tensor:
        replay.batch = b
        return hidden

    layer.set_submodule(path, replay)
    try:
        yield tell
    finally:
        layer.set_submodule(path, attention)


def _refit_readers(
    stream: LayerStream,
    i: int,
    traveller: _Traveller,
    part: Literal["attention", "mlp"],
    truth: _Truth,
    settings: SequentialSettings,
    replay: list[Tensor],
) -> None:
    """Readers give on the drifted inputs what they gave on the dense ones, as nearly as a matrix can."""
    if settings.reader_damping is None or (i == 0 and part == "attention"):  # the inputs of layer 0 have not drifted
        return
    layer, paths = stream.layers[i], readers_of(stream.family, part)
    n, device = traveller.sub.hidden, stream.device
    gram, cross = torch.zeros(n, n, device=device), torch.zeros(n, n, device=device)
    own, dense, tokens = torch.zeros(n, device=device), torch.zeros(n, device=device), 0
    with activate(stream.model, stream.family, traveller.sub, traveller.weights):
        with _replayed(stream, i, replay) as tell:
            for b, inputs in truth.inputs[paths[0]].items():
                x = _input_only(stream, i, paths[0], tell(b, traveller.hidden(b, truth.before[b]))).flatten(0, -2)
                y = inputs.flatten(0, -2)
                add_products(gram, x, x)
                add_products(cross, x, y)
                own += x.sum(0, dtype=torch.float32)
                dense += y.sum(0, dtype=torch.float32)
                tokens += len(x)
        for path in paths:
            moments = _Moments(layer, path)
            weight, moments.bias = traveller.readers[i, path]  # the bias stands on both sides
            moments.gram, moments.cross, moments.tokens = gram, cross @ weight.float().T, tokens
            moments.inputs, moments.outputs = own, weight.float() @ dense
            new = moments.solve(settings.reader_damping)
            traveller.weights |= {(i, name): tensor for name, tensor in new.items()}


def _refit_attention(
    stream: LayerStream, i: int, traveller: _Traveller, truth: _Truth, settings: SequentialSettings
) -> list[Tensor]:
    """Refit the attention's writer, and return what the attention now gives on every batch."""
    path = stream.family.attention_writer
    drift = 0.0 if stream.family.post_norm else settings.drift
    with activate(stream.model, stream.family, traveller.sub, traveller.weights):
        moments, inputs = _Moments(stream.layers[i], path), []
        for b, before in enumerate(truth.before):
            wanted, hidden = truth.outputs[path][b], traveller.hidden(b, before)
            if drift:
                wanted = wanted + drift * (before - hidden)
            inputs.append(_input_only(stream, i, path, hidden))
            moments.add(inputs[-1], wanted, truth.scales[path][b])
        new = moments.solve(settings.damping)
        traveller.weights |= {(i, name): tensor for name, tensor in new.items()}
        with _holding(stream.layers[i].get_submodule(path), new) as writer:
            return [writer(x).view_as(h) for x, h in zip(inputs, truth.before, strict=True)]


def _refit_mlp(
    stream: LayerStream,
    i: int,
    traveller: _Traveller,
    truth: _Truth,
    settings: SequentialSettings,
    replay: list[Tensor],
) -> list[Tensor]:
    """Refit the MLP's writer, and return what the candidate carries behind the layer with the new weight."""
    family, layer, path = stream.family, stream.layers[i], stream.family.mlp_writer
    drift = 0.0 if family.post_norm else settings.drift
    kept, rests = [], []
    with activate(stream.model, family, traveller.sub, traveller.weights):
        moments = _Moments(layer, path)
        with _replayed(stream, i, replay) as tell:
            for b, before in enumerate(truth.before):
                with _outputs_of(layer, path) as own, inputs_of(layer, path) as seen:
                    out = stream.run(i, tell(b, traveller.hidden(b, before)))
                wanted = truth.outputs[path][b]
                if not family.post_norm:
                    rest = out - own[path].view_as(out)  # the stream without this MLP's share
                    wanted = wanted + drift * (truth.after[b] - wanted - rest)
                    rests.append(_difference(rest, truth.after[b], out.dtype))
                    kept.append(seen[path])
                moments.add(seen[path], wanted, truth.scales[path][b])
        new = moments.solve(settings.damping)
        traveller.weights |= {(i, name): tensor for name, tensor in new.items()}
        if not family.post_norm:
            with _holding(layer.get_submodule(path), new) as writer:
                parts = zip(rests, kept, traveller.carried, strict=True)
                return [(rest + writer(x).view_as(rest)).to(own.dtype) for rest, x, own in parts]
    return _advance(stream, i, traveller, truth, replay)


@contextmanager
def _holding(module: nn.Module, new: dict[str, Tensor]) -> Iterator[nn.Module]:
    """Inside the block a module has the given parameters (named by their paths)."""
    old = dict(module._parameters)
    for name, tensor in new.items():
        module._parameters[name.rpartition(".")[2]] = nn.Parameter(tensor, requires_grad=False)
    try:
        yield module
    finally:
        module._parameters.update(old)


class Judge:
    """An `Accept`: takes the first weights that do not raise the divergence on held-out windows, else the last.

    The layers behind still have their weights of before. `tolerance` is relative: a rise that small is noise, which
    later layers, refitted to undo drift, make up for. Each question costs one forward of the layers from it on.
    `taken[candidate][k]` counts how often the k-th of the weights was taken.
    """

    def __init__(
        self,
        stream: LayerStream,
        windows: Tensor,
        candidates: Sequence[tuple[SubNetwork, Override]],
        *,
        tolerance: float = 0.01,
        stride: int = 4,
    ) -> None:
        self.stream, self.tolerance, self.stride = stream, tolerance, stride
        self.subs = [sub for sub, _ in candidates]
        self.taken: list[Counter[int]] = [Counter() for _ in candidates]
        with torch.no_grad():
            dense = stream.run_from(0, stream.embed(windows))[:, stride - 1 :: stride]
            self.dense = [stream.logits(h) for h in dense]  # asked for again and again
            self.states, self.nats = [], []
            for sub, override in candidates:
                with activate(stream.model, stream.family, sub, override):
                    self.states.append(stream.embed(windows))
                    self.nats.append(self._nats(stream.run_from(0, self.states[-1])))

    @torch.no_grad()
    def __call__(self, c: int, i: int, choice: Sequence[Override]) -> int:
        for k, weights in enumerate(choice):
            with activate(self.stream.model, self.stream.family, self.subs[c], weights):
                moved = self.stream.run(i, self.states[c])
                last = k == len(choice) - 1
                nats = self.nats[c] if last else self._nats(self.stream.run_from(i + 1, moved))
            if last or nats <= self.nats[c] * (1 + self.tolerance):
                self.states[c], self.nats[c] = moved, nats
                self.taken[c][k] += 1
                return k
        raise ValueError("there were no weights to choose from")

    def _nats(self, hidden: Tensor) -> float:
        ours = hidden[:, self.stride - 1 :: self.stride]
        pairs = zip(self.dense, ours, strict=True)  # window by window: logits are large
        nats = [kl_from_logits(p, self.stream.logits(q)).mean() for p, q in pairs]
        return float(torch.stack(nats).mean())


def _input_only(stream: LayerStream, i: int, path: str, hidden: Tensor) -> Tensor:
    """The input of one module of layer i; the layer stops there."""
    found: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _Stop

    hook = stream.layers[i].get_submodule(path).register_forward_pre_hook(stop)
    try:
        stream.run(i, hidden)
    except _Stop:
        pass
    finally:
        hook.remove()
    return found[0]


class _Moments:
    """Sums for one least-squares problem: inputs of a matrix against the outputs that it should give, without bias."""

    def __init__(self, layer: nn.Module, path: str) -> None:
        self.layer, self.path = layer, path
        self.prior = writer_weight(layer, path)
        bias = getattr(layer.get_submodule(path), "bias", None)
        self.bias = bias.detach() if isinstance(bias, Tensor) else None
        out, k = self.prior.shape
        device = self.prior.device
        self.gram, self.cross = torch.zeros(k, k, device=device), torch.zeros(k, out, device=device)
        self.inputs, self.outputs = torch.zeros(k, device=device), torch.zeros(out, device=device)
        self.tokens = 0.0

    def add(self, inputs: Tensor, wanted: Tensor, scale: Tensor) -> None:
        x, y = inputs.flatten(0, -2), wanted.flatten(0, -2)
        if self.bias is not None:
            y = y - self.bias
        x, y = x * scale.to(x.dtype), (y * scale).to(x.dtype)  # rounded as an output of the matrix would be
        if self.bias is not None:
            self.inputs += (x * scale).sum(0, dtype=torch.float32)
            self.outputs += (y * scale).sum(0, dtype=torch.float32)
        add_products(self.gram, x, x)
        add_products(self.cross, x, y)
        self.tokens += float(scale.square().sum())

    def solve(self, damping: float) -> dict[str, Tensor]:
        """The new weight, and the new bias where there is one: then the moments are centred, and it takes the means."""
        gram, cross = self.gram / self.tokens, self.cross / self.tokens
        if self.bias is None:
            return {f"{self.path}.weight": stored(self.layer, self.path, refit(gram, cross, self.prior, damping))}
        x, y = self.inputs / self.tokens, self.outputs / self.tokens
        new = refit(gram - torch.outer(x, x), cross - torch.outer(x, y), self.prior, damping)
        bias = (self.bias.float() + y - new @ x).to(self.bias.dtype)
        return {f"{self.path}.weight": stored(self.layer, self.path, new), f"{self.path}.bias": bias}
