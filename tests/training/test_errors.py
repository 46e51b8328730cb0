"""cf.evaluate: the three errors of any model, over tensors, data sets and loaders."""

from __future__ import annotations

import pytest
import torch
from test_own import Endless, Residual, digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cibp_fast as cf

STEPS = {"steps": 5, "restarts": 1}


class Threshold(nn.Module):
    """Chooses class 1 where the one pixel is above 0.5, by a linear layer; no training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[-1.0], [1.0]]))
            self.linear.bias.copy_(torch.tensor([0.5, -0.5]))

    def forward(self, x):
        assert not self.training
        return self.linear(x)


X = torch.tensor([[0.1], [0.45], [0.9], [0.7]])
Y = torch.tensor([0, 0, 1, 0])  # safe, within 0.1 of the threshold, safe, wrong


@pytest.mark.parametrize("sound", [True, False])
def test_errors_by_hand(sound):
    model = nn.Sequential(*Threshold().children()) if sound else Threshold()
    found = cf.evaluate(model, (X, Y), 0.1, sound=sound, **STEPS)
    assert model.training
    assert (found.test_error, found.pgd_error, found.verified_error) == (0.25, 0.5, 0.5)
    assert (found.examples, found.contradictions, found.sound) == (4, 0, sound)
    assert found.semantics == ("real" if sound else "") and found.eps == 0.1
    means = "real" if sound else "false, ordinary bounds"
    assert repr(found) == (
        "Errors(4 examples at eps 0.1: test error 25.00 %, PGD error 50.00 %, "
        f"verified error 50.00 %; sound: {means})"
    )
    with pytest.raises(AttributeError):
        found.test_error = 0


def test_the_sources_of_examples_agree():
    torch.manual_seed(1)
    model = Residual()
    images, labels = digits(30)
    pairs = TensorDataset(images, labels)
    sources = [
        (images, labels),
        (images / 255, labels),
        pairs,
        DataLoader(pairs, batch_size=7),
        DataLoader(TensorDataset(images / 255, labels), batch_size=7),
        cf.data.Split(images, labels),
    ]
    options = {"sound": False, "batch_size": 7, **STEPS}
    found = [cf.evaluate(model, each, 2 / 255, **options) for each in sources]
    assert all(each == found[0] for each in found)
    by_hand = cf.certify(model, images / 255, labels, 2 / 255, sound=False)
    assert found[0].verified_error == 1 - by_hand.verified.double().mean().item()
    assert found[0].test_error == (by_hand.predicted != labels).double().mean().item()


def test_a_model_in_training_mode_comes_back_as_it_was():
    model = Residual()
    model.inner.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cf.evaluate(model, digits(9), 0.01, sound=False, **STEPS)
    assert model.training and model.norm.training and not model.inner.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_eps_by_channel_is_for_ordinary_bounds():
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 2))
    data = (torch.rand(5, 2, 2, 2), torch.zeros(5, dtype=torch.int64))
    found = cf.evaluate(model, data, (0.1, 0.2), clip=None, sound=False, **STEPS)
    certificate = cf.certify(model, *data, eps=(0.1, 0.2), clip=None, sound=False)
    assert found.verified_error == 1 - certificate.verified.double().mean().item()
    assert found.eps is None and "at eps" not in repr(found)
    with pytest.raises(ValueError, match="must be numbers with sound=True"):
        cf.evaluate(model, data, (0.1, 0.2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": Endless()}, TypeError, "data must have a length, and a Endless of unknown"),
        ({"data": DataLoader(Endless())}, TypeError, "data must have a length, and a DataLoader"),
        ({"data": iter([(X, Y)])}, TypeError, "data must have a length"),
        ({"data": (X, Y, Y)}, TypeError, "data must be a pair of tensors, not a tuple of Tensor, "),
        ({"data": (X[:0], Y[:0])}, ValueError, "of one example or more"),
        ({"data": DataLoader(TensorDataset(X), 2)}, TypeError, r"must give batches|pair"),
        ({"data": (X, Y + 2)}, ValueError, "y must be in"),
        ({"eps": cf.Interval.ball(X, 0.1)}, TypeError, "eps must be a number, or one for each"),
        ({"eps": -0.1}, ValueError, "eps must be"),
        ({"semantics": "exact"}, ValueError, "semantics must be one of real, float32, not 'exact'"),
        ({"sound": False, "semantics": "float32"}, ValueError, "it needs sound=True"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number, 1 or more, not 0"),
        ({"step": "newton"}, ValueError, "step must be one of sign, adam, not 'newton'"),
        ({"model": nn.Sequential(nn.Tanh(), nn.Linear(1, 2))}, ValueError, "has no sound rule"),
        ({"clip": 5}, ValueError, r"clip must be \(least, greatest\) or None, got 5"),
        ({"seed": -1}, ValueError, r"seed must be from 0 to 2\*\*63 - 1, not -1"),
        ({"steps": 1.5}, TypeError, "^steps must be a whole number, not 1.5"),
        ({"verified_restarts": -1}, ValueError, "^verified_restarts must be 0 or more, not -1"),
        ({"data": {"x": X}}, ValueError, r"data\[0\] cannot be read: KeyError: 0"),
        (
            {"eps": torch.full((len(X), 1), 0.1), "sound": False, "batch_size": len(X)},
            ValueError,
            r"eps must be the same for all examples, not of shape \[",
        ),
    ],
)
def test_bad_input(change, error, message):
    given = {"model": nn.Sequential(nn.Linear(1, 2)), "data": (X, Y), "eps": 0.1} | change
    with pytest.raises(error, match=message):
        cf.evaluate(**given)


@pytest.mark.parametrize("sound", [True, False])
def test_a_model_may_write_into_what_it_is_given(sound):
    def model(inplace: bool) -> nn.Module:
        linear = nn.Linear(4, 2)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor([[1.0, -1, 1, -1], [-1, 1, -1, 1]]))
        return nn.Sequential(nn.ReLU(inplace=inplace), linear)

    torch.manual_seed(0)
    x, y = torch.rand(40, 4) - 0.5, torch.arange(40) % 2
    before = x.clone()
    options = {"clip": None, "sound": sound, "steps": 5, "restarts": 1, "step_size": None}
    torch.manual_seed(1)
    found = cf.evaluate(model(True), (x, y), 0.1, **options)
    assert torch.equal(x, before)
    torch.manual_seed(1)
    assert found == cf.evaluate(model(False), (x, y), 0.1, **options)
    assert 0 < found.test_error < found.verified_error < 1
