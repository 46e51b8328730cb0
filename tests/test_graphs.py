"""CUDA graphs without a GPU: what is captured does nothing that a capture forbids, and what is
replayed (here by a stand-in that calls the function again) is what the function would return.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from digits import SHORT, toy_dataset
from torch import nn
from torch.overrides import TorchFunctionMode

import cibp_fast as cf
from cibp_fast import _graphs, attacks, certificates, models
from cibp_fast.attacks import pgd
from cibp_fast.training import datasets, evaluation
from cibp_fast.training.config import preset


class Captured(TorchFunctionMode):
    """Fails at copies, too; the meta device, which has no values, fails at what needs one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [each for each in args if isinstance(each, torch.Tensor)]
        hosts = [each for each in given if each.device.type == "cpu" and each.dim()]
        if isinstance(out, torch.Tensor) and out.device.type == "meta":
            made = func in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
            assert not made and not hosts, f"{func.__name__} copies from the host"
        return out


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x if (x > 0).any() else -x,
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.empty_like(x).copy_(torch.ones(3)),
        lambda x: x[torch.tensor([0, 2])],
    ],
)
def test_the_stand_in_for_a_capture_refuses(forbidden):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Captured():
        forbidden(torch.empty(3, device="meta"))


def _batch_norms():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 4, 3, groups=2), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Dropout()),
        *(nn.Flatten(), nn.Linear(4 * 6 * 6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)),
    )


NETS = {
    f"{make.__name__} {padding}": lambda make=make, padding=padding: make(
        (3, 32, 32), padding=padding
    )
    for make in (models.small, models.medium, models.large)
    for padding in models.PADDINGS
}
NETS["cnn7"] = lambda: models.cnn7((3, 32, 32))
NETS["resnet"] = lambda: models.resnet((3, 32, 32))
NETS["with batch norm, pooling and dropout"] = _batch_norms
NETS["with other activations, not ending in a linear layer"] = lambda: nn.Sequential(
    *(nn.Flatten(), nn.Linear(3072, 9), nn.PReLU(), nn.Softplus(), nn.Linear(9, 10), nn.Tanh()),
)


@pytest.mark.parametrize("batch", [4, 64])
@pytest.mark.parametrize("name", NETS)
def test_what_is_captured_of_the_networks_can_be(name, batch):
    normalize = models.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    model = nn.Sequential(normalize, *NETS[name]()).eval().to("meta")
    x, y = torch.empty(batch, 3, 32, 32, device="meta"), torch.ones(batch, device="meta").long()
    broken = torch.zeros(batch, dtype=torch.bool, device="meta")
    with Captured(), torch.no_grad():
        margins, predicted = certificates._bounded(model, False, False, x, x, x, y)
        point, still = attacks._step(model, x, broken, y, y, x, x, x)
        attacks._last(model, x, broken, y)
        evaluation._predicted(model, x)
    assert margins.shape == (batch, 10) and predicted.shape == still.shape == (batch,)
    assert point.shape == x.shape and point.grad_fn is None


class StandIn:
    """Stands in for a graph: replay calls the function and writes to the capture's outputs."""

    captures = 0

    def __init__(self, function):
        self.function, self.outputs = function, function()
        StandIn.captures += 1

    def replay(self):
        for output, value in zip(self.outputs, self.function(), strict=True):
            output.copy_(value)


@pytest.fixture
def gpu(monkeypatch):
    """Counts CPU tensors as a GPU's; `waiting` says whether waiting for it is an error now."""
    state = SimpleNamespace(waiting="allowed", capturing=False)

    @contextlib.contextmanager
    def no_waiting():
        state.waiting = "refused"
        try:
            yield
        finally:
            state.waiting = "allowed"

    def capture(function, stream, pool):
        assert (stream, pool) == ("stream", "pool")
        state.waiting = "broken off"
        try:
            graph = StandIn(function)
        finally:
            state.waiting = "allowed"
        return graph, graph.outputs

    StandIn.captures = 0
    monkeypatch.setattr(_graphs, "on_one_gpu", lambda tensors: True)
    monkeypatch.setattr(_graphs, "capturing", lambda: state.capturing)
    monkeypatch.setattr(_graphs, "_place", lambda device: ("stream", "pool"))
    monkeypatch.setattr(_graphs, "_no_waiting", no_waiting)
    monkeypatch.setattr(_graphs, "capture", capture)
    for module in (attacks, certificates, evaluation):  # which a CPU's kernels would serve
        monkeypatch.setattr(module, "of_torch_alone", lambda model, x: None)
    return state


