"""Families of Hugging Face models with padded batches: ghost measures them and is exact.

Mixtral alone goes through the loop: the grouped product of its experts (GroupedMmBackward0) has no rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gram.oracle import Grams, error, expected, measure
from gram.zoo.registry import SAMPLES, Case, cast, labels, normal, until
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # whatever these models have to say of themselves

T = transformers
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = SMALL | {"num_key_value_heads": 1}
SEQUENCES = {"vocab_size": 40, "d_model": 16, "num_hidden_layers": 2, "max_position_embeddings": 32}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
FEED = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
IMAGES = {"image_size": 16, "num_labels": 3}
LENGTHS = ([8, 8, 8, 8, 8, 8], [8, 4, 8, 6, 8, 2], [3, 5, 8, 8, 4, 4], [5, 5, 5, 5, 5, 5])


def tokens(length: int = 8) -> Tensor:
    """Return random tokens without those of padding."""
    return torch.randint(3, 40, (SAMPLES, length))


def text(lengths: list[int]) -> dict[str, Tensor]:
    """Return a batch for a language model, padded and with padding ignored."""
    mask, ids = until(lengths, 8).long(), tokens()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def sentence(lengths: list[int]) -> dict[str, Tensor]:
    """Return a batch for a classifier of texts."""
    return text(lengths) | {"labels": labels(2)}


def translation(lengths: list[int]) -> dict[str, Tensor]:
    """Return a batch for an encoder and decoder."""
    return text(lengths) | {"labels": tokens(5)}


def image(_: list[int]) -> dict[str, Tensor]:
    """Return a batch for a classifier of images."""
    return {"pixel_values": normal(3, 16, 16), "labels": labels()}


def speech(_: list[int]) -> dict[str, Tensor]:
    """Return a batch for a transcriber."""
    return {"input_features": normal(8, 32), "labels": tokens(5)}


def captioned(_: list[int]) -> dict[str, Any]:
    """Return a batch of images with captions."""
    return {"input_ids": tokens(), "pixel_values": normal(3, 16, 16), "return_loss": True}


def clip() -> Any:
    """Return a model of images and texts."""
    words = SMALL | {"eos_token_id": 2}
    pictures = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}
    return T.CLIPModel(T.CLIPConfig(text_config=words, vision_config=pictures, projection_dim=8))


def whisper() -> Any:
    """Return a transcriber."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"vocab_size": 40, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    return T.WhisperForConditionalGeneration(T.WhisperConfig(**sizes, **LAYERS, **FEED, **special))


Builder = Callable[[], Any]
FAMILIES: dict[str, tuple[Builder, Callable[[list[int]], dict[str, Any]]]] = {
    "gpt2": (lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)), text),
    "llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)), text),
    "opt": (
        lambda: T.OPTForCausalLM(
            T.OPTConfig(**(SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32}))
        ),
        text,
    ),
    "mixtral": (lambda: T.MixtralForCausalLM(T.MixtralConfig(**GROUPED, num_local_experts=4)), text),
    "qwen2": (lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**GROUPED)), text),
    "gemma2": (lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**GROUPED, head_dim=8)), text),
    "mamba": (
        lambda: T.MambaForCausalLM(T.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)),
        text,
    ),
    "bert": (lambda: T.BertForSequenceClassification(T.BertConfig(**SMALL)), sentence),
    "roberta": (
        lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**SMALL, max_position_embeddings=40)),
        sentence,
    ),
    "deberta": (lambda: T.DebertaV2ForSequenceClassification(T.DebertaV2Config(**SMALL)), sentence),
    "distilbert": (
        lambda: T.DistilBertForSequenceClassification(
            T.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
        ),
        sentence,
    ),
    "electra": (lambda: T.ElectraForSequenceClassification(T.ElectraConfig(**SMALL, embedding_size=16)), sentence),
    "t5": (
        lambda: T.T5ForConditionalGeneration(
            T.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
        translation,
    ),
    "bart": (lambda: T.BartForConditionalGeneration(T.BartConfig(**SEQUENCES, **LAYERS, **FEED)), translation),
    "vit": (lambda: T.ViTForImageClassification(T.ViTConfig(**SMALL, **IMAGES, patch_size=4)), image),
    "swin": (
        lambda: T.SwinForImageClassification(
            T.SwinConfig(**IMAGES, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        image,
    ),
    "convnext": (
        lambda: T.ConvNextForImageClassification(
            T.ConvNextConfig(num_labels=3, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
        ),
        image,
    ),
    "resnet": (
        lambda: T.ResNetForImageClassification(
            T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        ),
        image,
    ),
    "whisper": (whisper, speech),
    "clip": (clip, captioned),
}
# Promised, and not there yet: a unit that goes its own way alone is joined with the others in another layout.
NOT_YET = {(name, 2) for name in ("gpt2", "bert", "distilbert", "electra", "bart")}
SINGLE = {"mixtral"}  # its experts have no kernel for float64
CAST_INSIDE = {
    "t5",
    "llama",
    "qwen2",
    "gemma2",
    "mamba",
    "mixtral",
}  # norms or losses in float32 always


@pytest.mark.parametrize(
    ("name", "unit_size"),
    [
        pytest.param(name, k, marks=pytest.mark.xfail(strict=True) if (name, k) in NOT_YET else ())
        for name in FAMILIES
        for k in (1, 2)
    ],
)
def test_family(name: str, unit_size: int) -> None:
    torch.manual_seed(0)
    build, batch = FAMILIES[name]
    dtype = torch.float32 if name in SINGLE else torch.float64
    model = build().train().to(dtype)
    switch_off_paths(model)
    batches = [cast(batch(lengths), dtype) for lengths in LENGTHS]
    case = Case(model, lambda module, batch: module(**batch).loss, batches)

    def measured(measurement: int, batch: Any, want: Grams) -> None:
        got, engine = measure(case.module, case.loss_fn, batch, unit_size)
        assert engine == ("loop" if name == "mixtral" else "ghost")
        assert error(got, want) < (1e-5 if name in CAST_INSIDE else 1e-8)

    expected(case, unit_size, measured)


def switch_off_paths(model: Any) -> None:
    """Set what Hugging Face drops by hand to nothing, as an oracle cannot draw the same."""
    for key in ("drop_path_rate", "attention_dropout", "attn_pdrop", "layerdrop", "encoder_layerdrop"):
        if hasattr(model.config, key):
            setattr(model.config, key, 0.0)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
