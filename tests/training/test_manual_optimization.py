"""Each loss of a manually optimised step is measured, by plain autograd at the weights before the step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from runs import QUIET, Rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradconf import GradientConfusionCallback

N, FEATURES, NOISE = 8, 6, 2


class Gan(pl.LightningModule):
    """Discriminator first, as in examples/gan_digits.py; data are pairs of a sample and noise."""

    toggle = held_back = False
    generator_index = 1

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(NOISE, 5), nn.Tanh(), nn.Linear(5, FEATURES))
        self.critic = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1))
        self.double()

    def generator_loss(self, batch: Any) -> Tensor:
        return F.softplus(-self.critic(self.generator(batch[1]))).mean()

    def critic_loss(self, batch: Any) -> Tensor:
        real, noise = batch
        return (F.softplus(-self.critic(real)) + F.softplus(self.critic(self.generator(noise).detach()))).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for name in ("critic", "generator"):
            optimizer = optimizers[self.generator_index if name == "generator" else 1 - self.generator_index]
            if self.toggle:
                self.toggle_optimizer(optimizer)
            loss = getattr(self, f"{name}_loss")(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = [self.critic, self.generator] if self.generator_index else [self.generator, self.critic]
        return [torch.optim.Adam(part.parameters(), lr=0.05) for part in parts]


class Copies(pl.Callback):
    """Keeps the module, and the batch, of each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        trainer_of, module._trainer = module._trainer, None
        kept = copy.deepcopy(module)
        module._trainer = trainer_of
        self.seen.append((kept, [t.clone() for t in batch]))


def fit(module: pl.LightningModule, steps: int = 2, **options: Any) -> tuple[GradientConfusionCallback, Rows, Copies]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4 * N, FEATURES), (4 * N, NOISE))
    data = TensorDataset(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))
    confusion, rows, copies = GradientConfusionCallback(every_n_train_steps=1, **options), Rows(), Copies()
    trainer = pl.Trainer(
        **QUIET, max_epochs=1, limit_train_batches=steps, logger=rows, enable_checkpointing=False,
        callbacks=[copies, confusion],
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=N))
    return confusion, rows, copies


def lowest_cosine(loss: Any, parameters: list[Tensor], batch: Any) -> float:
    """Of the gradients of single samples, by plain autograd."""
    rows = []
    for i in range(N):
        gradients = torch.autograd.grad(loss([t[i : i + 1] for t in batch]), parameters)
        rows.append(F.normalize(torch.cat([gradient.flatten() for gradient in gradients]), dim=0))
    cosines = torch.stack(rows) @ torch.stack(rows).T
    return float(cosines[~torch.eye(N, dtype=torch.bool)].min())


def logged(rows: Rows, key: str) -> list[float]:
    return [row[key] for _, row in rows.rows if key in row]


@pytest.mark.filterwarnings("ignore:.*(num_workers|bottleneck|log_every_n_steps|LeafSpec)")
@pytest.mark.parametrize("generator_index", [0, 1])
@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_each_loss_has_curves_of_its_optimizer(engine: str, toggle: bool, generator_index: int) -> None:
    torch.manual_seed(0)
    module = Gan()
    module.toggle, module.generator_index = toggle, generator_index
    confusion, rows, copies = fit(module, engine=engine)
    for name, index in (("generator", generator_index), ("critic", 1 - generator_index)):
        values = logged(rows, f"gradient_confusion/{index}/min_cosine")
        expected = [
            lowest_cosine(getattr(twin, f"{name}_loss"), list(getattr(twin, name).parameters()), batch)
            for twin, batch in copies.seen
        ]
        torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), rtol=1e-6, atol=1e-8)
    keys = {key.split("/")[1] for _, row in rows.rows for key in row if key.startswith("gradient_confusion")}
    assert keys == {"0", "1"}
    assert {"0/min_cosine", "1/min_cosine"} < set(confusion.last_statistics)


