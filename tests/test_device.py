"""The laws of `device_laws.py` in a process of their own, which alone has the device that is made up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LAWS = Path(__file__).with_name("device_laws.py")


def test_whatever_computes_does_it_on_the_device_of_the_model() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", str(LAWS)]
    found = subprocess.run(command, cwd=LAWS.parent.parent, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert " passed" in found.stdout and "skipped" not in found.stdout
