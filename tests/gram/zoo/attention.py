"""Recurrent layers and attention."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from gram.zoo.registry import (
    SAMPLES,
    Model,
    case,
    cross_entropy,
    four,
    inputs,
    labels,
    mean_square,
    normal,
    pairs,
    single,
    texts,
    until,
)
from torch import Tensor, nn


@case
def decoder_that_only_gets_a_state() -> Any:
    """An LSTM whose inputs are the same for all units, which meet it in its states, as in forecasting."""

    def forward(self: Any, x: Tensor) -> Tensor:
        _, state = self.encoder(x)
        steps = torch.arange(3, dtype=x.dtype).view(1, 3, 1).expand(len(x), 3, 1)
        return self.head(self.decoder(steps, state)[0]).mean(1)

    layers = {"encoder": nn.LSTM(3, 4, batch_first=True), "decoder": nn.LSTM(1, 4, batch_first=True)}
    return Model(forward, **layers, head=nn.Linear(4, 3)), cross_entropy, pairs(5, 3)


@case
def lstm() -> Any:
    """A recurrent layer, in float64 without a fused kernel."""
    model = Model(
        lambda self, x: self.head(self.rnn(x)[0][:, -1]), rnn=nn.LSTM(3, 4, batch_first=True), head=nn.Linear(4, 3)
    )
    return model, cross_entropy, pairs(5, 3)


@case
def bidirectional_gru_with_dropout() -> Any:
    """Both directions, two layers and dropout between them."""
    rnn = nn.GRU(3, 4, num_layers=2, bidirectional=True, dropout=0.5)
    model = Model(lambda self, x: self.head(self.rnn(x.transpose(0, 1))[0].mean(0)), rnn=rnn, head=nn.Linear(8, 3))
    return model, cross_entropy, pairs(5, 3)


@case
def recurrent_layer_with_time_first() -> Any:
    """Samples on dimension 1 of a recurrent layer."""
    model = Model(
        lambda self, x: self.head(self.rnn(x.transpose(0, 1))[0]).mean(0), rnn=nn.RNN(3, 4), head=nn.Linear(4, 3)
    )
    return model, cross_entropy, pairs(5, 3)


@case
def gru_of_two_layers_behind_a_layer() -> Any:
    """The rows of a recurrent layer have time outermost, and what comes into it is no leaf."""
    model = Model(
        lambda self, x: self.head(self.rnn(self.layer(x))[0]).mean(1),
        layer=nn.Linear(3, 8),
        rnn=nn.GRU(8, 8, 2, batch_first=True),
        head=nn.Linear(8, 3),
    )
    return model, cross_entropy, pairs(5, 3)


@case
def transformer_encoder() -> Any:
    """PyTorch's own encoder."""
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.3, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Model(lambda self, x: self.enc(x).mean(1), enc=encoder), cross_entropy, pairs(5, 4)


@case
def attention_with_time_first() -> Any:
    """Samples on dimension 1."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attention(x, x, x, need_weights=False)[0].mean(0)

    return Model(forward, attention=nn.MultiheadAttention(4, 2, dropout=0.2)), cross_entropy, pairs(5, 4)


@case
def scaled_dot_product_attention_with_dropout() -> Any:
    """Attention as a function, with dropout and the causal flag."""

    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, None, 0.3, True).mean(1)

    return Model(forward, qkv=nn.Linear(4, 12)), cross_entropy, pairs(5, 4)


@case
def transformer() -> Any:
    """Encoder and decoder."""
    model = nn.Transformer(4, 2, 1, 1, dim_feedforward=8, dropout=0.1, batch_first=True)
    return Model(lambda self, x: self.t(x, x[:, :3]).mean(1), t=model), cross_entropy, pairs(5, 4)


@case
def transformer_with_time_first() -> Any:
    """Encoder and decoder with samples on dimension 1."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True", UserWarning)
        model = nn.Transformer(4, 2, 1, 1, dim_feedforward=8, dropout=0.1)

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.t(x, x[:3]).mean(0)

    return Model(forward, t=model), cross_entropy, pairs(5, 4)