@pytest.mark.filterwarnings("ignore:.*(num_workers|bottleneck|log_every_n_steps|LeafSpec)")
def test_loss_fn_and_parameters_choose_one_of_them() -> None:
    torch.manual_seed(0)
    module = Gan()
    start = copy.deepcopy(module.state_dict())
    _, both, _ = fit(module, steps=1)
    module.load_state_dict(start)
    _, chosen, _ = fit(module, steps=1, parameters="generator.*")
    module.load_state_dict(start)
    _, of_loss_fn, _ = fit(
        module, steps=1, parameters="generator.*", loss_fn=lambda gan, batch: gan.generator_loss(batch)
    )
    expected = logged(both, "gradient_confusion/1/min_cosine")
    assert len(expected) == 1
    assert logged(chosen, "gradient_confusion/1/min_cosine") == pytest.approx(expected)
    assert not logged(chosen, "gradient_confusion/0/min_cosine")
    assert logged(of_loss_fn, "gradient_confusion/min_cosine") == pytest.approx(expected)


class Single(Gan):
    """One loss, which two optimizers take a step for, or which is for one of them in turn."""

    how = "both"

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        if self.how == "both":
            self.generator_loss(batch).backward()
            first.step()
            second.step()
        elif batch_idx % 2 == 0:
            self.manual_backward(self.critic_loss(batch))
            first.step()
        else:
            self.manual_backward(self.generator_loss(batch))
            second.step()
        for optimizer in (first, second):
            optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:.*(num_workers|bottleneck|log_every_n_steps|LeafSpec)")
def test_one_loss_for_several_optimizers_has_the_usual_keys() -> None:
    torch.manual_seed(0)
    _, rows, copies = fit(Single())
    expected = [lowest_cosine(twin.generator_loss, list(twin.parameters()), batch) for twin, batch in copies.seen]
    values = logged(rows, "gradient_confusion/min_cosine")
    torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*(num_workers|bottleneck|log_every_n_steps|LeafSpec)")
def test_losses_that_take_turns_have_curves_of_their_own() -> None:
    torch.manual_seed(0)
    module = Single()
    module.how = "turns"
    _, rows, _ = fit(module, steps=4)
    for index, steps in (("0", [0, 2]), ("1", [1, 3])):
        assert [step for step, row in rows.rows if f"gradient_confusion/{index}/eta" in row] == steps


class Critics(Gan):
    """Several backward passes for one optimizer, as of a WGAN, and one for the other."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        for _ in range(2):
            critic.zero_grad()
            self.manual_backward(self.critic_loss(batch))
            critic.step()
        generator.zero_grad()
        self.manual_backward(self.generator_loss(batch))
        generator.step()


@pytest.mark.filterwarnings("ignore:.*(num_workers|bottleneck|log_every_n_steps|LeafSpec)")
def test_several_losses_of_one_optimizer_are_numbered_in_their_order() -> None:
    torch.manual_seed(0)
    _, rows, _ = fit(Critics(), steps=1)
    first, second, third = (logged(rows, f"gradient_confusion/{i}/min_cosine") for i in range(3))
    assert first == pytest.approx(second), "all losses are those at the weights before the step"
    assert first != pytest.approx(third)


class Skips(Gan):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2:
            super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*(num_workers|bottleneck|log_every_n_steps|LeafSpec)")
def test_a_step_without_a_backward_pass_is_not_measured() -> None:
    torch.manual_seed(0)
    _, rows, _ = fit(Skips(), steps=4)
    assert [step for step, row in rows.rows if "gradient_confusion/1/eta" in row] == [1, 3]


class Catches(Gan):
    """Catches exceptions, and reads an optimizer's attributes."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        critic, generator = self.optimizers(use_pl_optimizer=batch_idx % 2 == 0)
        assert isinstance(generator, torch.optim.Adam)
        assert generator.param_groups[0]["lr"] == 0.05
        assert generator.defaults["lr"] == 0.05
        for optimizer, loss in ((critic, self.critic_loss), (generator, self.generator_loss)):
            try:
                self.manual_backward(loss(batch))
            except Exception:
                raise AssertionError("the end of a measured step was caught") from None
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:.*(num_workers|bottleneck|log_every_n_steps|LeafSpec)")
def test_optimizers_keep_their_class_and_attributes() -> None:
    torch.manual_seed(0)
    confusion, rows, _ = fit(Catches())
    assert len(logged(rows, "gradient_confusion/0/eta")) == len(logged(rows, "gradient_confusion/1/eta")) == 2
    assert confusion.last_step == 1
