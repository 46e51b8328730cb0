"""On a GPU alone: graphs of certification, PGD and training give what runs without them do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from digits import SHORT, load_toy, toy_dataset
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import _graphs, models
from cibp_fast.attacks import pgd
from cibp_fast.training import datasets, loop, runs
from cibp_fast.training.config import preset

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Makes warnings errors, such as that no graph could be made, or that PyTorch runs what a
    kernel should.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a network of fresh weights, and 4 batches of examples that it labels right."""
    torch.manual_seed(0)
    model = models.NETS["small"]((1, 28, 28)).to(DEVICE).eval()
    x = torch.rand(100, 1, 28, 28).to(DEVICE)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


@contextmanager
def no_graphs() -> Iterator[None]:
    """Calls every function as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_graphs, "on_one_gpu", lambda tensors: False)
        yield


def test_certificates() -> None:
    model, x, y = digits()
    graphs = cf.certify(model, x, y, 0.01, sound=False, batch_size=25)
    with no_graphs():
        expected = cf.certify(model, x, y, 0.01, sound=False, batch_size=25)
    assert torch.equal(graphs.margins, expected.margins)
    on_cpu = cf.certify(model.cpu(), x.cpu(), y.cpu(), 0.01, sound=False, batch_size=25)
    torch.testing.assert_close(graphs.margins.cpu(), on_cpu.margins, rtol=1e-3, atol=1e-4)
    assert torch.equal(graphs.predicted.cpu(), on_cpu.predicted)


def test_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model, x, y = digits()
    options = {"steps": 25, "restarts": 2, "batch_size": 50}
    graphs = pgd(model, x, y, 0.03, **options)
    with no_graphs():
        expected = pgd(model, x, y, 0.03, **options)
    assert torch.equal(graphs.found, expected.found) and graphs.found.any()
    assert torch.equal(graphs.adversarial, expected.adversarial)
    assert (graphs.adversarial - x).abs().max() <= 0.03 + 1e-6
    with torch.no_grad():
        assert (model(graphs.adversarial).argmax(1) != y)[graphs.found].all()


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_training(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares two runs bitwise, and with one on the CPU as closely as rounding lets them."""
    monkeypatch.setattr(datasets, "load", load_toy)
    config = preset("mnist5k-small-0.1-cibp", **SHORT)
    assert len(toy_dataset().test) > config.eval_batch_size  # a graph is replayed
    for name in ("one", "two"):
        loop.train(config, tmp_path / name, device=DEVICE, backend=backend)
    one, two = (runs.read_model(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    loop.train(config, tmp_path / "cpu", device="cpu")
    for a, b in zip(*(runs.read_metrics(tmp_path / name) for name in ("one", "cpu")), strict=True):
        for key in ("loss", "nominal", "robust", "width"):
            assert a[key] == pytest.approx(b[key], rel=1e-2), key
