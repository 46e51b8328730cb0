"""Every interval op in plain PyTorch, with autograd's gradients: what the kernels must equal.

The tests take it as their oracle, in float64; it is also ``backend="torch"``. No fast path imports
it. It takes any floating dtype and device. Three streams travel together: ``lower`` and ``upper``,
the box, and ``nominal``, the point, or None throughout. torch's ops keep NaN.

An affine map ``x -> W x + b`` takes a box by its center and radius (Morawiecki et al. 2019)::

    center' = W center + b    radius' = |W| radius
    lower' = center' - radius'    upper' = center' + radius'
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]
Streams = tuple[Tensor, Tensor, Tensor | None]  # lower, upper, nominal
StreamsAndWidth = tuple[Tensor, Tensor, Tensor | None, Tensor]


def center_radius(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``(lower + upper) / 2, (upper - lower) / 2``; halved first, nothing overflows.

    Args:
        lower, upper: tensors of one shape, as both results.
    """
    return 0.5 * lower + 0.5 * upper, 0.5 * upper - 0.5 * lower


def conv2d(
    lower: Tensor,  # [N, C, H, W], as upper and nominal
    upper: Tensor,
    nominal: Tensor | None,
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None,  # [K]
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> StreamsAndWidth:  # [N, K, H', W'] each, and the 0-dim width
    """Bounds ``F.conv2d(x, weight, bias, ...)`` over the box; with its value at nominal, the width.

    Equals ``c, r = F.conv2d((l + u) / 2, W, b), F.conv2d((u - l) / 2, W.abs())``, then
    ``c - r, c + r, F.conv2d(z, W, b), (2 * r).square().sum()``.

    Args:
        lower, upper, nominal: [N, C, H, W]; nominal may be None.
        weight: [K, C / groups, R, S].
        bias: [K], or None.
        stride, padding, dilation, groups: as in ``F.conv2d``, the first three as pairs.

    Returns:
        Lower, upper and nominal [N, K, H', W'], and the 0-dim width.
    """

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    return _affine(apply, (lower, upper, nominal), weight, bias)


def linear(
    lower: Tensor,  # [..., I], as upper and nominal
    upper: Tensor,
    nominal: Tensor | None,
    weight: Tensor,  # [O, I]
    bias: Tensor | None,  # [O]
) -> StreamsAndWidth:  # [..., O] each, and the 0-dim width
    """Bounds ``F.linear(x, weight, bias)`` over the box; with its value at nominal, the width.

    Equals ``c, r = F.linear((l + u) / 2, W, b), F.linear((u - l) / 2, W.abs())``, then
    ``c - r, c + r, F.linear(z, W, b), (2 * r).square().sum()``.

    Args:
        lower, upper, nominal: [..., I]; nominal may be None.
        weight: [O, I].
        bias: [O], or None.

    Returns:
        Lower, upper and nominal [..., O], and the 0-dim width.

    Examples:
        >>> lower, upper = torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 2.0]])
        >>> reference.linear(lower, upper, None, torch.tensor([[1.0, -1.0]]), None)
        (tensor([[-3.]]), tensor([[1.]]), None, tensor(16.))
    """
    return _affine(F.linear, (lower, upper, nominal), weight, bias)


def _affine(
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor],  # x, W, b -> W x + b
    streams: Streams,
    weight: Tensor,
    bias: Tensor | None,
) -> StreamsAndWidth:
    lower, upper, nominal = streams
    center, radius = center_radius(lower, upper)
    center_out = apply(center, weight, bias)
    radius_out = apply(radius, weight.abs(), None)
    nominal_out = None if nominal is None else apply(nominal, weight, bias)
    # upper' - lower' is 2 radius'; the subtraction would only add cancellation. Two bounds at the
    # same infinity have no width.
    width = 4 * radius_out.where(~center_out.isinf(), 0.0).square().sum()
    return center_out - radius_out, center_out + radius_out, nominal_out, width


def activation(
    function: Callable[[Tensor], Tensor], lower: Tensor, upper: Tensor, nominal: Tensor | None
) -> Streams:
    """Applies a non-decreasing ``function``, such as ``torch.relu``, to each stream.

    Args:
        function: from a tensor to a tensor.
        lower, upper, nominal: tensors of one shape; nominal may be None.
    """
    return function(lower), function(upper), None if nominal is None else function(nominal)


def relu(lower: Tensor, upper: Tensor, nominal: Tensor | None) -> StreamsAndWidth:
    """Returns ReLU of each stream, and the 0-dim sum of ``(upper' - lower') ** 2``.

    Args:
        lower, upper, nominal: tensors of one shape; nominal may be None.
    """
    lower, upper, nominal = activation(torch.relu, lower, upper, nominal)
    return lower, upper, nominal, (upper - lower).square().sum()


