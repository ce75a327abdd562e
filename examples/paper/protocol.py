"""What the studies hold fixed, at three scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .run import Run


@dataclass(frozen=True)
class Protocol:
    """The paper's protocol as we understand it: plain SGD, MSRA, a learning rate tuned for every network."""

    data: str
    channels: int  # of the first convolution; 16 as published
    epochs: int
    batch_size: int  # also the samples behind each gradient that is compared
    num_units: int  # 15 gradients make 105 pairs; the paper compares 100
    seeds: int
    rates: tuple[float, ...]  # learning rates tried
    target: float  # the training loss whose first epoch tells the speed
    depths: tuple[int, ...]  # of CNN-l-2
    widths: tuple[int, ...]  # of CNN-16-k
    deep: int  # of WRN-l-2 and what is left of it
    mlp_depths: tuple[int, ...]  # of the linear and tanh networks that are trained
    init_seeds: int
    init_samples: int
    init_depths: tuple[int, ...]  # at width 64
    init_widths: tuple[int, ...]  # at depth 8

    def run(self, model: str, init: str = "msra") -> Run:
        """One to be trained, still without learning rate and seed."""
        return Run(
            data=self.data, model=model, init=init, seed=0, channels=self.channels, epochs=self.epochs,
            batch_size=self.batch_size, num_units=self.num_units, unit_size=self.batch_size,
        )  # fmt: skip


# Fits two CPU cores and 20 minutes: fewer channels, samples, epochs and smaller batches than the paper's.
DIGITS = Protocol(
    data="digits",
    channels=4,
    epochs=20,
    batch_size=32,
    num_units=15,
    seeds=5,
    rates=(0.01, 0.03, 0.1, 0.3),
    target=0.5,
    depths=(10, 16, 22, 28),
    widths=(1, 2, 4, 6),
    deep=28,
    mlp_depths=(2, 8, 32),
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
    batch_size=128,
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    depths=(16, 22, 28, 34, 40),
    widths=(2, 3, 4, 5, 6),
    deep=40,
    mlp_depths=(2, 8, 32, 128),
)


def shrunk(protocol: Protocol) -> Protocol:
    """To see that everything works, on whatever data."""
    return replace(
        protocol,
        channels=2,
        epochs=1,
        batch_size=16,
        num_units=4,
        seeds=2,
        rates=(0.01, 0.1),
        target=2.3,
        depths=(10, 16),
        widths=(1, 2),
        deep=10,
        mlp_depths=(1, 2),
        init_seeds=2,
        init_samples=16,
        init_depths=(1, 4),
        init_widths=(8, 16),
    )
