"""Derivatives in the loss, custom Functions, checkpoints and hooks."""

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
    two_layers,
    words,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


def checkpointed(use_reentrant: bool) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(checkpoint(self.inner, h, use_reentrant=use_reentrant))

    inner = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh())
    model = Model(forward, first=nn.Linear(4, 5), inner=inner, last=nn.Linear(5, 3))
    return model, cross_entropy, pairs(4)


@case
def checkpoint_without_reentry() -> Any:
    """The part of the forward pass that is run again in the backward pass."""
    return checkpointed(use_reentrant=False)


@case
def checkpoint_with_reentry() -> Any:
    """A checkpoint that runs a backward pass of its own."""
    return checkpointed(use_reentrant=True)


class Cube(torch.autograd.Function):
    """A custom function of the old kind, without what torch.func needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@case
def custom_autograd_function() -> Any:
    """A custom Function without what torch.func needs."""
    return Model(lambda self, x: Cube.apply(self.layer(x)), layer=nn.Linear(4, 3)), mean_square, inputs(4)


@case
def sum_that_starts_as_a_leaf() -> Any:
    """Losses are added to a zero that requires grad, as in quantizers of libraries."""

    def loss(module: Any, x: Tensor) -> Tensor:
        total = torch.tensor([0.0], dtype=x.dtype).requires_grad_()
        return (total + module(x).square().mean()).sum()

    return nn.Linear(4, 3), loss, inputs(4)


cube = Cube.apply


@case
def custom_function_by_another_name() -> Any:
    """An alias of ``apply``, as most code has it."""
    return Model(lambda self, x: cube(self.layer(x)), layer=nn.Linear(4, 3)), mean_square, inputs(4)


def penalised(inner: nn.Module) -> Any:
    """Return a critic as in WGAN-GP: the norm of the gradient with respect to inputs between two."""

    def loss(module: Any, batch: Any) -> Tensor:
        x, fake = batch
        between = (0.3 * x + 0.7 * fake).requires_grad_(True)
        y = module(between)
        (g,) = torch.autograd.grad(
            outputs=y, inputs=between, grad_outputs=torch.ones_like(y), create_graph=True, retain_graph=True
        )
        penalty = ((g.view(len(g), -1).norm(2, dim=1) - 1) ** 2).mean()
        return module(fake).mean() - module(x).mean() + 10 * penalty

    return two_layers(inner, out=1), loss, four(lambda: (normal(4), normal(4)))


@case
def gradient_penalty() -> Any:
    return penalised(nn.Tanh())


@case
def gradient_penalty_through_a_layer_norm() -> Any:
    """The weight of the norm is used in the gradient too, by a node whose other operands lead to the weight."""
    return penalised(nn.Sequential(nn.LayerNorm(5), nn.SiLU()))


@case
def gradient_penalty_through_a_batch_norm() -> Any:
    return penalised(nn.Sequential(nn.BatchNorm1d(5), nn.SiLU()))


@case
def gradient_penalty_through_running_statistics() -> Any:
    return penalised(nn.Sequential(nn.BatchNorm1d(5), nn.SiLU()).eval())


@case
def gradient_penalty_through_convolutions() -> Any:
    norm = nn.InstanceNorm1d(2, affine=True)
    inner = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3, padding=1), norm, nn.PReLU())
    return penalised(nn.Sequential(*inner, nn.Conv1d(2, 1, 3, padding=1), nn.Flatten()))


@case
def physics_with_second_derivatives() -> Any:
    """As in PINNs: first and second derivatives of the outputs."""

    def loss(module: Any, batch: Any) -> Tensor:
        x = batch.clone().requires_grad_()
        u = module(x)[:, :1]
        g = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        gg = torch.autograd.grad(g[:, 0].sum(), x, create_graph=True)[0]
        return (g.square().sum(1) - 1).square().mean() + gg[:, 0].square().mean()

    return two_layers(), loss, inputs(4)


@case
def physics_with_two_inputs() -> Any:
    """Derivatives by time and place, and a boundary."""

    def loss(module: Any, batch: Any) -> Tensor:
        t, x = (part[:, None].requires_grad_() for part in batch.detach().clone().unbind(1))
        u = module(torch.cat([t, x, t * x, x.sin()], 1))
        ones = torch.ones_like(u)
        u_t, u_x = torch.autograd.grad(u, (t, x), ones, create_graph=True)
        u_xx = torch.autograd.grad(u_x, x, torch.ones_like(u_x), create_graph=True)[0]
        return (u_t + u * u_x - 0.01 * u_xx).square().mean() + module(torch.zeros(1, 4, dtype=u.dtype)).square().mean()

    return two_layers(out=1), loss, inputs(2)


@case
def derivatives_by_torch_func() -> Any:
    """jacrev and vmap of the user's own within the loss."""

    def loss(module: Any, batch: Any) -> Tensor:
        jacobians = torch.func.vmap(torch.func.jacrev(module.layers))(batch)
        return jacobians.square().sum((1, 2)).mean()

    return Model(lambda self: None, layers=two_layers()), loss, inputs(4)


