"""Layers of many kinds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from gram.zoo.registry import (
    Model,
    case,
    cross_entropy,
    four,
    inputs,
    mean_square,
    normal,
    pairs,
    texts,
)
from torch import Tensor, nn


@case
def mlp() -> Any:
    """Linear layers: the plainest use of weights and biases."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), cross_entropy, pairs(4)


@case
def cnn() -> Any:
    """Convolutions with strides and padding."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 3))
    return net, cross_entropy, pairs(2, 6, 6)


@case
def residual_block_with_groupnorm() -> Any:
    """Two ways to one sum, and normalisation of a sample by itself."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return self.head((h + self.skip(x)).relu().mean((2, 3)))

    parts = {
        "conv1": nn.Conv2d(2, 4, 3, padding=1, bias=False),
        "norm1": nn.GroupNorm(2, 4),
        "conv2": nn.Conv2d(4, 4, 3, padding=1, bias=False),
        "norm2": nn.GroupNorm(2, 4),
        "skip": nn.Conv2d(2, 4, 1),
        "head": nn.Linear(4, 3),
    }
    return Model(forward, **parts), cross_entropy, pairs(2, 5, 5)


@case
def grouped_dilated_convolutions() -> Any:
    """Convolutions with groups, dilation and asymmetric padding."""
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding="same")
    )
    return net, mean_square, inputs(4, 5, 5)


@case
def transposed_and_1d_and_3d_convolutions() -> Any:
    """Convolutions of every dimension."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.up(x).tanh()
        return self.flat(h.flatten(2)).mean((1, 2)) + self.deep(h.unsqueeze(2)).mean((1, 2, 3, 4))

    parts = {
        "up": nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1),
        "flat": nn.Conv1d(3, 2, 5),
        "deep": nn.Conv3d(3, 2, (1, 3, 3)),
    }
    return Model(forward, **parts), mean_square, inputs(2, 3, 3)


@case
def instance_norm_that_tracks() -> Any:
    """Running statistics that are written and not used."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.ReLU())
    return net, mean_square, inputs(2, 4, 4)


@case
def dropout() -> Any:
    """Dropout as a module and as a function that is on in eval mode too."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.out(F.dropout(self.drop(self.inner(x).relu()), 0.4))  # the functional one is on in eval mode too

    parts = {"inner": nn.Linear(4, 8), "drop": nn.Dropout(0.5), "out": nn.Linear(8, 3)}
    return Model(forward, **parts), cross_entropy, pairs(4)


@case
def embedding() -> Any:
    """A table with a row that gets no gradient."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))

    model = Model(forward, table=nn.Embedding(7, 4, padding_idx=0), head=nn.Linear(4, 3))
    return model, cross_entropy, texts()


@case
def sparse_embedding() -> Any:
    """A gradient that is sparse."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))

    model = Model(forward, table=nn.Embedding(7, 4, sparse=True), head=nn.Linear(4, 3))
    return model, cross_entropy, texts()


@case
def embedding_bag() -> Any:
    """The weight of a layer used without the layer."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(F.embedding(x, self.bag.weight).sum(1))

    model = Model(forward, bag=nn.EmbeddingBag(7, 4, mode="sum"), head=nn.Linear(4, 3))
    return model, cross_entropy, texts()


@case
def embedding_bags() -> Any:
    """Bags with padding, and with weights for each word."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.mean(x) + self.sum(x, per_sample_weights=x.double() / 7))

    bags = {"mean": nn.EmbeddingBag(7, 4, padding_idx=0), "sum": nn.EmbeddingBag(7, 4, mode="sum")}
    return Model(forward, **bags, head=nn.Linear(4, 3)), cross_entropy, texts()


@case
def bilinear() -> Any:
    """A weight between two inputs."""
    model = Model(
        lambda self, x: self.head(self.pair(x[:, :4], x[:, 4:])), pair=nn.Bilinear(4, 2, 5), head=nn.Linear(5, 3)
    )
    return model, cross_entropy, pairs(6)


@case
def position_embedding_without_batch() -> Any:
    """A table that is looked up once for all samples."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head((self.tokens(x) + self.positions(torch.arange(x.shape[1]))).tanh()).mean(1)

    model = Model(forward, tokens=nn.Embedding(7, 4), positions=nn.Embedding(5, 4), head=nn.Linear(4, 3))
    return model, cross_entropy, texts()


