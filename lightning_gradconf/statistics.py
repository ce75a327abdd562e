r"""Compute statistics of a Gram matrix of gradients, ``gram[i, j] = <g_i, g_j>`` of shape ``(n, n)``.

Below, :math:`K` is the Gram, :math:`d` its diagonal and :math:`\bar{d}` the mean of that, :math:`C` the matrix of
cosines, and :math:`o` the mean of :math:`K_{ij}` over the pairs :math:`i < j`. Every function
takes the Gram first and returns a 0-dim tensor on its device, float64 for a float64 Gram and float32 otherwise, without
waiting for the device. An entry that is not finite makes every statistic NaN. A zero gradient has no direction: its
pairs are left out of the cosines. If fewer than two other gradients remain, cosines are NaN. Labels ``(n,)`` are the
classes of the units. Every function raises ``TypeError`` for a Gram that is not a floating-point tensor, and
``ValueError`` for one that is not square with n >= 2, or for labels of another shape.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor


def eta(gram: Tensor) -> Tensor:
    r"""Return :math:`\max(0, -\min_{i<j} K_{ij})`, the smallest bound of gradient confusion.

    It is 0 when no two gradients disagree, and has the unit of a squared gradient norm. Sankararaman et al. 2020,
    Definition 2.1, https://arxiv.org/abs/1904.06963.

    >>> eta(torch.tensor([[1.0, -2.0], [-2.0, 5.0]]))
    tensor(2.)
    """
    return (0 - min_inner_product(gram)).clamp(min=0)  # a unary minus would make -0.0 of 0.0


def min_cosine(gram: Tensor) -> Tensor:
    r"""Return :math:`\min_{i<j} C_{ij}`, in [-1, 1], the cosine of the two gradients that disagree most.

    It falls as n grows: compare equal n only. Sankararaman et al. 2020, Section 7, https://arxiv.org/abs/1904.06963.

    >>> min_cosine(torch.tensor([[1.0, -2.0], [-2.0, 16.0]]))
    tensor(-0.5000)
    """
    lowest = _pairs(cosine_matrix(gram)).nan_to_num(nan=2.0).amin()
    return lowest.masked_fill(lowest > 1, torch.nan)


def p05_cosine(gram: Tensor) -> Tensor:
    r"""Return the 5 % quantile of :math:`C_{ij}` over :math:`i < j`, in [-1, 1]; it hardly depends on n.

    >>> p05_cosine(torch.tensor([[1.0, -2.0], [-2.0, 16.0]]))
    tensor(-0.5000)
    """
    return _percentile(_pairs(cosine_matrix(gram)), 5)


def mean_cosine(gram: Tensor) -> Tensor:
    r"""Return the mean of :math:`C_{ij}` over :math:`i < j`: 0 for unrelated gradients, 1 for parallel ones.

    It lies in :math:`[-1/(n-1), 1]`. The cosine form of stiffness: Fort et al. 2019, https://arxiv.org/abs/1901.09491.

    >>> mean_cosine(torch.tensor([[1.0, -2.0], [-2.0, 16.0]]))
    tensor(-0.5000)
    """
    return _pairs(cosine_matrix(gram)).nanmean()


def negative_fraction(gram: Tensor) -> Tensor:
    r"""Return the share of the pairs :math:`i < j` with :math:`C_{ij} < 0`; about one half for unrelated gradients.

    >>> negative_fraction(torch.tensor([[1.0, -2.0], [-2.0, 16.0]]))
    tensor(1.)
    """
    cosines = _pairs(cosine_matrix(gram))
    return (cosines < 0).to(cosines.dtype).masked_fill(cosines.isnan(), torch.nan).nanmean()


def gradient_norm(gram: Tensor) -> Tensor:
    r"""Return the mean of :math:`\sqrt{d_i}`: the average norm of a unit's gradient, zero gradients included.

    >>> gradient_norm(torch.tensor([[1.0, -2.0], [-2.0, 25.0]]))
    tensor(3.)
    """
    squared = _checked(gram).diagonal().clamp(min=0)  # rounding may leave a zero gradient a negative one
    return squared.sqrt().mean()


def min_inner_product(gram: Tensor) -> Tensor:
    r"""Return :math:`\min_{i<j} K_{ij}`, a squared gradient norm; where it is negative it is -``eta``.

    >>> min_inner_product(torch.tensor([[1.0, 2.0], [2.0, 5.0]]))
    tensor(2.)
    """
    return _pairs(_checked(gram)).amin()


def median_cosine(gram: Tensor) -> Tensor:
    r"""Return the median of :math:`C_{ij}` over :math:`i < j`; of an even number of pairs, the mean of the middle two.

    >>> median_cosine(torch.tensor([[1.0, -2.0], [-2.0, 16.0]]))
    tensor(-0.5000)
    """
    return _percentile(_pairs(cosine_matrix(gram)), 50)


def std_cosine(gram: Tensor) -> Tensor:
    r"""Return the standard deviation of :math:`C_{ij}` over :math:`i < j`, in [0, 1]; 0 for a single pair.

    In theory it falls as networks become wider and shallower: Sankararaman et al. 2020, Section 4,
    https://arxiv.org/abs/1904.06963.

    >>> std_cosine(torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.0], [0.6, 0.0, 1.0]]))
    tensor(0.2828)
    """
    cosines = _pairs(cosine_matrix(gram))
    return (cosines - cosines.nanmean()).square().nanmean().sqrt()


def gradient_diversity(gram: Tensor) -> Tensor:
    r"""Return :math:`\sum_i d_i / \sum_{ij} K_{ij}`: 1/n for equal gradients, 1 for orthogonal, inf if they cancel.

    It bounds the batch size that still speeds up training: Yin et al. 2018, https://arxiv.org/abs/1706.05699.

    >>> gradient_diversity(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    tensor(0.5000)
    """
    gram, _ = _rescaled(gram)
    return gram.diagonal().sum() / gram.sum().clamp(min=0)


def coherence(gram: Tensor) -> Tensor:
    r"""Return :math:`\sum_{ij} K_{ij} / \sum_i d_i`: n for equal gradients, 1 for orthogonal, 0 if they cancel.

    m-coherence, the number of units that a step for one of them helps: Chatterjee & Zielinski 2020,
    https://arxiv.org/abs/2008.01217. The reciprocal of ``gradient_diversity``.

    >>> coherence(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    tensor(2.)
    """
    return 1 / gradient_diversity(gram)


def noise_scale(gram: Tensor, unit_size: int = 1) -> Tensor:
    r"""Return :math:`u (\bar{d} - o) / o`, in samples: the batch size at which noise is as large as the gradient.

    :math:`u` is ``unit_size``, the samples in a unit. It estimates B_simple: :math:`\bar{d} - o` and :math:`o` are
    unbiased for the variance and the squared norm of the mean gradient. McCandlish et al. 2018, Section 2.2 and
    Appendix A.1, https://arxiv.org/abs/1812.06162. The estimate becomes negative or infinite when there are too few
    units to separate the mean gradient from noise.

    >>> noise_scale(torch.tensor([[4.0, 1.0], [1.0, 4.0]]), unit_size=8)
    tensor(24.)
    """
    if unit_size < 1:
        raise ValueError(f"unit_size is {unit_size}, but a unit has at least one sample: pass unit_size=1 or more.")
    gram, _ = _rescaled(gram)
    off_diagonal = _pairs(gram).mean()
    return unit_size * (gram.diagonal().mean() - off_diagonal) / off_diagonal


def normalized_variance(gram: Tensor) -> Tensor:
    r"""Return :math:`(\bar{d} - o) / \bar{d}`: 0 for equal gradients, 1 if noise hides the mean gradient.

    Variance over second moment: Faghri et al. 2020, https://arxiv.org/abs/2007.04532.

    >>> normalized_variance(torch.tensor([[4.0, 1.0], [1.0, 4.0]]))
    tensor(0.7500)
    """
    gram, _ = _rescaled(gram)
    return 1 - _pairs(gram).mean() / gram.diagonal().mean()


def gradient_disparity(gram: Tensor) -> Tensor:
    r"""Return the mean over :math:`i < j` of :math:`|g_i - g_j|`, a distance that grows with overfitting.

    Forouzesh & Thiran 2021, https://arxiv.org/abs/2107.06665.

    >>> gradient_disparity(torch.tensor([[9.0, 0.0], [0.0, 16.0]]))
    tensor(5.)
    """
    gram, scale = _rescaled(gram)
    squared = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    return _pairs(squared).clamp(min=0).sqrt().mean() * scale.sqrt()


def participation_ratio(gram: Tensor) -> Tensor:
    r"""Return :math:`(\sum_i d_i)^2 / \sum_{ij} K_{ij}^2`: 1 on one line, n for orthogonal gradients of one length.

    >>> participation_ratio(torch.eye(3))
    tensor(3.)
    """
    gram, _ = _rescaled(gram)
    return (gram.diagonal().sum() ** 2 / gram.square().sum()).clamp(1, gram.shape[0])


def within_class_cosine(gram: Tensor, labels: Tensor) -> Tensor:
    r"""Return the mean over classes of the mean :math:`C_{ij}` within the class, in [-1, 1].

    Every class with a pair counts the same, however large it is; NaN if there is none. It is the mean of the diagonal
    of the class stiffness matrix: Fort et al. 2019, https://arxiv.org/abs/1901.09491.

    >>> gram = torch.eye(5)
    >>> gram[3, 4] = gram[4, 3] = 1  # class 0 has three pairs of cosine 0, class 1 one pair of cosine 1
    >>> within_class_cosine(gram, torch.tensor([0, 0, 0, 1, 1]))
    tensor(0.5000)
    """
    return _over_classes(gram, labels, within=True)


def between_class_cosine(gram: Tensor, labels: Tensor) -> Tensor:
    r"""Return the mean over pairs of classes of the mean :math:`C_{ij}` between the two, in [-1, 1].

    Every two classes count the same, however large they are; NaN for a single class. It is the mean of the class
    stiffness matrix off its diagonal: Fort et al. 2019, https://arxiv.org/abs/1901.09491.

    >>> gram = torch.eye(4)
    >>> gram[2, 3] = gram[3, 2] = 0.9  # classes 0, 1 and 0, 2: two pairs of cosine 0 each; classes 1, 2: one of 0.9
    >>> between_class_cosine(gram, torch.tensor([0, 0, 1, 2]))
    tensor(0.3000)
    """
    return _over_classes(gram, labels, within=False)


def cosine_matrix(gram: Tensor) -> Tensor:
    r"""Return :math:`C_{ij} = K_{ij} / \sqrt{d_i d_j}`, ``(n, n)`` in [-1, 1]; NaN where a gradient is zero.

    >>> cosine_matrix(torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    tensor([[1.0000, 0.5000,    nan],
            [0.5000, 1.0000,    nan],
            [   nan,    nan,    nan]])
    """
    gram = _checked(gram)
    norms = gram.diagonal().masked_fill(gram.diagonal() <= 0, torch.nan).sqrt()
    # One norm at a time: the product of two squared norms leaves the range of float32 long before a norm does.
    upper = (gram / norms[:, None] / norms).clamp(-1, 1).triu(1)
    return upper + upper.T + torch.diag(norms / norms)


def pairwise_cosines(gram: Tensor) -> Tensor:
    """Return C_ij over the pairs i < j of non-zero gradients, 1-D and row by row; empty if the Gram is not finite.

    >>> pairwise_cosines(torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    tensor([0.5000])
    """
    cosines = _pairs(cosine_matrix(gram))
    return cosines[~cosines.isnan()]


# Each tuple in the order in which its statistics are listed and logged.
_DEFAULT = (eta, min_cosine, p05_cosine, mean_cosine, negative_fraction, gradient_norm)
_FURTHER = (
    *(min_inner_product, median_cosine, std_cosine, gradient_diversity, coherence),
    *(noise_scale, normalized_variance, gradient_disparity, participation_ratio),
)
_BY_CLASS = (within_class_cosine, between_class_cosine)
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (*_DEFAULT, *_FURTHER, *_BY_CLASS)}


def statistic_names(
    names: Sequence[str] | Literal["default", "all"] = "default", *, with_labels: bool = False
) -> tuple[str, ...]:
    """Return the names that "default" or "all" (of classes only ``with_labels``) stands for, or the given names.

    Raises ``ValueError`` for a name that is unknown or needs labels that are not there.

    >>> statistic_names()
    ('eta', 'min_cosine', 'p05_cosine', 'mean_cosine', 'negative_fraction', 'gradient_norm')
    """
    if names == "default":
        return tuple(f.__name__ for f in _DEFAULT)
    if names == "all":
        return tuple(name for name, f in _FUNCTIONS.items() if with_labels or f not in _BY_CLASS)
    chosen = (names,) if isinstance(names, str) else tuple(names)
    if unknown := [name for name in chosen if name not in _FUNCTIONS]:
        raise ValueError(f"There is no statistic {unknown}: choose from {', '.join(_FUNCTIONS)}, 'default', 'all'.")
    if not with_labels and (unlabelled := [name for name in chosen if _FUNCTIONS[name] in _BY_CLASS]):
        raise ValueError(f"{unlabelled} compare classes, but there are no labels: pass labels of shape (n,).")
    return chosen


def gradient_statistics(
    gram: Tensor,
    names: Sequence[str] | Literal["default", "all"] = "default",
    *,
    labels: Tensor | None = None,
    unit_size: int = 1,
) -> dict[str, Tensor]:
    """Return ``{name: statistic(gram)}`` for a Gram ``(n, n)``, in the order of ``names``.

    ``labels`` ``(n,)`` are the classes of the units, for the statistics of classes, and ``unit_size`` the samples in
    each unit, for ``noise_scale``. Raises ``ValueError`` for a name that is unknown or needs labels that are not there.

    >>> gradient_statistics(torch.eye(3), ["mean_cosine", "coherence"])
    {'mean_cosine': tensor(0.), 'coherence': tensor(1.)}
    """
    further = {noise_scale: unit_size} | dict.fromkeys(_BY_CLASS, labels)  # what some take beside the Gram
    functions = [_FUNCTIONS[name] for name in statistic_names(names, with_labels=labels is not None)]
    return {f.__name__: f(gram, further[f]) if f in further else f(gram) for f in functions}


def _checked(gram: Tensor) -> Tensor:
    """Return the Gram in float32 at least, all NaN if any entry is not finite."""
    if not isinstance(gram, Tensor) or not gram.is_floating_point():
        found = f"a tensor of {gram.dtype}" if isinstance(gram, Tensor) else f"a {type(gram).__name__}"
        raise TypeError(f"A Gram is a floating-point tensor, but got {found}: pass torch.as_tensor(gram).float().")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or len(gram) < 2:
        raise ValueError(
            f"A Gram has shape (n, n), n >= 2, for there must be a pair to compare, but got {tuple(gram.shape)}: "
            "make one of gradients (n, P) by gradients @ gradients.T."
        )
    gram = gram.to(torch.promote_types(gram.dtype, torch.float32))
    # masked_fill, here and below, as torch.where would copy the constant to the device and wait for that.
    return gram.masked_fill(~gram.isfinite().all(), torch.nan)


def _rescaled(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return (K / max(d), max(d)), whose sums and squares stay within float32; (K, 1) if all gradients are zero."""
    gram = _checked(gram)
    largest = gram.diagonal().amax()
    scale = largest.masked_fill(largest <= 0, 1.0)
    return gram / scale, scale


def _pairs(matrix: Tensor) -> Tensor:
    """Return the entries i < j, row by row; a mask instead of indices would wait for the device."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix), offset=1, device=matrix.device)
    return matrix[rows, columns]


def _percentile(values: Tensor, percent: int) -> Tensor:
    """Return a percentile of what is not NaN, interpolated; torch.quantile refuses more than 2^24 values."""
    ordered = values.sort().values  # NaN last
    position = (values.isnan().logical_not().sum() - 1).clamp(min=0) * percent
    below, above = ordered.gather(0, torch.stack([position // 100, (position + 99) // 100]))
    return torch.lerp(below, above, (position % 100).to(ordered.dtype) / 100)


def _over_classes(gram: Tensor, labels: Tensor, *, within: bool) -> Tensor:
    """Return the mean of the class stiffness matrix, on its diagonal or off it."""
    cosines = cosine_matrix(gram).fill_diagonal_(torch.nan)  # a unit is no pair with itself
    labels = _checked_labels(gram, labels)
    same = labels[:, None] == labels
    members, there = same.to(cosines.dtype), (~cosines.isnan()).to(cosines.dtype)
    counts = members @ there @ members  # pairs of the classes of i and j; to list classes would wait for the device
    weights = there.masked_fill(~same if within else same, 0) / counts.clamp(min=1)
    return (cosines.nan_to_num() * weights).sum() / weights.sum()


def _checked_labels(gram: Tensor, labels: Tensor) -> Tensor:
    """Return labels ``(n,)`` on the Gram's device."""
    labels, n = torch.as_tensor(labels, device=gram.device), len(gram)
    if labels.shape != (n,):
        found = tuple(labels.shape)
        raise ValueError(f"Labels have shape {found}, but n = {n} units have one each: pass labels of shape ({n},).")
    return labels
