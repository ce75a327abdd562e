"""Modules of published packages, measured with one line: bitwise unchanged, and equal to plain autograd.

pip install -e '.[test,ecosystem]' && pytest -m ecosystem
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gradconf import GradientConfusionCallback

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]  # what the packages warn about is theirs

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
UNITS = 6


def train(make: Callable[[], tuple[Any, Any]], *callbacks: Any) -> tuple[Any, list[Tensor]]:
    """Train for some steps; return the module before, and the weights after."""
    pl.seed_everything(7, verbose=False)
    module, loader = make()
    before = copy.deepcopy(module)
    trainer = pl.Trainer(max_steps=5, accelerator="cpu", gradient_clip_val=0.1, callbacks=list(callbacks), **QUIET)
    trainer.fit(module, loader)
    before.trainer, trainer.training = trainer, True  # some modules ask for the stage
    return before, [tensor.clone() for tensor in module.state_dict().values()]


def measured(make: Callable[[], tuple[Any, Any]], **options: Any) -> GradientConfusionCallback:
    """Measure once, at the first weights, and check the Gram and that the run is the run without."""
    confusion = GradientConfusionCallback(num_units=UNITS, every_n_train_steps=50, top_pairs=99, **options)
    _, plain = train(make)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before, weights = train(make, confusion)
    said = [str(w.message) for w in caught if "GradientConfusion" in str(w.message)]
    assert all("source='fresh'" in words for words in said), said
    for a, b in zip(plain, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    _, loader = make()
    pairs = confusion.last_top_pairs
    origins = {unit: origin for pair in pairs for unit, origin in zip(pair.units, pair.origins, strict=True)}
    drawn = [origins[i] for i in range(UNITS)]
    assert all(origin.batch is None for origin in drawn) == bool(said) or options.get("source") == "fresh"
    samples = [origin.samples for origin in drawn]
    expected = gram_of(before, [loader.collate_fn([loader.dataset[i] for i in group]) for group in samples])
    torch.testing.assert_close(confusion.last_gram, expected.float(), rtol=2e-4, atol=1e-6 * float(expected.max()))
    return confusion


def gram_of(module: Any, batches: Sequence[Any]) -> Tensor:
    """The oracle: one backward pass a batch, with running statistics and without dropout."""
    module.log = lambda *args, **kwargs: None
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout | torch.nn.modules.batchnorm._BatchNorm):
            part.eval()
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = []
    for batch in batches:
        output = module.training_step(batch, 0)
        loss = output["loss"] if isinstance(output, dict) else output
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]).double())
    return torch.stack(rows) @ torch.stack(rows).T


# ---- torch_geometric -------------------------------------------------------------------------------------------------


def graphs(norm: bool) -> tuple[Any, Any]:
    geometric = pytest.importorskip("torch_geometric")
    nn, Data, Loader = geometric.nn, geometric.data.Data, geometric.loader.DataLoader

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.gnn = nn.GIN(5, 16, 2, norm="batch_norm" if norm else None)
            self.out = torch.nn.Linear(16, 3)

        def training_step(self, data: Any, batch_idx: int) -> Tensor:
            h = nn.global_mean_pool(self.gnn(data.x, data.edge_index), data.batch)
            loss = F.cross_entropy(self.out(h), data.y)
            self.log("loss", loss, batch_size=data.num_graphs)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(48):
        n = 4 + i % 7
        edges = torch.randint(n, (2, 3 * n), generator=generator)
        data.append(Data(x=torch.randn(n, 5, generator=generator), edge_index=edges, y=torch.tensor([i % 3])))
    torch.manual_seed(0)
    return Classifier(), Loader(data, batch_size=8, shuffle=True)


@pytest.mark.parametrize("source", ["current", "fresh"])
@pytest.mark.parametrize("norm", [False, True])
def test_graphs_of_torch_geometric(source, norm):
    measured(lambda: graphs(norm), source=source)


# ---- chemprop --------------------------------------------------------------------------------------------------------

SMILES = ["CCO", "c1ccccc1", "CC(=O)O", "CCN(CC)CC", "C1CCCCC1", "CC(C)O", "c1ccncc1", "CCCCCC", "OCC(O)CO", "CC#N"]


def molecules() -> tuple[Any, Any]:
    chemprop = pytest.importorskip("chemprop")
    targets = np.random.default_rng(0).normal(size=(len(SMILES), 1))
    points = [chemprop.data.MoleculeDatapoint.from_smi(s, y) for s, y in zip(SMILES, targets, strict=True)]
    torch.manual_seed(0)
    parts = (
        chemprop.nn.BondMessagePassing(d_h=20),
        chemprop.nn.MeanAggregation(),
        chemprop.nn.RegressionFFN(input_dim=20),
    )
    loader = chemprop.data.build_dataloader(chemprop.data.MoleculeDataset(points), batch_size=5, num_workers=0)
    return chemprop.models.MPNN(*parts), loader


@pytest.mark.parametrize("source", ["current", "fresh"])
def test_molecules_of_chemprop(source):
    measured(molecules, source=source)


# ---- pytorch_forecasting ---------------------------------------------------------------------------------------------


def series() -> tuple[Any, Any]:
    forecasting = pytest.importorskip("pytorch_forecasting")
    import pandas as pd

    rows = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "time": list(range(30)) * 6,
            "series": [str(i) for i in range(6) for _ in range(30)],
            "value": rows.normal(size=180).cumsum() % 7,
        }
    )
    data = forecasting.TimeSeriesDataSet(
        frame,
        **{"time_idx": "time", "target": "value", "group_ids": ["series"], "static_categoricals": ["series"]},
        **{"min_encoder_length": 4, "max_encoder_length": 10, "max_prediction_length": 3},
        **{"time_varying_unknown_reals": ["value"], "time_varying_known_reals": ["time"]},
    )
    torch.manual_seed(0)
    model = forecasting.TemporalFusionTransformer
    module = model.from_dataset(data, learning_rate=0.01, log_interval=-1, hidden_size=8, dropout=0.0)
    return module, data.to_dataloader(train=True, batch_size=8, num_workers=0)


@pytest.mark.parametrize("source", ["current", "fresh"])
def test_forecasts_of_pytorch_forecasting(source):
    measured(series, source=source)