@case
def free_parameters() -> Any:
    """Parameters that broadcast over samples and steps."""

    def forward(self: Any, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), 1, -1)
        return self.head(torch.cat([token, x * self.gain], 1).tanh()).mean(1) + self.offset

    parts = {
        "token": nn.Parameter(torch.randn(1, 1, 4)),
        "gain": nn.Parameter(torch.randn(4)),
        "offset": nn.Parameter(torch.randn(())),
        "head": nn.Linear(4, 3),
    }
    return Model(forward, **parts), cross_entropy, pairs(5, 4)


@case
def inverted_bottleneck() -> Any:
    """As in MobileNet: a convolution of single channels between two of single pixels."""
    block = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.ReLU6(),
        nn.Conv2d(6, 6, 3, 2, 1, groups=6),
        nn.PReLU(6),
        nn.Conv2d(6, 4, 1),
        nn.Hardswish(),
    )
    return (
        nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        cross_entropy,
        pairs(3, 5, 5),
    )


@case
def deeply_nested() -> Any:
    """Names with many dots."""
    net: nn.Module = nn.Linear(4, 4)
    for _ in range(3):
        net = nn.Sequential(net, nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(4, 4))))
    return net, mean_square, inputs(4)


@case
def norms_of_every_kind() -> Any:
    """GroupNorm, RMSNorm, and LayerNorm over two dimensions."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layer(self.rms(self.group(x).transpose(1, 2)))[..., :3].mean(1)

    parts = {"group": nn.GroupNorm(2, 4), "rms": nn.RMSNorm(4), "layer": nn.LayerNorm((5, 4))}
    return Model(forward, **parts), cross_entropy, pairs(4, 5)


@case
def group_norm_of_features() -> Any:
    """GroupNorm of inputs without pixels, as in a perceptron."""
    return nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(3, 6), nn.ReLU(), nn.Linear(6, 3)), cross_entropy, pairs(4)


@case
def experts_in_one_tensor() -> Any:
    """Experts of one tensor, through einsum."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.einsum(
            "be,beo->bo", self.gate(x).softmax(-1), torch.einsum("bi,eio->beo", x, self.experts) + self.bias
        )

    parts = {
        "gate": nn.Linear(4, 2),
        "experts": nn.Parameter(torch.randn(2, 4, 3)),
        "bias": nn.Parameter(torch.randn(2, 3)),
    }
    return Model(forward, **parts), cross_entropy, pairs(4)


@case
def experts_chosen_by_the_data() -> Any:
    """Each sample goes to the expert that its values choose."""

    def forward(self: Any, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        out = torch.zeros(len(x), 3, dtype=x.dtype)
        for e, expert in enumerate((self.first, self.second)):
            out = out.index_add(0, (chosen == e).nonzero()[:, 0], expert(x[chosen == e]))
        return out + self.gate(x).mean(-1, keepdim=True)

    parts = {"gate": nn.Linear(4, 2), "first": nn.Linear(4, 3), "second": nn.Linear(4, 3)}
    return Model(forward, **parts), cross_entropy, pairs(4)


@case
def unused_parameter() -> Any:
    """A parameter that the loss does not depend on."""
    model = Model(lambda self, x: self.used(x), used=nn.Linear(4, 3), unused=nn.Linear(4, 3))
    return model, cross_entropy, pairs(4)


@case
def pooling_of_every_kind() -> Any:
    """Maximum, average, power and adaptive pooling, some of which keep indices."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.max_pool2d(self.conv(x), 2) + F.avg_pool2d(self.conv(x), 2)
        h = F.adaptive_max_pool2d(h, 2) + F.adaptive_avg_pool2d(h, 2) + F.lp_pool2d(h.exp(), 2, 2)
        return self.head(F.max_pool1d(h.flatten(2), 2).flatten(1))

    return Model(forward, conv=nn.Conv2d(2, 3, 3), head=nn.Linear(6, 3)), cross_entropy, pairs(2, 10, 10)


@case
def maximum_pooling_and_its_inverse() -> Any:
    """Indices of maxima lead values back, as in SegNet."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h, where = F.max_pool2d(self.down(x), 2, return_indices=True)
        return self.up(F.max_unpool2d(h, where, 2))

    return Model(forward, down=nn.Conv2d(2, 3, 3, padding=1), up=nn.Conv2d(3, 2, 1)), mean_square, inputs(2, 4, 4)


@case
def pixels_moved_between_channels() -> Any:
    """pixel_shuffle, pixel_unshuffle, fold and unfold."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.pixel_unshuffle(F.pixel_shuffle(self.conv(x), 2).tanh(), 2)
        return F.fold(F.unfold(h, 2, stride=2), (4, 4), 2, stride=2) * self.gain

    parts = {"conv": nn.Conv2d(2, 4, 3, padding=1), "gain": nn.Parameter(torch.randn(4, 1, 1))}
    return Model(forward, **parts), mean_square, inputs(2, 4, 4)


@case
def interpolation_up_and_down() -> Any:
    """Nearest, bilinear and bicubic interpolation between convolutions."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.interpolate(self.conv(x), scale_factor=2, mode="nearest").tanh()
        h = F.interpolate(self.conv(h), size=(5, 5), mode="bilinear", align_corners=False)
        return F.interpolate(h, size=(3, 3), mode="bicubic", align_corners=True)

    return Model(forward, conv=nn.Conv2d(2, 2, 3, padding=1)), mean_square, inputs(2, 4, 4)


@case
def spatial_transformer() -> Any:
    """affine_grid and grid_sample: the image is read where a layer says."""

    def forward(self: Any, x: Tensor) -> Tensor:
        turn = self.turn(x.flatten(1)).view(-1, 2, 3)
        grid = F.affine_grid(turn, list(x.shape), align_corners=False)
        return self.conv(F.grid_sample(x, grid, align_corners=False))

    return Model(forward, turn=nn.Linear(32, 6), conv=nn.Conv2d(2, 2, 1)), mean_square, inputs(2, 4, 4)


@case
def padding_of_every_mode() -> Any:
    """Convolutions that reflect, replicate and wrap around."""
    modes = ("reflect", "replicate", "circular")
    layers = [nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode) for mode in modes]
    return nn.Sequential(*layers, nn.ZeroPad2d(1), nn.Conv2d(2, 2, 3)), mean_square, inputs(2, 4, 4)