@case
def as_many_steps_as_samples() -> Any:
    """Steps and samples cannot be told apart by their number."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.head(self.norm(h).transpose(0, 1).tanh()).mean(0)

    parts = {"tokens": nn.Embedding(7, 4), "positions": nn.Embedding(6, 4), "norm": nn.LayerNorm(4)}
    return Model(forward, **parts, head=nn.Linear(4, 3)), cross_entropy, texts(6)


def recurrent(kind: type[nn.RNNBase], length: int = 5, state: bool = False, **options: Any) -> Any:
    """Return a recurrent layer between linear ones, with a first state that is computed or none."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.below(x if self.rnn.batch_first else x.transpose(0, 1))
        initial = (self.start(x.mean(1)).unflatten(1, (-1, 4)).transpose(0, 1).contiguous(),) if state else ()
        if state and kind is nn.LSTM:
            initial = ((initial[0], 3 * initial[0]),)
        out, last = self.rnn(h, *initial)
        last = torch.cat(last) if isinstance(last, tuple) else last
        seen = out if self.rnn.batch_first else out.transpose(0, 1)
        return self.head(seen).mean(1) + last.mean((0, 2))[:, None] + h.mean()

    rnn = kind(3, 4, **options)
    directions = 2 if rnn.bidirectional else 1
    parts = {"below": nn.Linear(3, 3), "rnn": rnn, "head": nn.Linear(4 * directions, 3)}
    if state:
        parts["start"] = nn.Linear(3, 4 * directions * rnn.num_layers)
    return Model(forward, **parts), cross_entropy, pairs(length, 3)


@single
def lstm_in_float32() -> Any:
    """The fused kernel, which only float32 has on a CPU."""
    return recurrent(nn.LSTM, batch_first=True)


@single
def lstm_time_first_in_float32() -> Any:
    """The fused kernel with samples on dimension 1."""
    return recurrent(nn.LSTM)


@single
def stacked_bidirectional_lstm_in_float32() -> Any:
    """The fused kernel, twice in both directions, from a first state that has parameters below."""
    return recurrent(nn.LSTM, state=True, num_layers=2, bidirectional=True, batch_first=True)


@single
def lstm_without_biases_in_float32() -> Any:
    """The fused kernel without biases."""
    return recurrent(nn.LSTM, bias=False, batch_first=True)


@single
def lstm_of_as_many_steps_as_samples_in_float32() -> Any:
    """Steps and samples of the fused kernel cannot be told apart by their number."""
    return recurrent(nn.LSTM, length=6, batch_first=True)


@single
def gru_in_float32() -> Any:
    """Two layers in both directions."""
    return recurrent(nn.GRU, num_layers=2, bidirectional=True, batch_first=True)


@case
def lstm_from_a_given_state() -> Any:
    """A first state that has parameters below it."""
    return recurrent(nn.LSTM, state=True, num_layers=2)


@case
def gru_from_a_given_state() -> Any:
    """A first state, batch first and in both directions."""
    return recurrent(nn.GRU, state=True, bidirectional=True, batch_first=True)


@case
def rnn_of_rectified_units() -> Any:
    """The plain recurrent layer with a ReLU, in two layers."""
    return recurrent(nn.RNN, nonlinearity="relu", num_layers=2, batch_first=True)


@case
def lstm_with_a_projection() -> Any:
    """A state that is projected to fewer features than the cell has."""
    model = Model(
        lambda self, x: self.head(self.rnn(x)[0][:, -1]),
        rnn=nn.LSTM(3, 4, proj_size=2, batch_first=True),
        head=nn.Linear(2, 3),
    )
    return model, cross_entropy, pairs(5, 3)


