import logging
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
# The models are tiny, and threads of several test processes would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet_lightning():
    """Lightning describes the machine at each start of a Trainer; failures are read more easily without."""
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def time_stands_still(monkeypatch):
    """The steps of these toy runs take less time than a measurement, so that intervals would be stretched."""
    if "lightning_gradconf.callback" in sys.modules:
        monkeypatch.setattr("lightning_gradconf.training.overhead.perf_counter", lambda: 0.0)


collect_ignore_glob = ["gram/zoo/*.py"]  # cases, without doctests; they register themselves when they are imported
