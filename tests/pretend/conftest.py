"""Makes the device known before the first backward pass of the process.

A run of the whole suite passes these files over, because its processes have run backward passes already. They run when
one is named: `python -m pytest tests/pretend/test_steps.py`.
"""

from __future__ import annotations

import pytest
import torch

from tests import pretend_device

collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """The pretend accelerator."""
    return pretend_device.register()
