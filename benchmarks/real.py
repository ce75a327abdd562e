"""Models as people train them, without dropout: padding, BatchNorm, class weights, losses of their own, metrics.

    python benchmarks/real.py [--models gpt2 t5] [--engine auto] [--rounds 7] [--peers torchjd opacus]

The table has milliseconds of one ordinary forward and backward pass of the same samples, the first measurement and a
later one in such passes, and the largest error of the Gram beside that of the loop; then a later measurement by each
peer, or what it answers: it fails, or the Gram is wrong. One thread, processor time, in turns in one process, medians.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peers import PEERS
from speed import Measured, compare
from torch import Tensor, nn

MODELS: dict[str, Callable[[], Measured]] = {}


def model(function: Callable[[], Any]) -> Callable[[], Any]:
    """Add a function that returns a module, its loss and a batch."""

    def build() -> Measured:
        torch.manual_seed(0)
        return Measured(*function())

    MODELS[function.__name__] = build
    return function


def of_hugging_face(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = module(**batch).loss
    return loss


def mean_over_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each sample, a text."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)


def of_next_tokens(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return mean_over_tokens(module(**batch).logits[:, :-1], batch["labels"][:, 1:])


def of_labelled_tokens(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return mean_over_tokens(module(**batch).logits, batch["labels"])


def of_labelled_samples(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(module(**batch).logits, batch["labels"], reduction="none")


def ids(samples: int, length: int) -> Tensor:
    return torch.randint(3, 500, (samples, length))


def padding(samples: int, length: int) -> Tensor:
    """Return masks of different lengths, one of seven samples without padding."""
    lengths = torch.tensor([length - (i % 7) * 4 for i in range(samples)])
    return (torch.arange(length) < lengths[:, None]).long()


@model
def gpt2() -> Any:
    import transformers as t

    drop: dict[str, Any] = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
    config = t.GPT2Config(vocab_size=1000, n_embd=256, n_layer=4, n_head=4, n_positions=128, **drop)
    x = ids(16, 128)
    return t.GPT2LMHeadModel(config), of_hugging_face, {"input_ids": x, "labels": x.clone()}, of_next_tokens


@model
def gpt2_padded() -> Any:
    module, loss, batch, losses = gpt2()
    mask = padding(16, 128)
    padded = {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
    return module, loss, batch | padded, losses


@model
def bert_padded() -> Any:
    import transformers as t

    sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 1024, "vocab_size": 1000}
    drop: dict[str, Any] = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    module = t.BertForSequenceClassification(t.BertConfig(**sizes, **drop))
    batch = {"input_ids": ids(32, 64), "attention_mask": padding(32, 64), "labels": torch.randint(2, (32,))}
    return module, of_hugging_face, batch, of_labelled_samples


@model
def t5_padded() -> Any:
    import transformers as t

    sizes: dict[str, Any] = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4}
    sizes |= {"vocab_size": 1000, "dropout_rate": 0, "decoder_start_token_id": 0}
    module = t.T5ForConditionalGeneration(t.T5Config(**sizes))
    y = ids(16, 32)
    y[::3, 20:] = -100
    batch = {"input_ids": ids(16, 64), "attention_mask": padding(16, 64), "labels": y}
    return module, of_hugging_face, batch, of_labelled_tokens


@model
def vit() -> Any:
    import transformers as t

    sizes: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 768, "image_size": 32, "patch_size": 4, "num_labels": 10}
    module = t.ViTForImageClassification(t.ViTConfig(**sizes))
    batch = {"pixel_values": torch.randn(32, 3, 32, 32), "labels": torch.randint(10, (32,))}
    return module, of_hugging_face, batch, of_labelled_samples


@model
def llama() -> Any:
    import transformers as t

    sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 688, "vocab_size": 1000}
    x = ids(16, 128)
    module = t.LlamaForCausalLM(t.LlamaConfig(**sizes))
    return module, of_hugging_face, {"input_ids": x, "labels": x.clone()}, of_next_tokens


class Block(nn.Module):
    """A basic block of a ResNet, with BatchNorm."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Sequential()
        if stride != 1 or channels != out:
            self.skip.extend([nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)])

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


def resnet18() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    channels = 32
    for out, stride in ((32, 1), (64, 2), (128, 2), (256, 2)):
        layers += [Block(channels, out, stride), Block(out, out, 1)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 3, 32, 32), torch.randint(10, (32,))


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def cross_entropies(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


@model
def resnet_batchnorm() -> Any:
    return resnet18(), cross_entropy, images(), cross_entropies


@model
def resnet_batchnorm_weights_smoothing() -> Any:
    weight = torch.rand(10) + 0.5

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], weight=weight, label_smoothing=0.1)

    def losses(module: nn.Module, batch: Any) -> Tensor:
        summed = F.cross_entropy(module(batch[0]), batch[1], weight=weight, label_smoothing=0.1, reduction="none")
        return summed / weight[batch[1]]

    return resnet18(), loss, images(), losses


@model
def resnet_batchnorm_metrics() -> Any:
    """Return a ResNet with an accuracy of torchmetrics, ``loss.item()`` and a guard in the step."""
    import torchmetrics

    module = resnet18()
    module.accuracy = torchmetrics.classification.MulticlassAccuracy(10)
    body, kept = nn.Sequential(*(part for name, part in module.named_children() if name != "accuracy")), []
    module.forward = body.forward

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        found = F.cross_entropy(out, batch[1])
        if torch.isnan(found):
            raise ValueError("the loss is not a number")
        kept.append(found.item())
        module.accuracy(out.detach(), batch[1])
        return found

    return module, loss, images(), cross_entropies


@model
def mlp_with_a_loss_of_its_own() -> Any:
    module = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 1))

    def losses(module: nn.Module, batch: Any) -> Tensor:
        return torch.log(torch.cosh(module(batch[0]).squeeze(-1) - batch[1]))

    return module, lambda module, batch: losses(module, batch).mean(), (torch.randn(32, 64), torch.randn(32)), losses


@model
def small_mlp() -> Any:
    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return module, cross_entropy, (torch.randn(32, 64), torch.randint(10, (32,))), cross_entropies


@model
def small_cnn() -> Any:
    first = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    second = (nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
    module = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(512, 10))
    return module, cross_entropy, (torch.randn(32, 1, 8, 8), torch.randint(10, (32,))), cross_entropies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    columns = ["model", "ordinary, ms", "engine", "first", "later", "later, ms above", "error", *options.peers]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    failures = []
    for name in options.models:
        row, reasons = compare(MODELS[name], options.engine, options.rounds, options.peers)
        print(f"| {name} | {row} |", flush=True)
        failures += [f"{name}, {reason}" for reason in reasons]
    print("", *failures, sep="\n")


if __name__ == "__main__":
    main()