def test_replays_equal_calls_and_their_results_stay(gpu):
    weight = torch.rand(3)
    function = _graphs.Graphed(lambda x, y: (weight * x + y, (x > y)))
    pairs = [(torch.rand(2, 3), torch.rand(2, 1)) for _ in range(6)]
    found = [function(*pair) for pair in pairs]
    for (x, y), (scaled, above) in zip(pairs, found, strict=True):
        assert torch.equal(scaled, weight * x + y) and torch.equal(above, x > y)
    assert StandIn.captures == 1

    weight.mul_(2)  # in place: the graph reads it where it is
    x, y = pairs[0]
    assert torch.equal(function(x, y)[0], weight * x + y)
    for n in (1, 4):  # other shapes have graphs of their own
        x, y = torch.rand(n, 3), torch.rand(n, 1)
        assert all(torch.equal(function(x, y)[0], weight * x + y) for _ in range(4))
    assert StandIn.captures == 3


@pytest.mark.parametrize("times", [2, 7])
def test_several_times_feed_the_outputs_back(gpu, times):
    def function(a, b, c):
        return a + b, 2 * b + c

    graphed, c = _graphs.Graphed(function), torch.rand(3)
    for _ in range(4):
        a, b = torch.rand(3), torch.rand(3)
        found = graphed(a, b, c, times=times)
        for _ in range(times):
            a, b = function(a, b, c)
        assert torch.equal(found[0], a) and torch.equal(found[1], b)
    assert StandIn.captures == 1


def test_outputs_that_are_inputs_stay_and_addresses_are_those_of_the_capture(gpu):
    """Keeps addresses: Triton compiles another kernel where an address is not divisible by 16."""
    addresses = []

    def function(x):
        addresses.append(x.data_ptr())
        return x, 2 * x

    graphed, storage = _graphs.Graphed(function), torch.rand(7, requires_grad=True)
    given = [storage[first : first + 3] for first in range(1, 5)]
    for (same, double), x in zip([graphed(x) for x in given], given, strict=True):
        assert torch.equal(same, x) and not double.requires_grad
    _, rehearsed, captured, *replayed = addresses
    assert rehearsed == captured == replayed[0] and rehearsed % 16 == 0


WAITS = RuntimeError("called a synchronizing CUDA operation\nat ...")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
WHY = {
    WAITS: "called a synchronizing CUDA operation (a capture allows",
    FULL: "there is no memory for it; smaller batches need less",
}


@pytest.mark.parametrize(
    ("when", "error"), [("refused", WAITS), ("broken off", WAITS), ("broken off", FULL)]
)
def test_what_cannot_be_captured_is_called_with_one_warning(gpu, when, error):
    def function(x):
        if gpu.waiting == when:
            raise error
        return (2 * x,)

    graphed = _graphs.Graphed(function)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (2, 2, 2, 2, 5, 5, 5):
            x = torch.rand(n)
            assert torch.equal(graphed(x)[0], 2 * x)
    (warning,) = caught
    assert "no CUDA graph" in str(warning.message)
    assert WHY[error] in str(warning.message)
    assert StandIn.captures == 0


def test_an_error_of_the_function_is_its_own(gpu):
    calls = []

    def function(x):
        calls.append(x)
        if len(calls) > 1:
            raise ValueError("bad x")
        return (x,)

    graphed = _graphs.Graphed(function)
    graphed(torch.rand(2))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="bad x"):
        warnings.simplefilter("error")
        graphed(torch.rand(2))


def test_inside_the_capture_of_someone_else_it_is_a_call(gpu):
    calls = []

    def function(x):
        calls.append(x)
        return (2 * x,)

    graphed, x = _graphs.Graphed(function), torch.rand(2)
    for _ in range(3):
        graphed(x)
    assert StandIn.captures == 1
    before = len(calls)
    gpu.capturing = True
    graphed(x)
    assert calls[before:] == [x]


def test_kept_graphs_serve_until_the_outermost_block_ends():
    def double(model, x):
        return (2 * x,)

    model, other = nn.Identity(), nn.Identity()
    assert _graphs.graphed(double, model) is not _graphs.graphed(double, model)
    with _graphs.reuse_graphs():
        first = _graphs.graphed(double, model, 0.5)
        with _graphs.reuse_graphs():
            assert _graphs.graphed(double, model, 0.5) is first
        assert _graphs.graphed(double, model, 0.5) is first
        assert _graphs.graphed(double, model, 0.25) is not first
        assert _graphs.graphed(double, other, 0.5) is not first
        elsewhere = []
        thread = threading.Thread(
            target=lambda: elsewhere.append(_graphs.graphed(double, model, 0.5))
        )
        thread.start()
        thread.join()
        assert elsewhere[0] is not first
    with _graphs.reuse_graphs():
        assert _graphs.graphed(double, model, 0.5) is not first


@pytest.fixture
def cuda(monkeypatch):
    """Replaces what `capture` calls of torch.cuda; holds the current stream, and what happened."""
    state = SimpleNamespace(current="mine", events=[], ends=True)
    signature = inspect.signature(torch.cuda.graph)

    @contextlib.contextmanager
    def graph(*args, **kwargs):
        signature.bind(*args, **kwargs)
        state.current = kwargs["stream"]
        try:
            yield
        finally:
            if not state.ends:
                raise RuntimeError("operation failed due to a previous error during capture")
            state.current = "mine"

    def set_stream(stream):
        state.current = stream

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(_graphs, "_broken_off", [])
    return state