@case
def depthwise_convolution_of_sequences() -> Any:
    """As in Mamba: a causal convolution of each channel, and a scan over time."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.silu(self.conv(x.mT)[..., :5]).mT
        return (torch.cumsum(h * self.decay.exp(), 1) * self.gate(x).sigmoid()).mean(1)

    conv = nn.Conv1d(3, 3, 2, groups=3, padding=1)
    return (
        Model(forward, conv=conv, decay=nn.Parameter(torch.randn(3)), gate=nn.Linear(3, 3)),
        cross_entropy,
        pairs(5, 3),
    )


@case
def transposed_convolution_with_groups() -> Any:
    """A transposed convolution with groups and dilation."""
    return nn.ConvTranspose2d(4, 4, 3, stride=2, dilation=2, groups=2), mean_square, inputs(4, 3, 3)


@case
def local_response_and_cosine_normalisation() -> Any:
    """Normalisations without parameters between layers that have some."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.local_response_norm(self.conv(x), 2)
        return F.normalize(h.flatten(1), dim=1) @ F.normalize(self.weight, dim=0)

    return (
        Model(forward, conv=nn.Conv2d(2, 3, 3), weight=nn.Parameter(torch.randn(12, 3))),
        cross_entropy,
        pairs(2, 4, 4),
    )


@case
def activations_with_parameters() -> Any:
    """PReLU with one parameter and with one a channel, and a threshold that is learned."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.maximum(self.each(self.conv(self.one(x))), self.floor)

    parts = {"one": nn.PReLU(), "conv": nn.Conv2d(2, 3, 2), "each": nn.PReLU(3)}
    return Model(forward, **parts, floor=nn.Parameter(torch.tensor(-0.1))), mean_square, inputs(2, 4, 4)


@case
def layers_in_lists_and_dicts() -> Any:
    """ModuleList, ModuleDict, ParameterList and ParameterDict."""

    def forward(self: Any, x: Tensor) -> Tensor:
        for layer, gain in zip(self.layers, self.gains, strict=True):
            x = layer(x).tanh() * gain
        return self.heads["a"](x) + self.offsets["b"]

    parts = {
        "layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(2)),
        "gains": nn.ParameterList(torch.randn(4) for _ in range(2)),
        "heads": nn.ModuleDict({"a": nn.Linear(4, 3), "unused": nn.Linear(4, 3)}),
        "offsets": nn.ParameterDict({"b": torch.randn(3)}),
    }
    return Model(forward, **parts), cross_entropy, pairs(4)


@case
def embeddings_with_options() -> Any:
    """Gradients scaled by frequency, and a table with a largest norm that is written in the forward pass."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head((self.scaled(x) + self.limited(x)).mean(1))

    parts = {"scaled": nn.Embedding(7, 4, scale_grad_by_freq=True), "limited": nn.Embedding(7, 4)}
    return Model(forward, **parts, head=nn.Linear(4, 3)), cross_entropy, texts()


