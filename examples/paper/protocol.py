"""What the studies hold fixed, at three scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .data import OF_DIGITS
from .run import Run


@dataclass(frozen=True)
class Protocol:
    """The paper's protocol as we understand it: plain SGD, MSRA, a learning rate tuned for every network."""

    data: str
    channels: int  # of the first convolution; 16 as published
    epochs: int
    tuning_epochs: int  # of the runs that decide on the learning rate
    batch_size: int  # also the samples behind each gradient that is compared
    num_units: int  # 15 gradients make 105 pairs; the paper compares 100
    seeds: int
    rates: tuple[float, ...]  # learning rates tried
    target: float  # the training loss whose first epoch tells the speed, and at which networks are compared
    depths: tuple[int, ...]  # of CNN-l-2, and of WRN-l-2 and what is left of it
    widths: tuple[int, ...]  # of CNN-16-k
    mlp_depths: tuple[int, ...]  # of perceptrons of 64 units
    mlp_widths: tuple[int, ...]  # of perceptrons of 3 hidden layers
    orthogonal_depths: tuple[int, ...]  # of linear and tanh networks
    init_seeds: int
    init_samples: int
    init_depths: tuple[int, ...]  # at width 64
    init_widths: tuple[int, ...]  # at depth 8

    def run(self, model: str, init: str = "msra", data: str | None = None) -> Run:
        """Return one to be trained, still without learning rate and seed."""
        data = data or self.data
        return Run(
            data=data, model=model, init=init, seed=0, channels=self.channels, epochs=self.epochs,
            batch_size=self.batch_size, batches=EPOCH if data in OF_DIGITS else None, num_units=self.num_units,
            unit_size=self.batch_size,
        )  # fmt: skip


# The loss at which networks are compared: a little above the lowest that the narrow ones come to.
TARGETS = {"digits": 0.5, "digits-noisy": 1.2, "digits-parity": 0.65}
EPOCH = 46  # batches of 32, as many as the 1500 digits have
# Fits two CPU cores and half an hour: fewer channels, epochs and smaller batches than the paper's.
DIGITS = Protocol(
    data="digits-noisy",
    channels=4,
    epochs=30,
    tuning_epochs=15,
    batch_size=32,
    num_units=15,
    seeds=5,
    rates=(0.01, 0.03, 0.1, 0.3, 1.0),
    target=TARGETS["digits-noisy"],
    depths=(10, 16, 22, 28),
    widths=(1, 2, 4),
    mlp_depths=(1, 2, 4, 8, 16, 32),
    mlp_widths=(8, 16, 32, 64, 128, 256),
    orthogonal_depths=(2, 8, 32),
    init_seeds=10,
    init_samples=128,
    init_depths=(1, 2, 4, 8, 16, 32),
    init_widths=(8, 16, 32, 64, 128, 256, 512),
)
FULL = replace(
    DIGITS,
    data="cifar10",
    channels=16,
    epochs=200,
    tuning_epochs=200,
    batch_size=128,
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    target=0.5,
    depths=(16, 22, 28, 34, 40),
    widths=(2, 3, 4, 5, 6),
    orthogonal_depths=(2, 8, 32, 128),
)


def on(protocol: Protocol, data: str) -> Protocol:
    """Return a protocol for other data."""
    return protocol if data == protocol.data else replace(protocol, data=data, target=TARGETS.get(data, 0.5))


def shrunk(protocol: Protocol) -> Protocol:
    """Return the smallest of its kind, to see that everything works, on whatever data."""
    return replace(
        protocol,
        channels=2,
        epochs=1,
        tuning_epochs=1,
        batch_size=16,
        num_units=4,
        seeds=2,
        rates=(0.1,),
        target=2.3,
        depths=(10, 16),
        widths=(1, 2),
        mlp_depths=(1, 2),
        mlp_widths=(4, 8),
        orthogonal_depths=(1, 2),
        init_seeds=2,
        init_samples=16,
        init_depths=(1, 4),
        init_widths=(8, 16),
    )
