"""What this package measures beside other tools, on one trained network and the same 64 digits.

    pip install -e '.[bench,examples]' && python benchmarks/compare.py

Writes the tables of docs/compare.md. Every tool is called the way it documents it.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from opacus.grad_sample.utils import prepare_module
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd.autogram import Engine
from traintools.confusion import GradientConfusionMonitor
from traintools.gradnoise import estimate_gns

from lightning_gradconf import gradient_gram, gradient_statistics
from lightning_gradconf.statistics import gradient_diversity, noise_scale

SAMPLES, SPLITS = 64, 16
SEED = 0
Batch = tuple[Tensor, Tensor]


def network(batch_norm: bool) -> nn.Sequential:
    """Return the network of `make demo`, with BatchNorm instead of dropout where that is asked for."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), *([nn.BatchNorm2d(16)] if batch_norm else []), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), *([nn.BatchNorm2d(32)] if batch_norm else []), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), *([] if batch_norm else [nn.Dropout(0.25)]), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def loss(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def trained(batch_norm: bool, epochs: int = 20) -> tuple[nn.Module, Batch]:
    """Return a network after some epochs of plain SGD, in training mode, and the digits that are measured."""
    torch.manual_seed(SEED)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = (images / 16).float().view(-1, 1, 8, 8)
    net = network(batch_norm)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            loss(net, (images[rows], labels[rows])).backward()
            optimizer.step()
    net.zero_grad()
    return net, (images[:SAMPLES], labels[:SAMPLES])


def without_dropout(net: nn.Module) -> nn.Module:
    """Turn dropout off, which this package does by itself, and leave the rest in training mode, as Opacus asks."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return net


def ours(net: nn.Module, batch: Batch, unit_size: int = 1) -> Tensor:
    return sum(gradient_gram(net, loss, batch, unit_size=unit_size).values())  # type: ignore[return-value]


def torchjd(net: nn.Module, batch: Batch) -> Tensor:
    """Return TorchJD's Gramian of the losses of single samples."""
    losses = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
    gram: Tensor = Engine(net, batch_dim=0).compute_gramian(losses)
    return gram


def opacus(net: nn.Module, batch: Batch) -> Tensor:
    """Return the Gram of the gradients of single samples that Opacus leaves in ``grad_sample``."""
    wrapped = prepare_module(net, "hooks", loss_reduction="sum", strict=True)
    F.cross_entropy(wrapped(batch[0]), batch[1], reduction="sum").backward()
    rows = torch.cat([parameter.grad_sample.flatten(1) for parameter in wrapped.parameters()], dim=1)
    return rows @ rows.T


def traintools(net: nn.Module, batch: Batch) -> Any:
    """Return Traintools' result for SPLITS parts of the batch."""
    return GradientConfusionMonitor(n_splits=SPLITS).estimate(net, nn.CrossEntropyLoss(), *batch)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest deviation of an inner product, over the product of the norms."""
    norms = expected.diagonal().sqrt()
    return float(((found - expected).abs() / torch.outer(norms, norms)).max())


def mini_batches(net: nn.Module, batch: Batch) -> Iterator[list[str]]:
    """Yield rows on gradients of mini-batches: what Traintools reports, and the same from the Gram."""
    peer = traintools(net, batch)
    noise = estimate_gns(net, nn.CrossEntropyLoss(), *batch, n_splits=SPLITS).gns
    size = SAMPLES // SPLITS
    gram = ours(net, batch, size)
    mine = {name: float(value) for name, value in gradient_statistics(gram).items()}
    for name in ("min_cosine", "mean_cosine", "negative_fraction"):
        yield [f"`{name}`", f"{getattr(peer, name):.4f}", f"{mine[name]:.4f}"]
    yield ["noise scale, samples", f"{noise:.1f}", f"{float(noise_scale(gram, size)):.1f}"]
    yield ["`confusion_score`: max(0, -min_cosine) x negative_fraction", f"{peer.confusion_score:.4f}", "-"]
    yield ["`eta`, the paper's bound", "-", f"{mine['eta']:.4f}"]
    yield ["its verdict", "; ".join(peer.warnings) or "OK", "none: it depends on the network, unit_size and n"]


def single_samples(net: nn.Module, batch: Batch) -> Iterator[list[str]]:
    """Yield rows on gradients of single samples: the Gram in double precision against a loop, and time in single."""
    double, doubles = copy.deepcopy(net).double(), (batch[0].double(), batch[1])
    expected = torch.stack(list(gradient_gram(double, loss, doubles, engine="loop").values())).sum(0)
    tools: dict[str, Callable[[nn.Module, Batch], Tensor]] = {
        "this package": ours,
        "TorchJD": torchjd,
        "Opacus": opacus,
    }
    fresh = copy.deepcopy(net)

    def a_step() -> None:
        loss(fresh, batch).backward()
        fresh.zero_grad()

    calls: dict[str, Callable[[], Any]] = {
        "this package": lambda: ours(net, batch),
        "TorchJD": lambda: torchjd(net, batch),
        "Opacus": wrapped_once(net, batch),
        "a step": a_step,
    }
    seconds = clock(calls)
    for name, tool in tools.items():
        gram = tool(copy.deepcopy(double), doubles)
        row = [f"{error(gram, expected):.0e}", f"{float(gradient_statistics(gram)['min_cosine']):.4f}"]
        yield [name, *row, f"{float(gradient_diversity(gram)):.4f}", f"{seconds[name] / seconds['a step']:.1f}"]


def wrapped_once(net: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """Return Opacus' measurement with the module wrapped beforehand, as in its trainings."""
    wrapped = prepare_module(copy.deepcopy(net), "hooks", loss_reduction="sum", strict=True)

    def measure() -> Tensor:
        F.cross_entropy(wrapped(batch[0]), batch[1], reduction="sum").backward()
        rows = torch.cat([parameter.grad_sample.flatten(1) for parameter in wrapped.parameters()], dim=1)
        wrapped.zero_grad()
        return rows @ rows.T

    return measure