@case
def recurrent_cells_in_a_loop_of_python() -> Any:
    """LSTMCell and GRUCell step by step, with weights used once a step."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = c = g = torch.zeros(len(x), 4, dtype=x.dtype)
        for step in x.unbind(1):
            h, c = self.lstm(step, (h, c))
            g = self.gru(h, g)
        return self.head(g)

    parts = {"lstm": nn.LSTMCell(3, 4), "gru": nn.GRUCell(4, 4), "head": nn.Linear(4, 3)}
    return Model(forward, **parts), cross_entropy, pairs(4, 3)


@case
def recurrent_cells_that_begin_by_themselves() -> Any:
    """Cells without a first state; one has no biases, and one also takes a single vector."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h, state, r = None, None, None
        for step in x.unbind(1):
            h = self.gru(step, h)
            state = self.lstm(h, state)
            r = self.rnn(state[1], r)
        first = self.rnn(torch.cat([x[0, 0], x[0, 1, :1]]))  # a single vector
        return self.head(r) + first[:3]

    parts = {"gru": nn.GRUCell(3, 4, bias=False), "lstm": nn.LSTMCell(4, 4), "head": nn.Linear(4, 3)}
    return Model(forward, rnn=nn.RNNCell(4, 4, nonlinearity="relu"), **parts), cross_entropy, pairs(4, 3)


@case
def packed_sequences() -> Any:
    """Sequences of different lengths, packed: how samples lie depends on the data."""

    def loss(module: Any, batch: Any) -> Tensor:
        x, lengths, y = batch
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return F.cross_entropy(module.head(module.rnn(packed)[1][0]), y)

    model = Model(lambda self: None, rnn=nn.GRU(3, 4, batch_first=True), head=nn.Linear(4, 3))
    return model, loss, four(lambda: (normal(5, 3), torch.randint(1, 6, (SAMPLES,)), labels()))


def attended(mask: Any, **options: Any) -> Any:
    """Return an attention layer whose keyword arguments ``mask`` makes of the batch."""

    def forward(self: Any, x: Tensor) -> Tensor:
        out, weights = self.attention(x, x, x, **mask(x))
        return out.mean(1) + (0 if weights is None else weights.square().mean())

    model = Model(forward, attention=nn.MultiheadAttention(4, 2, batch_first=True, **options), head=nn.Linear(4, 3))
    return model, mean_square, inputs(5, 4)


@case
def attention_with_weights_and_padding() -> Any:
    """The weights of attention are in the loss, and keys are masked by the data."""
    return attended(lambda x: {"need_weights": True, "key_padding_mask": x[..., 0] > 2 * x[:, :1, 0].abs() + 0.01})


@case
def attention_with_padding() -> Any:
    """Keys masked by the data, without weights."""
    return attended(lambda x: {"need_weights": False, "key_padding_mask": x[..., 0] > 2 * x[:, :1, 0].abs() + 0.01})


@case
def attention_with_a_causal_mask() -> Any:
    """A mask that all samples share."""
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    return attended(lambda x: {"attn_mask": mask, "is_causal": True, "need_weights": False})


@case
def attention_with_a_mask_for_each_head() -> Any:
    """A mask of shape (samples times heads, queries, keys)."""
    mask = lambda x: (x[:, :, None, 0] > x[:, None, :, 0] + 0.01).repeat_interleave(2, 0)  # noqa: E731
    return attended(lambda x: {"attn_mask": mask(x), "average_attn_weights": False})


@case
def attention_with_more_keys() -> Any:
    """Keys and values with learned additions and a zero."""
    return attended(lambda x: {"need_weights": False}, add_bias_kv=True, add_zero_attn=True)


@case
def attention_to_several_sets_of_keys() -> Any:
    """Keys and values with a dimension more than the queries."""

    def forward(self: Any, x: Tensor) -> Tensor:
        keys = torch.stack([self.first(x), self.second(x)])
        return F.scaled_dot_product_attention(x, keys, keys.tanh()).mean((0, 2))

    return Model(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4)), cross_entropy, pairs(5, 4)


