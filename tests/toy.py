"""A search problem whose answer is known: errors per level, pairs of layers that interact, and noise per window."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tiny import CONFIGS

from prunus.searching.space import SearchSpace, space_of
from prunus.subnetwork import SubNetwork


def blocks(sub: SubNetwork) -> float:
    """Weights of a llama with head_dim 8 and hidden size 48."""
    return 48.0 * sum(16 * s.kv_heads * s.q_per_kv + 16 * s.kv_heads + 3 * s.mlp for s in sub.layers)


def llama_space(**given: Any) -> SearchSpace:
    return space_of(CONFIGS["llama"](), **{"mlp_step": 8, **given})


class Toy:
    """Separable errors plus interactions of neighbouring layers, plus noise that paired windows share in part."""

    def __init__(
        self, space: SearchSpace, seed: int = 0, pairs: float = 0.0, noise: float = 0.0, n_windows: int = 8
    ) -> None:
        rng = np.random.default_rng(seed)
        self.space, self.noise, self.n_windows = space, noise, n_windows
        self.weight = rng.uniform(0.2, 2.0, (space.n_layers, 2))
        self.power = rng.uniform(1.0, 3.0, (space.n_layers, 2))
        self.pairs = pairs * rng.uniform(0, 1, space.n_layers)
        self.n_calls = 0

    def lost(self, sub: SubNetwork) -> np.ndarray:
        whole = self.space.largest().layers
        return np.array(
            [
                (1 - s.kv_heads * s.q_per_kv / (w.kv_heads * w.q_per_kv), 1 - s.mlp / w.mlp)
                for s, w in zip(sub.layers, whole, strict=True)
            ]
        )

    def truth(self, sub: SubNetwork) -> float:
        lost = self.lost(sub)
        both = lost.sum(1)
        return float((self.weight * lost**self.power).sum() + (self.pairs[1:] * both[1:] * both[:-1]).sum())

    def errors(self) -> list[np.ndarray]:
        """The separable part, as curves over the genes of the space."""
        return [
            np.array(
                [
                    self.weight[i, part] * (1 - _share(option, gene.options[0])) ** self.power[i, part]
                    for option in gene.options
                ]
            )
            for (i, part), gene in zip(
                itertools.product(range(self.space.n_layers), (0, 1)), self.space.genes, strict=False
            )
        ]

    def __call__(self, subs: Sequence[SubNetwork], draw: int, rung: int) -> Iterator[Sequence[float]]:
        n = self.n_windows * 4**rung
        for sub in subs:
            self.n_calls += 1
            common = np.random.default_rng([abs(draw), draw < 0, 7]).normal(size=self.n_windows * 64)[:n]
            own = np.random.default_rng([abs(draw), draw < 0, int(sub.key()[:8], 16)]).normal(size=n)
            yield [float(x) for x in self.truth(sub) + self.noise * (common + 0.3 * own)]

    def n_tokens(self, rung: int) -> int:
        return 100 * 4**rung


def _share(option: Any, whole: Any) -> float:
    return float(np.prod(option) / np.prod(whole))


def brute_force(space: SearchSpace, toy: Toy, window: tuple[float, float]) -> SubNetwork:
    every = (space.build(choice) for choice in itertools.product(*(range(len(gene.options)) for gene in space.genes)))
    return min((sub for sub in every if window[0] <= blocks(sub) <= window[1]), key=toy.truth)


def tiny_space() -> SearchSpace:
    heads = ((4, 2), (4, 1), (2, 1), (1, 1))
    return SearchSpace((heads, (*heads, (0, 0)), (*heads, (0, 0))), ((80, 60, 40, 20, 0),) * 3, (48,))
