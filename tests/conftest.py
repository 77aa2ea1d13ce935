"""What every test run needs: `from tiny import ...`, no network, and one thread (tiny models lose time with two)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

from prunus import evaluation

ALL_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for tiny models, all of them for the real one."""
    torch.set_num_threads(ALL_THREADS if request.node.get_closest_marker("real") else 1)
    yield
    torch.set_num_threads(ALL_THREADS)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few turns as may be where speed is measured: nothing here depends on how exact it is."""
    monkeypatch.setattr(evaluation, "PATIENCE", 0.0)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, rotary embeddings and softmax in double precision too: transformers casts them to float32 otherwise."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
