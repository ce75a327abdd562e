"""Models and batches that the engines are timed on: float32, training mode, no dropout, no BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 1000


@dataclass(frozen=True)
class Workload:
    """A model with a batch; the batch holds ``unit_size`` samples for each unit."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    unit_size: int = 1

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross entropy, over tokens where there are several a sample."""
        x, y = batch
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of each sample, for libraries that ask for it."""
        x, y = batch
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none").view(len(x), -1).mean(1)


def mlp(units: int = 128) -> Workload:
    sizes = [784, 1000, 1000, 1000]
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return Workload(kaiming(nn.Sequential(*hidden, nn.Linear(1000, 10))), (torch.randn(units, 784), classes(units)))


def cnn(units: int = 64, unit_size: int = 1, depth: int = 16, width: int = 2) -> Workload:
    """CNN-depth-width: a wide ResNet without its skip connections and normalisation."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    channels = 16
    for stage in range(3):
        out = 16 * width * 2**stage
        for i in range((depth - 4) // 3):
            layers += [nn.Conv2d(channels, out, 3, stride=2 if stage and not i else 1, padding=1), nn.ReLU()]
            channels = out
    model = kaiming(nn.Sequential(*layers, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(channels, 10)))
    samples = units * unit_size
    return Workload(model, (torch.randn(samples, 3, 32, 32), classes(samples)), unit_size)


class Block(nn.Module):
    """A basic block of a ResNet, with GroupNorm."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.GroupNorm(32, out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(32, out),
        )  # fmt: skip
        self.skip = nn.Sequential()
        if stride != 1 or channels != out:
            self.skip.extend([nn.Conv2d(channels, out, 1, stride, bias=False), nn.GroupNorm(32, out)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) + self.skip(x)
        return out.relu()


def resnet18(units: int = 32) -> Workload:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    channels = 64
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(channels, out, stride), Block(out, out, 1)]
        channels = out
    model = nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))
    return Workload(model, (torch.randn(units, 3, 32, 32), classes(units)))


class GPTBlock(nn.Module):
    """Causal attention and a feed-forward network, each after its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.feed(self.norm2(x))
        return out


class GPT(nn.Module):
    """A small decoder; its positions have no batch dimension, unless they are expanded to one."""

    def __init__(
        self, width: int = 256, layers: int = 4, heads: int = 4, length: int = 128, expand: bool = False
    ) -> None:
        super().__init__()
        self.expand = expand
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        positions = torch.arange(index.shape[1], device=index.device)
        x = self.tokens(index) + self.positions(positions.expand_as(index) if self.expand else positions)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def gpt(units: int = 16, expand: bool = False) -> Workload:
    model = GPT(expand=expand)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    return Workload(model, (tokens(units, 128), tokens(units, 128)))


class LSTMClassifier(nn.Module):
    """Words to a class, by the last state."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.words, self.rnn = nn.Embedding(VOCABULARY, width), nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, index: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(self.words(index))[0][:, -1])
        return logits


def lstm(units: int = 32) -> Workload:
    return Workload(LSTMClassifier(), (tokens(units, 32), classes(units)))


class EncoderClassifier(nn.Module):
    """PyTorch's own encoder, and a mean over time."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x).mean(1))
        return logits


def encoder(units: int = 32) -> Workload:
    return Workload(EncoderClassifier(), (torch.randn(units, 32, 128), classes(units)))


class Adapted(nn.Module):
    """A frozen linear layer with an adapter of low rank (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


class LlamaBlock(nn.Module):
    """A block in the shape of Llama's, without positions: attention and a gated MLP behind RMSNorm."""

    def __init__(self, width: int, heads: int, rank: int) -> None:
        super().__init__()
        hidden = 8 * width // 3

        def linear(p: int, q: int) -> nn.Module:
            layer = nn.Linear(p, q, bias=False)
            return Adapted(layer, rank) if rank else layer

        self.heads = heads
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.queries, self.keys, self.values, self.out = (linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (
            part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.queries, self.keys, self.values)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        h = self.between(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


def llama(units: int = 4, length: int = 128, width: int = 1536, layers: int = 16, rank: int = 0) -> Workload:
    """Return a decoder of 0.5 billion parameters; with ``rank``, these are frozen and have adapters."""
    blocks = [LlamaBlock(width, width // 64, rank) for _ in range(layers)]
    table, head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY, bias=False)
    model = nn.Sequential(table, *blocks, nn.RMSNorm(width), head)
    if rank:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".down.weight" in name or ".up.weight" in name)
    text = tokens(units, length + 1)
    return Workload(model, (text[:, :-1], text[:, 1:]))


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "llama": llama,
    "llama, lora": partial(llama, rank=8),
    "mlp": mlp,
    "cnn": cnn,
    "resnet18": resnet18,
    "gpt": gpt,
    "lstm": lstm,
    "encoder": encoder,
    "gpt, expanded positions": partial(gpt, expand=True),
    "cnn, 8 samples a unit": partial(cnn, units=8, unit_size=8),
    **{f"mlp, {n} units": partial(mlp, n) for n in (16, 64, 256)},
    **{f"gpt, {n} units": partial(gpt, n) for n in (32, 64, 256)},
}


def build(name: str) -> Workload:
    """Return a workload with the same weights and data each time."""
    torch.manual_seed(0)
    return WORKLOADS[name]()


def kaiming(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.01)
    return model


def classes(samples: int) -> Tensor:
    return torch.randint(10, (samples,))


def tokens(samples: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (samples, length))
