"""The benchmarks of steps and layers check what they time, on a CPU and in Triton's interpreter."""

from __future__ import annotations

import argparse
import csv
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import layer
import problems
import pytest
import step
import timing
import torch
from baselines import CONTENDERS, GPU_CONTENDERS, OwnStep
from problems import CPU, PLAIN, PRECISIONS, Exact, Problem
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cibp_fast.losses import Terms
from cibp_fast.ops import backends

INTERPRETER = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
of_a_gpu = pytest.mark.skipif(not INTERPRETER, reason="of Triton's interpreter")
PROBLEMS = [
    Problem("small", "mnist", 3),
    Problem("small", "cifar10", 2, clip=True),
    Problem("large-same", "mnist", 1),  # with nn.ZeroPad2d
]
TINY = Problem(PLAIN, "2x9x8", 3, clip=True)
ON_CPU = [
    pytest.param(name, each, marks=pytest.mark.slow if name == "compile" else ())
    for name, contender in CONTENDERS.items()
    for each in contender.formats
]
ON_GPU = [
    name
    for name, contender in GPU_CONTENDERS.items()
    if name.startswith(("train_step", "fused")) and contender.backend == "triton"
]
LIMITS = {"copy": 100.0, "float32": 500.0, "tf32": 2000.0, "bf16": 4000.0}


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    if not INTERPRETER:
        yield
        return
    from tritons import large_tiles

    with large_tiles():
        yield


@pytest.fixture(scope="module", params=PROBLEMS, ids=lambda p: f"{p.model}-{p.dataset}-{p.batch}")
def exact(request: pytest.FixtureRequest) -> tuple[Problem, Exact]:
    return request.param, Exact.of(request.param)


