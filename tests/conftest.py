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

SHARING = "PYTEST_XDIST_WORKER" in os.environ  # the cores, with other workers
if SHARING:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures of a test, those of its whole module too."""
    hurry(ALL_THREADS if item.get_closest_marker("real") and not SHARING else 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real runs begin soon after the first laws, not after the last: they take five minutes of one core. Of two
    workers the second begins in the middle of the list (worksteal): an eighth of its share comes before them."""
    real = [item for item in items if item.get_closest_marker("real")]
    laws = [item for item in items if not item.get_closest_marker("real")]
    begin = len(laws) * 9 // 16
    items[:] = [*laws[:begin], *real, *laws[begin:]]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, rotary embeddings and softmax in double precision too: transformers casts them to float32 otherwise."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
