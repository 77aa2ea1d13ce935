"""What every test run needs: `from tiny import ...`, no network, and haste (`hurry.py`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from hurry import ALL_THREADS, hurry


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures of a test, those of its whole module too."""
    hurry(ALL_THREADS if item.get_closest_marker("real") else 1)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, rotary embeddings and softmax in double precision too: transformers casts them to float32 otherwise."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