@case
def hessians_by_torch_func() -> Any:
    """A Laplacian, as in PINNs: torch.func makes tensors within the loss."""

    def loss(module: Any, batch: Any) -> Tensor:
        hessians = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(lambda x: module.layers(x).sum())))(batch)
        return hessians.diagonal(dim1=1, dim2=2).sum(1).square().mean()

    return Model(lambda self: None, layers=two_layers()), loss, inputs(4)


@case
def score_matching() -> Any:
    """A trace of the Hessian, by one derivative for each feature."""

    def loss(module: Any, batch: Any) -> Tensor:
        x = batch.detach().clone().requires_grad_()
        score = torch.autograd.grad(module(x).sum(), x, create_graph=True)[0]
        trace = sum(torch.autograd.grad(score[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(4))
        return (trace + 0.5 * score.square().sum(1)).mean()

    return two_layers(out=1), loss, inputs(4)


@case
def forces_from_an_energy() -> Any:
    """As in molecular dynamics: forces are the gradient of an energy by places."""

    def loss(module: Any, batch: Any) -> Tensor:
        places, energy, forces = batch
        places = places.clone().requires_grad_()
        distances = ((places[:, None] - places[:, :, None]).square().sum(-1) + 1e-3).sqrt()
        found = module((-distances).exp().flatten(1)).sum(1)
        force = -torch.autograd.grad(found.sum(), places, create_graph=True)[0]
        return F.mse_loss(found, energy) + F.mse_loss(force, forces)

    net = nn.Sequential(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 1))
    return net, loss, four(lambda: (normal(3, 2), normal(), normal(3, 2)))


def forces(*layers: nn.Module) -> Any:
    """Return an energy of which only the gradient by places is used."""

    def loss(module: Any, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        return F.mse_loss(torch.autograd.grad(module(x).sum(), x, create_graph=True)[0], batch[1])

    net = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), *layers, nn.Linear(6, 1))
    return net, loss, four(lambda: (normal(4), normal(4)))


@case
def forces_through_a_last_group_norm() -> Any:
    """No gradient reaches the result of the norm, but one reaches its mean and its scale."""
    return forces(nn.GroupNorm(2, 6))


@case
def forces_through_a_last_layer_norm() -> Any:
    return forces(nn.LayerNorm(6))


@case
def adversarial_step() -> Any:
    """As in FGSM: a gradient without a graph moves the inputs."""

    def loss(module: Any, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(module(x), batch[1]), x)
        return F.cross_entropy(module(batch[0] + 0.1 * g.sign()), batch[1])

    return two_layers(), loss, pairs(4)


@case
def gradients_of_parameters_in_the_loss() -> Any:
    """As in MAML: a step on the parameters within the loss."""

    def loss(module: Any, batch: Any) -> Tensor:
        names, values = zip(*module.named_parameters(), strict=True)
        g = torch.autograd.grad(cross_entropy(module, batch), values, create_graph=True)
        moved = {name: value - 0.1 * by for name, value, by in zip(names, values, g, strict=True)}
        return F.cross_entropy(torch.func.functional_call(module, moved, (batch[0],)), batch[1])

    return two_layers(), loss, pairs(4)


@case
def norm_of_the_gradient_of_parameters() -> Any:
    """A penalty on the norm of the gradient."""

    def loss(module: Any, batch: Any) -> Tensor:
        found = cross_entropy(module, batch)
        g = torch.autograd.grad(found, list(module.parameters()), create_graph=True)
        return found + 0.1 * sum(part.square().sum() for part in g)

    return two_layers(), loss, pairs(4)


@case
def hook_on_a_tensor() -> Any:
    """A hook clips the gradient of an activation: of each unit by itself, entry by entry."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if h.requires_grad:
            h.register_hook(lambda grad: grad.clamp(-0.05, 0.05))
        return self.last(h)

    return Model(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), cross_entropy, pairs(4)


@case
def hook_that_normalises() -> Any:
    """A hook divides a gradient by its norm, which is another over all units."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if h.requires_grad:
            h.register_hook(lambda grad: grad / grad.norm())
        return self.last(h)

    return Model(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), cross_entropy, pairs(4)


