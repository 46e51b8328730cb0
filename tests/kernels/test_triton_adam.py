"""Adam of all parameters in one launch, against torch.optim.Adam; and its two ends."""

from __future__ import annotations

import pytest
import torch
from gpu_steps import stored
from torch import Tensor
from tritons import PRECISIONS

from cibp_fast.kernels.adam import Adam, Parameter
from cibp_fast.kernels.precision import PRECISIONS as STORED
from cibp_fast.kernels.weights import pack_weight, sum_partials

# [Cout, Cin, KH, KW]: of few channels, of odd sizes, more than a tile each way, in vectors of four.
SHAPES = [
    (5, 1, 4, 4),
    (16, 3, 3, 3),
    (7, 9, 5, 4),
    (20, 12, 4, 5),
    (33, 130, 1, 1),
    (20, 132, 1, 1),
]
BIASES = [1, 5, 140]


pytestmark = pytest.mark.usefixtures("on_device")


def copies(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    rounded = stored(weight, precision)
    return rounded.permute(0, 2, 3, 1), rounded.permute(2, 3, 1, 0)


def parameters(precision: str) -> list[Parameter]:
    """Makes parameters of all shapes, with 1 to 3 splits, fresh moments, and copies full of NaN."""
    result = []
    for index, (outputs, channels, *kernel) in enumerate(SHAPES):
        weight = torch.randn(outputs, channels, *kernel)
        master = weight.flatten(1) if kernel == [1, 1] else weight
        copy = torch.full((outputs, *kernel, channels), torch.nan, dtype=STORED[precision].dtype)
        moments = torch.zeros_like(master), torch.zeros_like(master)
        partials = torch.empty(1 + index % 3, *copy.shape)
        transposed = copy.new_full((*kernel, channels, outputs), torch.nan)
        result.append(Parameter(master, *moments, partials, copy, transposed if index else None))
    for count in BIASES:
        bias = torch.randn(count)
        result.append(
            Parameter(bias, torch.zeros(count), torch.zeros(count), torch.empty(2, count))
        )
    return result


def draw_gradients(parameters: list[Parameter]) -> list[Tensor]:
    """Draws partials; returns their sums in torch's layout. Some weights never have a gradient."""
    gradients = []
    for parameter in parameters:
        parameter.partials.normal_()
        parameter.partials[:, ::2] *= 1e-4
        parameter.partials[..., 0] = 0
        total = parameter.partials[0].clone()
        for split in parameter.partials[1:]:
            total += split
        if total.dim() == 4:
            total = total.permute(0, 3, 1, 2)
        gradients.append(total.reshape(parameter.master.shape))
    return gradients


@pytest.mark.parametrize(("precision", "before"), [("float32", 0), ("tf32", 7), ("bf16", 300_000)])
def test_adam_is_torch_s(precision: str, before: int) -> None:
    ours = parameters(precision)
    adam = Adam(ours, precision)
    lr, step = torch.zeros(1), torch.tensor([before])
    optimizers = []
    for dtype in (torch.float32, torch.float64):
        theirs = [our.master.to(dtype, copy=True).requires_grad_() for our in ours]
        optimizer = torch.optim.Adam(theirs, 1.0)
        for parameter in theirs:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(before)),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        optimizers.append((dtype, theirs, optimizer))

    for rate in (1e-2, 3e-3, 1e-2):
        gradients = draw_gradients(ours)
        lr.fill_(rate)
        adam(lr, step)
        step += 1
        for dtype, theirs, optimizer in optimizers:
            for parameter, gradient in zip(theirs, gradients, strict=True):
                parameter.grad = gradient.to(dtype)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            for our, their in zip(ours, theirs, strict=True):
                state = optimizer.state[their]

                def close(mine: Tensor, other: Tensor, rtol: float, atol: float) -> None:
                    torch.testing.assert_close(mine.to(other.dtype), other, rtol=rtol, atol=atol)

                # A gradient that its decay or moment cancels has the error of the larger numbers.
                close(our.master, their.detach(), 5e-7, 3e-7)
                close(our.exp_avg, state["exp_avg"], 2e-6, 5e-7)
                close(our.exp_avg_sq, state["exp_avg_sq"], 1e-5, 1e-13)
        for our in ours:
            if our.forward is not None:
                weight = our.master.reshape(our.forward.permute(0, 3, 1, 2).shape)
                forward, transposed = copies(weight, precision)
                assert torch.equal(our.forward, forward)
                assert our.transposed is None or torch.equal(our.transposed, transposed)