def test_capture_goes_back_to_the_stream_it_came_from(cuda):
    stream = SimpleNamespace(device="cuda:1")
    seen = []
    _, result = _graphs.capture(lambda: seen.append(cuda.current) or 3, stream)
    assert result == 3 and seen == [stream] and cuda.current == "mine"
    assert _graphs._broken_off == []

    with pytest.raises(ZeroDivisionError):
        _graphs.capture(lambda: 1 / 0, stream)
    assert cuda.current == "mine" and _graphs._broken_off == []

    cuda.ends = False  # torch then stays on the stream of the capture
    with pytest.raises(RuntimeError, match="previous error during capture"):
        _graphs.capture(lambda: 1 / 0, stream)
    assert cuda.current == "mine" and len(_graphs._broken_off) == 1


def test_a_gpu_without_memory_says_what_to_do():
    with (
        pytest.raises(
            torch.OutOfMemoryError,
            match=r"^certify with batch_size=7: CUDA out of memory; take a smaller batch_size$",
        ),
        certificates.running("certify", nn.Linear(2, 2), torch.rand(1, 2), 7),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")


@pytest.mark.parametrize("buffers", [False, True])
def test_a_model_on_another_device_is_named(buffers):
    model = nn.BatchNorm1d(2, affine=False) if buffers else nn.Linear(2, 2)
    x, y = torch.rand(3, 2), torch.zeros(3, dtype=torch.int64)
    for function in (pgd, lambda *arguments: cf.certify(*arguments, sound=False)):
        with pytest.raises(ValueError, match="x is on cpu and the model on meta; move one"):
            function(model.to("meta"), x, y, 0.1)


@pytest.mark.parametrize("error", [RuntimeError("broken"), ValueError("broken")])
def test_other_errors_of_a_model_stay(error):
    class Broken(nn.Linear):
        def forward(self, x):
            raise error

    x, y = torch.rand(3, 2), torch.zeros(3, dtype=torch.int64)
    for model in (Broken(2, 2), Broken(2, 2).forward):
        with pytest.raises(type(error), match=r"^broken$"):
            pgd(model, x, y, 0.1)


def _network():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        nn.Linear(4 * 8 * 8, 10),
    ).double()


def test_certify_with_graphs(gpu):
    model = _network()
    x = torch.rand(29, 1, 28, 28).double()
    y = model.eval()(x).argmax(1)
    expected = cf.certify(model, x, y, 0.002, sound=False, batch_size=29)
    found = cf.certify(model, x, y, 0.002, sound=False, batch_size=4)
    assert StandIn.captures == 1  # not of the last batch, of one example
    assert expected.verified.any() and not expected.verified.all()
    assert torch.equal(found.verified, expected.verified)
    torch.testing.assert_close(found.margins, expected.margins, rtol=0, atol=1e-12)


def test_labels_that_are_no_classes_are_refused_in_replays_too(gpu):
    x, y = torch.rand(20, 1, 28, 28).double(), torch.zeros(20, dtype=torch.int64)
    y[18] = 10
    for function in (pgd, lambda *args, **kw: cf.certify(*args, **kw, sound=False)):
        with pytest.raises(ValueError, match=r"y must be in \[0, 10\), got labels 0 to 10"):
            function(_network(), x, y, 0.1, batch_size=2)


@pytest.mark.parametrize("step", attacks.STEPS)
def test_evaluation_with_graphs(gpu, monkeypatch, step):
    split, model = toy_dataset().test, _network().float()
    labels = model.eval()(split.pixels()).argmax(1)
    labels[::7] = (labels[::7] + 1) % 10
    split = datasets.Split(split.images, labels)
    config = preset(
        "mnist5k-small-0.001-cibp",
        **SHORT | {"eval_batch_size": 8, "pgd_steps": 24, "pgd_restarts": 2, "eps": 0.01},
    )
    gpu.capturing = True  # so that it makes none
    expected = evaluation.evaluate(model, split, config, step=step)
    gpu.capturing = False
    monkeypatch.setattr(attacks, "_burst", lambda point: attacks.BURST)
    assert evaluation.evaluate(model, split, config, step=step) == expected
    assert 0 < expected["test_error"] < expected["pgd_error"] <= expected["verified_error"]
    assert StandIn.captures == 4  # bounds, logits, steps, and the last look at the points


def test_attack_and_evaluation_refuse_to_be_captured(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    for module in (attacks, evaluation):
        monkeypatch.setattr(module, "capturing", lambda: True)
    x, y = torch.rand(2, 4).as_subclass(OnGpu), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match=r"pgd cannot be captured, since .* call it outside"):
        pgd(nn.Linear(4, 2), x, y, 0.1)
    split = SimpleNamespace(images=x)
    with pytest.raises(
        RuntimeError, match=r"evaluate cannot be captured, since .* call it outside"
    ):
        evaluation.evaluate(nn.Linear(4, 2), split, preset("mnist5k-small-0.001-cibp"))