@case
def backward_hook_of_a_module() -> Any:
    """A full backward hook that only looks, as tools that draw gradients have."""
    net = two_layers()
    net.seen = []
    net[1].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    return net, cross_entropy, pairs(4)


@case
def backward_hook_that_changes() -> Any:
    """A full backward hook that scales what goes down."""
    net = two_layers()
    net[1].register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 0.5,))
    return net, cross_entropy, pairs(4)


@case
def forward_hooks_of_modules() -> Any:
    """Hooks before and after a forward pass, one of which changes the result."""
    net = two_layers()
    net[0].register_forward_hook(lambda module, args, out: out * 0.5 + module.bias)
    net[2].register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
    return net, cross_entropy, pairs(4)


@case
def retained_gradient() -> Any:
    """``retain_grad`` on an activation."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if h.requires_grad:
            h.retain_grad()
        return self.last(h)

    return Model(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), cross_entropy, pairs(4)


class Again(torch.autograd.Function):
    """A checkpoint written by hand, whose backward runs a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any) -> Tensor:
        """Compute without a graph."""
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        """Compute again, and go back through it."""
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.function(x), grad)
        return x.grad, None


def again(shared: bool) -> Any:
    """Return a model with `Again` around a layer, which may be one that is used outside too."""

    def forward(self: Any, x: Tensor) -> Tensor:
        inside = self.a if shared else self.b
        return self.c(Again.apply(self.a(x).tanh(), lambda h: inside(h).tanh()))

    parts = {"a": nn.Linear(4, 4), "c": nn.Linear(4, 1)}
    return Model(forward, **parts, **({} if shared else {"b": nn.Linear(4, 4)})), mean_square, inputs(4)


@case
def backward_within_a_backward() -> Any:
    """Parameters inside a checkpoint written by hand."""
    return again(shared=False)


@case
def backward_within_a_backward_of_a_shared_layer() -> Any:
    """The same layer inside and outside."""
    return again(shared=True)


class Norms(torch.autograd.Function):
    """A custom Function of two tensors that returns two and saves a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, power: int) -> tuple[Tensor, Tensor]:
        """Return a product and a power."""
        ctx.save_for_backward(x, weight)
        ctx.power = power
        return x * weight, x**power

    @staticmethod
    def backward(ctx: Any, product: Tensor, power: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return both gradients."""
        x, weight = ctx.saved_tensors
        return product * weight + ctx.power * x ** (ctx.power - 1) * power, (product * x).sum(0), None


@case
def custom_function_with_a_parameter() -> Any:
    """A Function of an activation and a parameter, with two results."""

    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = Norms.apply(self.layer(x), self.weight, 3)
        return a + b

    return Model(forward, layer=nn.Linear(4, 3), weight=nn.Parameter(torch.randn(3))), mean_square, inputs(4)


class Clipped(torch.autograd.Function):
    """A custom Function of the new kind, which torch.func batches by itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Clip."""
        return x.clamp(-0.5, 0.5)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Let everything pass."""
        return grad


@case
def custom_function_with_a_vmap_rule() -> Any:
    """A straight-through estimator of the new kind."""
    return Model(lambda self, x: Clipped.apply(self.layer(x)), layer=nn.Linear(4, 3)), mean_square, inputs(4)


@case
def checkpoints_of_a_sequence() -> Any:
    """checkpoint_sequential over layers with a shared one."""
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), shared, nn.Tanh())

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(checkpoint_sequential(self.net, 2, self.first(x), use_reentrant=False))

    return Model(forward, first=nn.Linear(4, 4), net=net, head=nn.Linear(4, 3)), cross_entropy, pairs(4)


@case
def saved_tensors_packed() -> Any:
    """saved_tensors_hooks around a part of the forward pass, as for offloading."""

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1.0, lambda t: t):
            h = self.first(x).tanh()
        return self.last(h)

    return Model(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), cross_entropy, pairs(4)


@case
def equilibrium_of_a_layer() -> Any:
    """As in DEQ: iterations without a graph, and one with it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(4):
                z = (self.layer(z) * 0.3 + x).tanh()
        return self.head((self.layer(z) * 0.3 + x).tanh())

    return Model(forward, layer=nn.Linear(4, 4), head=nn.Linear(4, 3)), cross_entropy, pairs(4)


class Signs(torch.autograd.Function):
    """The sign of a weight, as in BinaryConnect; the gradient passes where the weight is small."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        """Return signs."""
        ctx.save_for_backward(weight)
        return weight.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Cut the gradient off."""
        (weight,) = ctx.saved_tensors
        return grad.masked_fill(weight.abs() > 0.4, 0)