@case
def attention_from_other_inputs() -> Any:
    """Keys and values of other sizes than the queries."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.attention(x, self.memory(x), self.memory(x)[..., :2])[0].mean(1)

    attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True)
    return Model(forward, attention=attention, memory=nn.Linear(4, 3)), mean_square, inputs(5, 4)


@case
def attention_with_a_bias_that_is_learned() -> Any:
    """A mask of floats with a gradient, and grouped keys."""

    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (
            self.q(x).unflatten(-1, (4, 2)).mT,
            self.k(x).unflatten(-1, (2, 2)).mT,
            x[:, None].expand(-1, 2, -1, -1),
        )
        q, k = q.permute(0, 3, 1, 2), k.permute(0, 3, 1, 2)
        return F.scaled_dot_product_attention(q, k, v, self.bias, scale=0.3, enable_gqa=True).mean((1, 2))

    parts = {"q": nn.Linear(4, 8), "k": nn.Linear(4, 4), "bias": nn.Parameter(torch.randn(4, 5, 5))}
    return Model(forward, **parts), mean_square, inputs(5, 4)


@case
def attention_written_by_hand() -> Any:
    """Causal self-attention with masked_fill, rotary positions and one softmax."""

    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 5, 3, 2, 2).permute(2, 0, 3, 1, 4)
        angle = torch.arange(5, dtype=x.dtype)[:, None]
        q, k = (torch.cat([t[..., :1] * angle.cos() - t[..., 1:] * angle.sin(), t[..., 1:]], -1) for t in (q, k))
        scores = (q @ k.mT).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), 5, 4)).mean(1)

    return Model(forward, qkv=nn.Linear(4, 12), out=nn.Linear(4, 3)), cross_entropy, pairs(5, 4)


@case
def decoder_that_attends_to_memory() -> Any:
    """PyTorch's own decoder, with masks and padding."""
    layer = nn.TransformerDecoderLayer(4, 2, dim_feedforward=8, dropout=0.2, batch_first=True, norm_first=True)

    def forward(self: Any, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, 4] = x[:, 4, 0] > 0
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        return self.decoder(x, x, tgt_mask=mask, memory_key_padding_mask=padding).mean(1)

    return Model(forward, decoder=nn.TransformerDecoder(layer, 2, nn.LayerNorm(4))), cross_entropy, pairs(5, 4)


@case
def encoder_with_padding() -> Any:
    """PyTorch's own encoder with masked keys, in training mode."""
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.0, batch_first=True, activation="gelu")

    def forward(self: Any, batch: Any) -> Tensor:
        x, keep = batch
        return (self.encoder(x, src_key_padding_mask=keep == 0) * keep[..., None]).sum(1)

    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    lengths = [[5, 2, 3, 1, 4, n] for n in (5, 3, 1, 2)]
    return Model(forward, encoder=encoder), mean_square, [(normal(5, 4), until(n).double()) for n in lengths]


@case
def frozen_encoder_of_padded_texts() -> Any:
    """Features of an encoder in evaluation mode, which PyTorch computes on its fast path, with nested tensors."""
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nested.nested_tensor([torch.zeros(1)])  # PyTorch says once that they are a prototype

    def forward(self: Any, batch: Any) -> Tensor:
        x, hidden = batch
        with torch.no_grad():
            features = self.encoder(x, src_key_padding_mask=hidden)
        return self.head(features.masked_fill(hidden[..., None], 0).sum(1))

    def batch() -> Any:
        lengths = torch.randint(2, 6, (SAMPLES,))
        return normal(5, 4), torch.arange(5) >= lengths[:, None]

    return Model(forward, encoder=encoder, head=nn.Linear(4, 3)), mean_square, four(batch)