def test_adam_repeats_bitwise_and_writes_nothing_else() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        guarded = []
        buffers = []
        for parameter in parameters("bf16"):
            tensors = []
            for tensor in parameter:
                if tensor is None:
                    tensors.append(None)
                    continue
                # Behind one element, so that no vector is aligned.
                buffer = torch.full((tensor.numel() + 9,), 7.0, dtype=tensor.dtype)
                tensors.append(buffer[1:-8].view(tensor.shape).copy_(tensor))
                buffers.append(buffer)
            guarded.append(Parameter(*tensors))
        adam = Adam(guarded, "bf16")
        draw_gradients(guarded)
        adam(torch.tensor([1e-2]), torch.tensor([0]))
        for buffer in buffers:
            assert buffer[0] == 7 and (buffer[-8:] == 7).all()
        return buffers

    for once, again in zip(run(), run(), strict=True):
        assert torch.equal(once, again)


def test_only_whole_aligned_vectors_are_read_wide() -> None:
    def wide(outputs: int, channels: int, taps: int, offset: int = 0) -> bool:
        size = outputs * channels * taps
        buffer = torch.empty(size + offset)[offset:].view(outputs, taps, 1, channels)
        others = [torch.empty(size) for _ in range(3)]
        return all(Adam([Parameter(*others, buffer[None])], "float32")._rows[:, 10].bool())

    assert wide(8, 12, 4) and wide(8, 12, 1)
    assert not any((wide(6, 12, 4), wide(8, 3, 4), wide(8, 12, 9), wide(8, 12, 4, offset=1)))


def test_nan_stays_where_it_is() -> None:
    parameter = parameters("bf16")[2]
    draw_gradients([parameter])
    parameter.partials[1, 2, 3, 1, 4] = torch.nan
    Adam([parameter], "bf16")(torch.tensor([1e-2]), torch.tensor([0]))
    expected = torch.zeros(parameter.master.shape, dtype=torch.bool)
    expected[2, 4, 3, 1] = True
    for tensor in parameter[:3]:
        assert torch.equal(tensor.isnan(), expected)
    assert torch.equal(parameter.forward.isnan(), expected.permute(0, 2, 3, 1))
    assert torch.equal(parameter.transposed.isnan(), expected.permute(2, 3, 1, 0))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_weight_is_exact(shape: tuple[int, ...], precision: str) -> None:
    weight = torch.randn(shape)
    weight.view(-1)[:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -3e38])
    for given in (weight, weight.to(memory_format=torch.channels_last)):
        for copy, expected in zip(
            pack_weight(given, precision), copies(weight, precision), strict=True
        ):
            assert copy.is_contiguous()
            torch.testing.assert_close(copy, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("shape", [*SHAPES, (140,)])
def test_sum_partials_is_exact(shape: tuple[int, ...], splits: int) -> None:
    """Checks the sums of weights, and also of a bias."""
    outputs, *inner = shape
    partials = torch.randn(splits, outputs, *inner[1:], *inner[:1])
    total = partials[0].clone()
    for split in partials[1:]:
        total += split
    assert torch.equal(sum_partials(partials), total.permute(0, 3, 1, 2) if inner else total)


def test_what_is_not_contiguous_is_named() -> None:
    parameter = parameters("float32")[1]
    master = parameter.master.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"parameters\[0\].master must be contiguous, got \[16, 3"):
        Adam([parameter._replace(master=master)], "float32")