@pytest.mark.parametrize("model", problems.NORMED)
@pytest.mark.parametrize("name", ["fused", "layers", "naive", "auto_lirpa"])
def test_networks_with_norms(model: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "auto_lirpa":
        pytest.importorskip("auto_LiRPA")
    narrow = partial(problems.normed_network, width=4)
    monkeypatch.setattr(problems, "normed_network", narrow)
    problem = Problem(model, "3x10x10", 4)
    errors = Exact.of(problem).errors(CONTENDERS[name].step(problem))
    problems.check(errors, 1e-3)
    assert problem.flops() > 0 and problem.bytes("float32") > 0


@pytest.fixture(scope="module")
def tiny() -> Exact:
    return Exact.of(TINY)


@pytest.mark.parametrize(("name", "memory_format"), ON_CPU)
def test_every_contender_agrees_with_the_oracle(
    exact: tuple[Problem, Exact], name: str, memory_format: str
) -> None:
    if name == "auto_lirpa":
        pytest.importorskip("auto_LiRPA")
    contender = CONTENDERS[name]
    check(exact[1], contender.step(exact[0], memory_format), contender)


def check(exact: Exact, made: Any, contender: baselines.Contender) -> None:
    errors = exact.errors(made)
    problems.check(errors, contender.tolerance)
    assert errors["gradient"] > 0


@of_a_gpu
@pytest.mark.parametrize("name", [*ON_GPU, "naive_bf16", "naive_tf32_graph"])
def test_every_contender_of_a_gpu_agrees_with_the_oracle(tiny: Exact, name: str) -> None:
    contender = GPU_CONTENDERS[name]
    made = contender.step(TINY, contender.formats[-1], CPU)
    check(tiny, made, contender)
    before = [parameter.clone() for parameter in made.model.parameters()]
    made.call()
    for old, new in zip(before, made.model.parameters(), strict=True):
        assert torch.equal(old, new)  # the timed steps are the one that was checked
    assert made.saved_bytes() > 0


@of_a_gpu
def test_adam_is_in_the_graph_of_fuse() -> None:
    contender = GPU_CONTENDERS["fused_graph_tf32"]
    assert contender.graph and contender.adam
    made: Any = contender.step(TINY, "nchw", CPU)
    made.optimizer.param_groups[0]["lr"] = 0.1
    before = [parameter.clone() for parameter in made.model.parameters()]
    made.call()
    moved = zip(before, made.model.parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in moved)


@pytest.mark.parametrize(
    ("wrong", "factor", "off"),
    [
        ("nominal", 1.01, "loss is off by "),
        ("robust", 1.01, "loss is off by "),
        ("width", 1.01, "gradient is off by "),  # a small part of the loss, here
        ("width", torch.nan, "loss is off by nan, gradient is off by nan, "),
    ],
)
def test_a_term_that_is_off_by_a_hundredth_is_found(
    wrong: str, factor: float, off: str, tiny: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that such a contender is reported, and not timed."""

    def build(model: nn.Sequential, _: Problem) -> baselines.Step:
        right = baselines.naive(model, TINY)

        def terms(x: torch.Tensor, y: torch.Tensor) -> Terms:
            found = right(x, y)
            return found._replace(**{wrong: factor * getattr(found, wrong)})

        return terms

    monkeypatch.setitem(CONTENDERS, "four", replace(CONTENDERS["four"], build=build))
    names = ["fused", "four"]
    options = argparse.Namespace(device="cpu", rounds=2, ready=1e9, rss=False, contenders=names)
    right, *others = step.rows(TINY, 0, "none", options, LIMITS)
    assert "note" not in right and right["ms"] > 0
    for row in others:
        assert row["note"].startswith(f"wrong: {off}") and "ms" not in row


def test_a_network_of_the_benchmark_exercises_all_of_the_step() -> None:
    """Checks that each ReLU sees active, dead and undecided units, and each loss term counts."""
    problem = Problem("large-same", "mnist", 2)
    model, (x, y) = problem.network(), problem.data()
    lower, upper = problem.streams(x)
    with torch.no_grad():
        for module in model:
            if isinstance(module, torch.nn.ReLU):
                for share in (lower > 0, upper <= 0, (lower <= 0) & (upper > 0)):
                    assert share.float().mean() > 0.05
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                lower, upper = baselines.two_passes(module, lower, upper)
            else:
                lower, upper = module(lower), module(upper)
        terms = baselines.naive(model, problem)(x, y)
    assert all(0.3 < term < 30 for term in terms)


def test_torch_of_a_gpu_gets_nothing_from_the_host() -> None:
    """Refuses what a capture forbids: a tensor on the CPU, a number that the host waits for."""
    with FakeTensorMode(), torch.no_grad():
        problem = Problem("large-same", "cifar10", 2, clip=True)
        model = problem.network()
        for module in model:
            for name, parameter in module.named_parameters():
                like = torch.empty(parameter.shape, device="cuda:0")
                module._parameters[name] = nn.Parameter(like)
        x = torch.empty(2, 3, 32, 32, device="cuda:0")
        y = torch.zeros(2, dtype=torch.int64, device="cuda:0")
        terms = baselines.naive(model, problem)(x, y)
        assert terms.total(0.5, 1.0).device == torch.device("cuda:0")


def test_flops_and_bytes_of_the_small_network_by_hand() -> None:
    problem = Problem("small", "mnist", 5)
    conv1, conv2 = 16 * 13 * 13 * 16, 32 * 10 * 10 * 16 * 16  # outputs x products of an output
    others = conv2 + 3200 * 100 + 100 * 10
    assert problem.flops() == 2 * 5 * (6 * conv1 + 9 * others)
    weights = [16 * 16 + 16, 32 * 16 * 16 + 32, 3200 * 100 + 100, 100 * 10 + 10]
    units = [28 * 28, 16 * 13 * 13, 3200, 100, 10]
    numbers = 0
    for i, weight in enumerate(weights):
        inputs, outputs = 3 * 5 * units[i], 3 * 5 * units[i + 1]
        numbers += 2 * (inputs + outputs + weight) + (2 * inputs + outputs + weight if i else 0)
    for precision, element in PRECISIONS.items():
        assert problem.bytes(precision) == element * numbers + 28 * sum(weights)


@of_a_gpu
def test_saved_bytes() -> None:
    """Counts each storage once, without parameters and batch.

    On a GPU, tf32 saves at most half of what naive saves, and bf16 at most a quarter.
    """
    made = CONTENDERS["naive"].step(PROBLEMS[0])
    assert isinstance(made, baselines.TorchStep)
    weight = next(made.model.parameters())
    naive = made.saved_bytes()

    def terms(x: torch.Tensor, y: torch.Tensor) -> Terms:
        saved = torch.zeros(1000, requires_grad=True).exp()  # its result
        twice = (saved * saved[:]).sum()  # the same again
        return Terms(twice, (x[0, 0, 0, 0] * weight).sum(), weight.new_zeros(()))

    made.terms = terms
    assert made.saved_bytes() == 4000
    tf32, bf16 = (OwnStep(PROBLEMS[0], each, CPU).saved_bytes() for each in ("tf32", "bf16"))
    assert tf32 <= 0.5 * naive and bf16 <= 0.25 * naive


# The tables


def table(script: timing.Script, path: Path, words: str) -> list[dict[str, str]]:
    assert script.main([*words.split(), "--threads", "1", "--output", str(path)]) == 0
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_table_of_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks the table of two batch sizes and two loads."""
    words = "--models small --datasets mnist --rounds 2 --contenders fused naive"
    words += " --batch 1 2 --load 0 1"
    rows = table(step.script, tmp_path / "new" / "step.csv", words)
    keys = [tuple(row[key] for key in ("batch", "load", "contender", "format")) for row in rows]
    contenders = [("fused", "nchw"), ("naive", "nchw"), ("naive", "nhwc")]
    assert keys == [(b, load, *each) for b in "12" for load in "01" for each in contenders]
    for row in rows:
        assert all(row.values()) and row["optimizer"] == "none" and row["threads"] == "1"
        assert row["command"].startswith("python bench/step.py --models small --datasets mnist ")
        ms, gflop = float(row["ms"]), float(row["gflop"])
        assert 0 < float(row["ms_q1"]) <= ms <= float(row["ms_q3"])
        problem = Problem("small", "mnist", int(row["batch"]))
        assert gflop == pytest.approx(problem.flops() / 1e9, rel=1e-3)
        assert float(row["effective_gflops"]) == pytest.approx(1e3 * gflop / ms, rel=1e-3)
        flag = "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()
        assert row["avx512_bf16"] == str(flag) and row["isa"] in backends.ISAS
        assert float(row["gradient_error"]) <= float(row["tolerance"])
        assert int(row["saved_bytes"]) > 0
    assert {row["fused_ratio"] for row in rows[::3]} == {"1.0"}
    assert "beside 1 busy processes a core" in capsys.readouterr().out


def test_steps_with_adam_and_of_clipped_boxes(tmp_path: Path) -> None:
    output = tmp_path / "step.csv"
    options = "--models small --datasets mnist --contenders fused naive --rounds 2 --batch 1"
    words = [*options.split(), "--optimizer", "none", "adam", "--clip", "--output", str(output)]
    assert step.script.main(words) == 0
    rows = list(csv.DictReader(output.open()))
    assert [row["optimizer"] for row in rows] == ["none"] * 3 + ["adam"] * 3
    assert {row["clip"] for row in rows} == {"True"} and all(float(row["ms"]) > 0 for row in rows)
    assert [row["fused_ratio"] for row in rows[::3]] == ["1.0", "1.0"]


def test_a_contender_gets_its_stream_before_memory_is_read(
    tiny: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []

    def made(*arguments: object) -> None:
        done.append(arguments[-1])
        raise RuntimeError("enough")

    monkeypatch.setattr(step.machine, "capture_stream", lambda _: done.append("made") or "stream")
    monkeypatch.setattr(step.machine, "memory", lambda device: done.append("memory"))
    monkeypatch.setattr(baselines.Contender, "step", made)
    options = argparse.Namespace(device="interpreter")
    with pytest.raises(RuntimeError, match="enough"):
        step.made(TINY, GPU_CONTENDERS["naive_tf32_graph"], "nchw", tiny, options)
    assert done == ["made", "memory", "stream"]


def test_the_peak_memory_of_a_step_in_a_child() -> None:
    try:
        step.reset_peak()
    except OSError:
        pytest.skip("no /proc/self/clear_refs")
    problem = Problem("small", "mnist", 100)
    options = argparse.Namespace(device="cpu", rss=True)
    _, facts = step.made(problem, CONTENDERS["fused"], "nchw", Exact.of(problem), options)
    assert 0.9 * facts["saved_bytes"] < facts["peak_bytes"] < 10 * facts["saved_bytes"]


def test_the_table_of_channel_counts(tmp_path: Path) -> None:
    words = "--channels 1 5 --batch 3 --contenders fused naive --rounds 2"
    rows = table(step.script, tmp_path / "channels.csv", words)
    assert [(row["model"], row["dataset"], row["contender"]) for row in rows] == [
        (PLAIN, dataset, name)
        for dataset in ("1x16x16", "5x16x16")
        for name in ("fused", "naive", "naive")
    ]
    first, second = 5 * 14 * 14 * 9 * 5, 5 * 12 * 12 * 9 * 5  # outputs x products of an output
    flops = 2 * 3 * (6 * first + 9 * (second + 10 * 12 * 12 * 5))
    assert float(rows[-1]["gflop"]) == pytest.approx(flops / 1e9, rel=1e-3)


@of_a_gpu
def test_the_rows_of_a_step_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that the rest goes on where one contender has no memory."""

    def hungry(model: nn.Sequential, _: Problem) -> baselines.Step:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    compiled = replace(GPU_CONTENDERS["compile"], build=hungry)
    monkeypatch.setitem(GPU_CONTENDERS, "compile", compiled)
    names = ["train_step_tf32", "fused_graph_tf32", "compile", "naive_tf32", "train_step_cuda_tf32"]
    given = {"device": "interpreter", "rounds": 2, "ready": 1e9, "rss": False}
    rows = step.rows(TINY, 0, "adam", argparse.Namespace(contenders=names, **given), LIMITS)
    notes = {row["contender"]: row["note"] for row in rows if "note" in row}
    assert notes == {
        "compile": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "train_step_cuda_tf32": "ValueError: backend='cuda' cannot run: the CUDA kernels are for "
        "NVIDIA's GPUs, and the tensors are on 'cpu'",
    }
    timed = [row for row in rows if "note" not in row]
    assert [row["contender"] for row in timed] == [*names[:2], *["naive_tf32"] * 2]
    for row in timed:
        assert row["optimizer"] == "adam" and row["fused_ratio"] > 0
        assert row["peak_gflops"] == LIMITS["tf32"] and row["copy_share"] > 0
        assert row["mbytes"] == pytest.approx(TINY.bytes("tf32") / 1e6, rel=1e-3)
    assert timed[0]["fused_ratio"] == 1


def test_the_table_of_the_layers(tmp_path: Path) -> None:
    words = "--models small --datasets mnist --rounds 2"
    rows = table(layer.script, tmp_path / "layers.csv", words)
    names = ["1 conv 1->16 4x4 s2", "2 conv 16->32 4x4 s1", "3 fc 3200->100", "4 fc 100->10"]
    assert list(dict.fromkeys((row["layer"], row["pass"]) for row in rows)) == [
        (name, kind) for name in names for kind in ("forward", "training")
    ]
    assert len(rows) == 2 * (4 + 4 + 2 + 2)  # convolutions in both formats
    assert all(all(row.values()) for row in rows)


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any) -> Any:
        lower, upper, nominal, width = layer.naive(*given)
        return lower, upper, 1.001 * nominal, width

    monkeypatch.setattr(layer, "CONTENDERS", {"naive": (wrong, "float32", 1e-4)})
    options = argparse.Namespace(device="cpu", rounds=2)
    for row in layer.rows(layer.layers("small", "mnist")[0], False, options, LIMITS):
        assert row["note"].startswith("wrong: nominal is off by ") and "ms" not in row


@of_a_gpu
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_the_rows_of_a_layer_on_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes one contender wrong: its row has a note in place of a time."""
    contender = (*layer.GPU_CONTENDERS["naive_bf16"][:2], 1e-9)
    monkeypatch.setitem(layer.GPU_CONTENDERS, "naive_bf16", contender)
    module: Any = nn.Conv2d(3, 4, 3, (2, 1), (1, 0)) if kind == "conv" else nn.Linear(20, 7)
    x = torch.rand((2, 3, 6, 5) if kind == "conv" else (2, 20))
    streams = (x - 0.1, x + 0.1, x)
    one = layer.Layer("1", module.requires_grad_(False), streams, first=False)
    options = argparse.Namespace(device="interpreter", rounds=2)
    rows = layer.rows(one, True, options, LIMITS)
    formats = ("nchw", "nhwc") if kind == "conv" else ("nchw",)
    assert [(row["contender"], row["format"]) for row in rows] == [
        (name, each) for name in layer.GPU_CONTENDERS for each in formats
    ]
    for row in rows:
        if row["contender"] == "naive_bf16":
            assert row["note"].startswith("wrong: ") and "ms" not in row
            continue
        assert float(row["error"]) <= row["tolerance"] and row["ms"] > 0 and row["fused_ratio"] > 0
        outputs, products = module(x).numel(), module.weight[0].numel()
        assert row["gflop"] == pytest.approx(3 * 2 * outputs * products * 3 / 1e9, rel=1e-3)
        weights = products * len(module.weight) + len(module.weight)
        numbers = 3 * (3 * x.numel() + 3 * outputs + weights) + 3 * x.numel()
        assert row["mbytes"] == pytest.approx(PRECISIONS[row["precision"]] * numbers / 1e6, 1e-3)
