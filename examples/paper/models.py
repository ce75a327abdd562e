"""The networks of the paper by name, and their initialisations.

================  ====================================================================================================
name              network
================  ====================================================================================================
``wrn-16-2``      wide ResNet of depth 16 and width factor 2 (Zagoruyko & Komodakis 2016, https://arxiv.org/abs/1605.07146)
``cnn-16-2``      the same without skip connections and without BatchNorm: the paper's CNN-16-2
``bn-16-2``       the same without skip connections
``skip-16-2``     the same without BatchNorm
``relu-8-64``     a multilayer perceptron with 8 hidden layers of 64 ReLUs; also ``tanh-8-64`` and ``linear-8-64``
================  ====================================================================================================

What is left out is left out: no biases or scales take the place of BatchNorm.

The stride is 2 at the start of the second and third stage whatever the size of the images, and the pooling at the end
is over what is left: 8x8 of the 32x32 of CIFAR, as published, 7x7 of the 28x28 of MNIST, 2x2 of the 8x8 digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "linear": nn.Identity}
# Whether a network has (BatchNorm, skip connections).
PARTS = {"cnn": (False, False), "bn": (True, False), "skip": (False, True), "wrn": (True, True)}
INITIALISATIONS = ("msra", "glorot", "orthogonal")


def build(name: str, image: tuple[int, int, int], classes: int, channels: int = 16) -> nn.Module:
    """Return the network called ``name`` for images of shape ``image`` (channels, height, width).

    ``channels`` is what the first convolution of a wide ResNet has; its stages have 1, 2 and 4 times ``channels`` times
    the width factor. Raises ``ValueError`` for a name that is none of the above.
    """
    kind, _, sizes = name.partition("-")
    depth, _, width = sizes.partition("-")
    if (kind not in PARTS and kind not in ACTIVATIONS) or not (depth.isdecimal() and width.isdecimal()):
        known = ", ".join([*PARTS, *ACTIVATIONS])
        raise ValueError(f"There is no network {name!r}: write KIND-DEPTH-WIDTH, where KIND is one of {known}.")
    if kind in ACTIVATIONS:
        return mlp(int(depth), int(width), ACTIVATIONS[kind], image, classes)
    return wide_resnet(int(depth), int(width), *PARTS[kind], image[0], classes, channels)


def mlp(depth: int, width: int, activation: type[nn.Module], image: tuple[int, int, int], classes: int) -> nn.Module:
    """``depth`` hidden layers of ``width`` units on the flattened image."""
    sizes = [image[0] * image[1] * image[2], *[width] * depth]
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))


def wide_resnet(
    depth: int, width: int, batch_norm: bool, skip: bool, inputs: int, classes: int, channels: int
) -> nn.Module:
    """WRN-depth-width, or what remains of it without BatchNorm or without skip connections."""
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth={depth}, but a wide ResNet has 6 n + 4 layers: 10, 16, 22, 28, 34, 40, ...")
    blocks: list[nn.Module] = []
    before = channels
    for stage in range(3):
        after = channels * width * 2**stage
        for i in range((depth - 4) // 6):
            stride = 2 if stage > 0 and i == 0 else 1
            blocks.append(Block(before, after, stride, batch_norm, skip))
            before = after
    return nn.Sequential(
        nn.Conv2d(inputs, channels, 3, padding=1, bias=False),
        *blocks,
        *activated(before, batch_norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(before, classes),
    )


class Block(nn.Module):
    """Two convolutions, each after its activation; the skip connection is a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int, batch_norm: bool, skip: bool) -> None:
        super().__init__()
        self.activated = nn.Sequential(*activated(before, batch_norm))
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            *activated(after, batch_norm),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
        )
        self.skip = skip
        changes = skip and (before != after or stride != 1)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activated(x)
        out: Tensor = self.body(hidden)
        if not self.skip:
            return out
        return out + (x if self.shortcut is None else self.shortcut(hidden))


def activated(channels: int, batch_norm: bool) -> Iterator[nn.Module]:
    if batch_norm:
        yield nn.BatchNorm2d(channels)
    yield nn.ReLU()


def initialise(model: nn.Module, name: str, relu: bool = True) -> None:
    """Draw the weights of all linear and convolutional layers anew, and set their biases to zero.

    The variance of the activations stays the same from layer to layer: with ``relu``, weights of ``msra`` and
    ``orthogonal`` are the square root of 2 larger than for ``tanh`` and ``linear``. ``glorot`` is for those. Raises
    ``ValueError`` for another name.
    """
    gain = 2**0.5 if relu else 1.0
    for layer in model.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        if name == "msra":  # He et al. 2015, https://arxiv.org/abs/1502.01852
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if relu else "linear")
        elif name == "glorot":  # Glorot & Bengio 2010
            nn.init.xavier_normal_(layer.weight)
        elif name == "orthogonal":  # Saxe et al. 2014, https://arxiv.org/abs/1312.6120
            nn.init.orthogonal_(layer.weight, gain)
        else:
            raise ValueError(f"There is no initialisation {name!r}: choose from {', '.join(INITIALISATIONS)}.")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