def batch_norm(
    lower: Tensor,  # [N, C, ...], as upper and nominal
    upper: Tensor,
    nominal: Tensor | None,
    running_mean: Tensor | None,  # [C], as running_var, weight and bias
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Streams:
    """Runs ``F.batch_norm`` on the nominal stream, and the box through the same map per channel.

    With ``training`` the statistics are the nominal batch's, so that gradients of the box reach
    ``nominal``, and the running ones are updated from them; else they are the running ones.

    Args:
        lower, upper, nominal: [N, C, ...]; nominal may be None.
        running_mean, running_var, weight, bias: [C], or None.
        training, momentum, eps: as in ``F.batch_norm``.

    Raises:
        RuntimeError: ``training`` without a nominal stream.
        ValueError: no running statistics outside of training.
    """
    if training:
        if nominal is None:
            raise RuntimeError("batch_norm: training=True needs the nominal stream, which is None")
        dims = [d for d in range(nominal.dim()) if d != 1]
        mean, var = nominal.mean(dims), nominal.var(dims, unbiased=False)
    elif running_mean is None or running_var is None:
        raise ValueError("batch_norm: training=False needs running_mean and running_var")
    else:
        mean, var = running_mean, running_var

    shape = [1, -1] + [1] * (lower.dim() - 2)
    scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
    center, radius = center_radius(lower, upper)
    center_out = (center - mean.view(shape)) * scale.view(shape)
    if bias is not None:
        center_out = center_out + bias.view(shape)
    radius_out = radius * scale.abs().view(shape)
    nominal_out = None
    if nominal is not None:
        nominal_out = F.batch_norm(
            nominal, running_mean, running_var, weight, bias, training, momentum, eps
        )
    return center_out - radius_out, center_out + radius_out, nominal_out


def width(lower: Tensor, upper: Tensor, reduction: str = "mean") -> Tensor:
    """Returns the squared width of a layer's box [N, ...], 0-dim, the mean over the batch.

    Args:
        lower, upper: [N, ...].
        reduction: ``"mean"``: ``(upper - lower).square().mean()``, as in the authors' code;
            ``"sum"``: the same summed over the units, the ``||u_k - l_k||^2`` of the paper.

    Raises:
        ValueError: reduction is none of these.
    """
    squares = (upper - lower).where(upper != lower, 0.0).square()  # 0 at infinity too
    if reduction == "mean":
        return squares.mean()
    if reduction == "sum":
        return squares.sum() / lower.shape[0]
    raise ValueError(f"width: reduction must be 'mean' or 'sum', not {reduction!r}")


def elided_margins(
    lower: Tensor,  # [N, I], the input of the last layer, as upper
    upper: Tensor,
    weight: Tensor,  # [C, I], the last layer
    bias: Tensor | None,  # [C]
    y: Tensor,  # [N] int64
) -> Tensor:  # [N, C]
    """Returns lower bounds of ``z_y - z_j`` by the one affine map ``W_y - W_j``; +inf at ``y``.

    This elides the last layer: never looser than ``lower_y - upper_j`` of its bounds.

    Args:
        lower, upper: [N, I], the input of the last layer.
        weight: [C, I], the last layer's.
        bias: [C], or None.
        y: [N] int64.

    Returns:
        [N, C].
    """
    center, radius = center_radius(lower, upper)
    difference = weight[y].unsqueeze(1) - weight  # [N, C, I]
    margins = (difference @ center.unsqueeze(2) - difference.abs() @ radius.unsqueeze(2)).squeeze(2)
    if bias is not None:
        margins = margins + (bias[y].unsqueeze(1) - bias)
    return margins.masked_fill(_one_hot(y, margins), torch.inf)


def elided_worst_logits(margins: Tensor, y: Tensor) -> Tensor:
    """Returns the worst-case ``z_j - z_y`` of margins [N, C]: ``-margins``, and 0 at ``y``.

    Args:
        margins: [N, C], as `elided_margins` gives them.
        y: [N] int64.
    """
    return (-margins).masked_fill(_one_hot(y, margins), 0.0)


def _one_hot(y: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(y, like.shape[1]).bool()


def constrained_ibp_loss(
    logits: Tensor, worst: Tensor, y: Tensor, width: Tensor, kappa: float, width_weight: float
) -> Tensor:
    """Returns ``kappa CE(logits, y) + (1 - kappa) CE(worst, y) + width_weight width``, 0-dim.

    Args:
        logits, worst: [N, C].
        y: [N] int64.
        width: 0-dim, the sum of the widths.
        kappa: in [0, 1].
        width_weight: 0 or more.
    """
    robust = (1 - kappa) * F.cross_entropy(worst, y)
    return kappa * F.cross_entropy(logits, y) + robust + width_weight * width