class BestHalf(torch.autograd.Function):
    """A mask of the larger half of scores, as in supermasks."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        """Return zeros and ones."""
        return (scores >= scores.median()).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Let everything pass."""
        return grad


@case
def custom_functions_of_parameters_alone() -> Any:
    """Weights of signs, and a frozen weight behind a mask that is learned."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.linear(x, Signs.apply(self.first.weight), self.first.bias).tanh()
        return F.linear(h, self.frozen * BestHalf.apply(self.scores.abs()), self.bias)

    parts = {name: nn.Parameter(torch.randn(shape)) for name, shape in (("scores", (3, 5)), ("bias", (3,)))}
    model = Model(forward, first=nn.Linear(4, 5), **parts)
    model.register_buffer("frozen", torch.randn(3, 5))
    return model, cross_entropy, pairs(4)


class StochasticRounding(torch.autograd.Function):
    """A weight that is rounded up or down by chance."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        """Round to whole numbers."""
        return (weight + 1e-9 * torch.rand_like(weight)).round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Let everything pass."""
        return grad


@case
def custom_function_of_a_parameter_that_draws() -> Any:
    """Each unit would have to draw numbers of its own."""
    model = Model(lambda self, x: x @ StochasticRounding.apply(3 * self.weight), weight=nn.Parameter(torch.randn(4, 3)))
    return model, cross_entropy, pairs(4)


class LinearCrossEntropy(torch.autograd.Function):
    """A head and its loss in one, which computes gradients in the forward pass, as kernels that save memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        p = (x @ weight.T).softmax(-1)
        at_logits = (p - F.one_hot(target, len(weight))) / len(x)
        ctx.save_for_backward(at_logits @ weight, at_logits.T @ x)
        return -p.gather(1, target[:, None]).log().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients that were computed."""
        at_x, at_weight = ctx.saved_tensors
        return grad * at_x, grad * at_weight, None


@case
def head_and_loss_in_one() -> Any:
    """A custom Function of activations and a tied weight, in two steps of a sequence."""

    def loss(module: Any, batch: Any) -> Tensor:
        x, y = batch
        h = module.table(x).tanh()
        return sum(LinearCrossEntropy.apply(h[:, i], module.table.weight, y[:, i]) for i in range(2)) / 2

    model = Model(lambda self: None, table=nn.Embedding(7, 4))
    return model, loss, four(lambda: (words(2), words(2)))


@case
def head_that_is_transposed_and_its_loss_in_one() -> Any:
    """The same with a head whose weight lies the other way."""

    def loss(module: Any, batch: Any) -> Tensor:
        return LinearCrossEntropy.apply(module.first(batch[0]).tanh(), module.head.T, batch[1])

    return Model(lambda self: None, first=nn.Linear(4, 5), head=nn.Parameter(torch.randn(5, 3))), loss, pairs(4)


class DifferentiatedAtOnce(LinearCrossEntropy):
    """A head and its loss in one, which asks autograd for the gradients while the forward pass runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        with torch.enable_grad():
            operands = [tensor.detach().requires_grad_() for tensor in (x, weight)]
            logits = torch.zeros(len(x), len(weight), dtype=x.dtype)
            logits += F.dropout(operands[0], 0.5, training=True) @ operands[1].T
            loss = F.cross_entropy(logits, target)
            ctx.save_for_backward(*torch.autograd.grad(loss, operands))
        return loss.detach()


@case
def custom_function_that_differentiates_at_once() -> Any:
    """The calls of autograd inside a Function have to do with one unit."""

    def loss(module: Any, batch: Any) -> Tensor:
        h = module.first(batch[0]).tanh()
        return DifferentiatedAtOnce.apply(h, module.head, batch[1]) + 0.1 * h.square().mean()

    return Model(lambda self: None, first=nn.Linear(4, 5), head=nn.Parameter(torch.randn(3, 5))), loss, pairs(4)


class Reversed(torch.autograd.Function):
    """Gradients are reversed, and scaled by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """Return the same, and remember the number."""
        ctx.scale = scale
        return x * (1 + scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Reverse."""
        return -ctx.scale * grad, None


@case
def custom_function_of_a_number_that_is_read() -> Any:
    """A number of each unit is an argument of a Function of activations, and of one of a parameter alone."""

    def loss(module: Any, batch: Any) -> Tensor:
        x, y = batch
        h = module[0](x).tanh()
        h = Reversed.apply(h, h.detach().abs().mean().item())
        return F.cross_entropy(F.linear(h, Reversed.apply(module[2].weight, x.square().mean().item())), y)

    return two_layers(), loss, pairs(4)