def clock(calls: dict[str, Callable[[], Any]], rounds: int = 200) -> dict[str, float]:
    """Return the median processor time of each call; they take turns, and the first three rounds are not timed."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 3):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(times[3:]) for name, times in taken.items()}


def left_behind(tool: Callable[[nn.Module, Batch], Any], net: nn.Module, batch: Batch, frozen: bool) -> str:
    """Say what a measurement changes in a network in training mode, its first layer ``frozen`` in evaluation mode."""
    net = copy.deepcopy(net).train()
    if frozen:
        next(net.children()).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tool(net, batch)
        except Exception as caught:
            return f"refused with {type(caught).__name__}"
    changed = []
    if any(not torch.equal(value, net.state_dict()[name]) for name, value in before.items()):
        changed.append("buffers")
    if modes != [module.training for module in net.modules()]:
        changed.append("training mode of a frozen submodule")
    if any(parameter.grad is not None for parameter in net.parameters()):
        changed.append("`.grad`")
    if any(hasattr(parameter, "grad_sample") for parameter in net.parameters()):
        changed.append("`.grad_sample`")
    if any(module._forward_hooks for module in net.modules()):
        changed.append("hooks")
    if not torch.equal(state, torch.get_rng_state()):
        changed.append("random state")
    return ", ".join(changed) or "nothing"


def with_batch_norm(net: nn.Module, batch: Batch) -> Iterator[list[str]]:
    """Yield what each says of a network with BatchNorm in training mode."""
    size = SAMPLES // SPLITS
    lowest = float(gradient_statistics(ours(net, batch, size))["min_cosine"])
    yield ["this package, mini-batches", f"{lowest:.4f}, with statistics of each mini-batch, as in training"]
    yield ["Traintools, mini-batches", f"{traintools(net, batch).min_cosine:.4f}, in evaluation mode"]
    lowest = float(gradient_statistics(ours(net, batch))["min_cosine"])
    yield ["this package, single samples", f"{lowest:.4f}, with running statistics"]
    for name, tool in (("TorchJD", torchjd), ("Opacus", opacus)):
        try:
            text = f"{float(gradient_statistics(tool(copy.deepcopy(net), batch))['min_cosine']):.4f}"
        except Exception as caught:
            text = f"refused with {type(caught).__name__}"
        yield [f"{name}, single samples", text]


def show(head: list[str], rows: Iterator[list[str]]) -> None:
    print("\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus, of images without gradients
    print({name: version(name) for name in ("torch", "torchjd", "opacus", "traintools")}, "\n")
    net, batch = trained(batch_norm=False)
    print(f"loss {loss(net.eval(), batch).item():.3f}\n")
    show(
        [f"{SPLITS} mini-batches of {SAMPLES // SPLITS}", "Traintools", "this package"],
        mini_batches(net.train(), batch),
    )
    head = [
        "single samples",
        "largest error in a cosine, float64",
        "`min_cosine`",
        "`gradient_diversity`",
        "time over a step",
    ]
    show(head, single_samples(without_dropout(net), batch))
    tools = {"this package": ours, "Traintools": traintools, "TorchJD": torchjd, "Opacus": opacus}
    rows = (
        [name, *(left_behind(tool, net, batch, frozen) for frozen in (False, True))] for name, tool in tools.items()
    )
    show(["a measurement changes", "in training mode", "the first layer frozen in evaluation mode"], rows)
    normed, _ = trained(batch_norm=True)
    show(["with BatchNorm", "lowest cosine"], with_batch_norm(normed.train(), batch))


if __name__ == "__main__":
    main()