@case
def bags_with_offsets_made_on_the_way() -> Any:
    """An EmbeddingBag of flat words and the offsets where bags begin."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.bag(x.flatten(), torch.arange(len(x)) * x.shape[1]))

    return Model(forward, bag=nn.EmbeddingBag(7, 4, mode="mean"), head=nn.Linear(4, 3)), cross_entropy, texts()


@case
def words_counted_by_index_add() -> Any:
    """Values gathered to places by index_add, scatter_add and one_hot."""

    def forward(self: Any, x: Tensor) -> Tensor:
        counts = torch.zeros(len(x), 7, dtype=self.head.weight.dtype).scatter_add(1, x, self.weights[x])
        return self.head(counts + F.one_hot(x, 7).sum(1))

    return Model(forward, weights=nn.Parameter(torch.randn(7)), head=nn.Linear(7, 3)), cross_entropy, texts()


@case
def matrix_functions() -> Any:
    """Determinants, inverses, Cholesky factors and eigenvalues of matrices that layers make."""

    def forward(self: Any, x: Tensor) -> Tensor:
        root = self.root(x).view(-1, 3, 3)
        cov = root @ root.mT + torch.eye(3, dtype=root.dtype)
        values = torch.linalg.eigvalsh(cov) + torch.linalg.solve(cov, x[:, :3])
        return values + torch.logdet(cov)[:, None] + torch.linalg.cholesky(cov).diagonal(dim1=-2, dim2=-1)

    return Model(forward, root=nn.Linear(4, 9)), mean_square, inputs(4)


@case
def frequencies() -> Any:
    """A layer on the Fourier transform of a signal, as in FNO: a weight of real and imaginary parts."""

    def forward(self: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.lift(x), dim=1)[:, :3]
        spectrum = torch.einsum("bkc,kcd->bkd", spectrum, torch.complex(self.real, self.imaginary))
        return torch.fft.irfft(spectrum, n=6, dim=1)

    parts = {"real": nn.Parameter(torch.randn(3, 4, 4)), "imaginary": nn.Parameter(torch.randn(3, 4, 4))}
    return Model(forward, lift=nn.Linear(2, 4), **parts), mean_square, inputs(6, 2)


@case
def graph_of_neighbours() -> Any:
    """Message passing over a dense adjacency that comes with each sample."""

    def forward(self: Any, batch: Any) -> Tensor:
        x, edges = batch
        for layer in (self.first, self.second):
            x = layer(edges @ x / edges.sum(-1, keepdim=True).clamp_min(1)).relu()
        return x.sum((1, 2))

    def batch() -> Any:
        return normal(5, 4), (normal(5, 5) > 0).double()

    return Model(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4)), mean_square, four(batch)


@case
def codebook_with_a_straight_gradient() -> Any:
    """As in VQ-VAE: the nearest row of a table, and a gradient that goes past it."""

    def loss(module: Any, x: Tensor) -> Tensor:
        z = module.encoder(x)
        nearest = module.codes[torch.cdist(z, module.codes).argmin(1)]
        out = module.decoder(z + (nearest - z).detach())
        return F.mse_loss(out, x) + F.mse_loss(nearest, z.detach()) + 0.25 * F.mse_loss(z, nearest.detach())

    parts = {"encoder": nn.Linear(4, 3), "codes": nn.Parameter(torch.randn(5, 3)), "decoder": nn.Linear(3, 4)}
    return Model(lambda self: None, **parts), loss, inputs(4)


@case
def everything_with_a_rule_of_its_own() -> Any:
    """where, cat, stack, repeat, expand, subtraction and division of parameters."""

    def forward(self: Any, x: Tensor) -> Tensor:
        p, q = self.p, self.q
        rows = torch.cat([x, p.expand(len(x), -1), q.repeat(len(x), 1)], 1)
        rows = torch.where(rows > 0, rows, torch.cat([p, q, p])) / torch.stack([p, q, q]).flatten().exp()
        return rows - torch.cat([q, p, q]) + p.outer(q)[0].sum() + torch.addcmul(p, q, q).mean()

    parts = {"p": nn.Parameter(torch.randn(4)), "q": nn.Parameter(torch.randn(4))}
    return Model(forward, **parts), mean_square, inputs(4)


@case
def products_of_every_kind() -> Any:
    """mv, dot, outer, tensordot, kron, baddbmm, addmm and matrix products with a parameter on either side."""

    def forward(self: Any, x: Tensor) -> Tensor:
        w, v = self.w, self.v
        h = torch.addmm(v, x, w) + torch.tensordot(x, w, ([1], [0])) + (w @ x.mT).mT
        h = h + torch.baddbmm(v.expand(len(x), 1, -1), x[:, None], w.expand(len(x), -1, -1))[:, 0]
        return h * torch.mv(w, v) + torch.dot(v, v) + torch.kron(x, v)[: len(x), :4]

    return Model(forward, w=nn.Parameter(torch.randn(4, 4)), v=nn.Parameter(torch.randn(4))), mean_square, inputs(4)


@case
def fourier_layer_of_a_real_weight() -> Any:
    """As in FNO: a weight of pairs that is viewed as complex, and a gain that is one complex number."""

    def forward(self: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.lift(x), dim=1)
        low = torch.einsum("bkc,kcd->bkd", spectrum[:, :3], torch.view_as_complex(self.weight))
        low = low * torch.view_as_complex(self.gain)
        return self.head(torch.fft.irfft(low, n=6, dim=1).tanh() + self.lift(x))

    parts = {"weight": nn.Parameter(torch.randn(3, 4, 4, 2)), "gain": nn.Parameter(torch.randn(2))}
    return Model(forward, lift=nn.Linear(2, 4), head=nn.Linear(4, 3), **parts), mean_square, inputs(6, 2)


@case
def fourier_layer_of_complex_weights() -> Any:
    """As in FNO over images: complex parameters for the low frequencies at both ends of one axis."""

    def forward(self: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(self.lift(x).movedim(-1, 1))
        out = torch.zeros_like(spectrum)
        out[:, :, :2, :2] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :2, :2], self.low)
        out[:, :, -2:, :2] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -2:, :2], self.high)
        return self.head(torch.fft.irfft2(out, s=(4, 4)).movedim(1, -1).tanh())

    parts = {name: nn.Parameter(torch.randn(3, 3, 2, 2, dtype=torch.cdouble)) for name in ("low", "high")}
    ends = {"lift": nn.Linear(1, 3).double(), "head": nn.Linear(3, 1).double()}
    return Model(forward, **ends, **parts), mean_square, inputs(4, 4, 1)


@case
def state_space_of_diagonal_matrices() -> Any:
    """As in S4D: a kernel of complex exponentials, from real parameters alone, by which a signal is filtered."""

    def forward(self: Any, x: Tensor) -> Tensor:
        steps = x.shape[1]
        rates = torch.complex(-self.decay.exp(), self.frequency)
        kernel = torch.einsum("hs,hsl->hl", torch.view_as_complex(self.out), (rates[..., None] * self.time).exp()).real
        spectrum = torch.fft.rfft(x.mT, n=2 * steps) * torch.fft.rfft(kernel, n=2 * steps)
        return self.head(torch.fft.irfft(spectrum, n=2 * steps)[..., :steps].mT + self.skip * x).mean(1)

    shapes = {"decay": (3, 2), "frequency": (3, 2), "out": (3, 2, 2), "skip": (3,)}
    parts = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    model = Model(forward, head=nn.Linear(3, 3), **parts)
    model.register_buffer("time", torch.arange(5.0))
    return model, cross_entropy, pairs(5, 3)


@case
def experts_without_tokens() -> Any:
    """Tokens are sorted by their expert, and an expert may get none."""

    def forward(self: Any, batch: Any) -> Tensor:
        x, chosen = batch[0].flatten(0, 1), batch[1].flatten()
        order = chosen.argsort(stable=True)
        parts = x[order].split(torch.bincount(chosen, minlength=3).tolist())
        rows = torch.cat([expert(part).tanh() for expert, part in zip(self.experts, parts, strict=True)])
        return self.head(rows[order.argsort()]).unflatten(0, batch[1].shape).mean(1)

    def of(*experts: int) -> Any:
        return normal(4, 3), torch.stack([torch.tensor(experts)[torch.randperm(4)] for _ in range(6)])

    experts = nn.ModuleList([nn.Linear(3, 5) for _ in range(3)])
    batches = [of(0, 0, 2, 2), of(0, 0, 0, 0), of(0, 1, 2, 2), of(1, 1, 1, 2)]
    return Model(forward, experts=experts, head=nn.Linear(5, 3)), mean_square, batches
