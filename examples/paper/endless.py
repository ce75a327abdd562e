"""Harder sets made of the digits, so large that a run cannot learn them by heart."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGES = 100_000  # a run of the digits' protocol draws less than half as many
NOISE = 0.1  # share of the training labels of `noisy` that are wrong
DEGREES, PIXELS = 15.0, 1.0  # the largest rotation and shift of an image of 8x8 pixels


def noisy(images: Tensor, labels: Tensor, count: int, seed: int, noise: float = NOISE) -> tuple[Tensor, Tensor]:
    """Draw ``count`` digits, turned and shifted at random; a share ``noise`` has one of the other labels, at random."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(images), (count,), generator=generator)
    wrong = torch.rand(count, generator=generator) < noise
    other = torch.randint(1, 10, (count,), generator=generator)
    return moved(images[drawn], generator), (labels[drawn] + wrong * other) % 10


def parity(images: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw ``count`` pairs of such digits side by side; the label says whether their sum is odd."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randint(len(images), (2, count), generator=generator)
    pair = torch.cat([moved(images[left], generator), moved(images[right], generator)], dim=3)
    return pair, (labels[left] + labels[right]) % 2


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn and shift each of the images at random, within DEGREES and PIXELS; what comes in from outside is black."""

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * limit

    angle = uniform(math.radians(DEGREES))
    side = 2 / images.shape[-1]  # of a pixel: an image reaches from -1 to 1
    across, down = uniform(PIXELS * side), uniform(PIXELS * side)
    sine, cosine = angle.sin(), angle.cos()
    where = torch.stack([torch.stack([cosine, -sine, across], dim=1), torch.stack([sine, cosine, down], dim=1)], dim=1)
    grid = F.affine_grid(where, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
