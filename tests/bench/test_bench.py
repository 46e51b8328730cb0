"""The benchmarks check what they time, and their tables say what they should."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import runpy
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import baselines
import common
import layer
import numpy as np
import precision
import pytest
import step
import torch
from commands import error_line
from contenders import Contender, Exact, Problem, checked
from precision import Comparison

from cibp_fast import cli
from cibp_fast.fusion import CPU_PRECISIONS as PRECISIONS
from cibp_fast.losses import Terms
from cibp_fast.ops import backends
from cibp_fast.training import loop, plotting, runs
from cibp_fast.training.config import preset

BENCH = Path(__file__).parents[2] / "bench"
SCRIPT = BENCH / "bench_loop.py"
QUICK = ["--steps=2", "--repeats=2", "--examples=20", "--threads=1", "--synthetic"]


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *QUICK, *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_table_of_the_loop(tmp_path, monkeypatch, capsys):
    presets = ["cifar10-small-8of255-cibp", "mnist-small-0.4-nominal"]
    output = tmp_path / "results" / "loop.csv"
    _run(monkeypatch, "--preset", *presets, "--output", output)
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["preset"] for row in rows] == presets
    for row, batch in zip(rows, ("50", "100"), strict=True):
        assert all(row.values()) and None not in row
        assert (row["batch"], row["epoch_steps"], row["threads"]) == (batch, "2", "1")
        shares = {
            part: float(row[part]) for part in ("step", "data", "logging", "writing", "other")
        }
        assert sum(shares.values()) == pytest.approx(1, abs=5e-5)  # five, rounded to 1e-5 each
        assert all(0 < share < 1 for share in shares.values())
        assert 0 < float(row["outside_q1"]) <= float(row["outside"]) <= float(row["outside_q3"]) < 1
        # Of two epochs the median is the mean, and the share over both is between their shares.
        spread = 2 * (float(row["outside_q3"]) - float(row["outside_q1"]))
        assert float(row["outside"]) == pytest.approx(1 - shares["step"], abs=spread / 2 + 5e-5)
        per_step = 1e3 * int(batch) / float(row["examples_per_s"])  # ms
        assert float(row["step_ms"]) == pytest.approx(per_step * shares["step"], rel=1e-2)
        assert float(row["evaluation_ms_per_example"]) > 0
        assert row["command"] == (
            f"python bench/bench_loop.py --preset {row['preset']} --threads 1 --steps 2 "
            "--examples 20 --repeats 2 --clock wall --synthetic"
        )
    printed = capsys.readouterr().out
    assert printed.count("outside the step: ") == 2 and "epoch " not in printed


def test_the_table_of_the_busy_machine(tmp_path, monkeypatch, capsys):
    output, script = tmp_path / "load.csv", BENCH / "bench_load.py"
    words = ["--batch", "2", "--load", "0", "1", "--threads", "1", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [str(script), *words, "--output", str(output)])
    runpy.run_path(str(script), run_name="__main__")
    with output.open() as file:
        rows = list(csv.DictReader(file))
    keys = [(row["load"], row["contender"], row["threads"]) for row in rows]
    assert keys == [(load, name, "1") for load in "01" for name in ("fused", "naive")]
    for row in rows:
        assert all(row.values()) and None not in row
        assert 0 < float(row["ms_q1"]) <= float(row["ms"]) <= float(row["ms_q3"])
        assert float(row["ms_q3"]) <= float(row["ms_max"])
        assert row["contender"] == "fused" or row["ratio"] == "1.0"
        assert row["command"] == (
            "python bench/bench_load.py --models small --datasets mnist --batch 2 --load 0 1 "
            "--threads 1 --rounds 2"
        )
    assert capsys.readouterr().out.count("ratio") == len(rows)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--repeats=1"], "--repeats at least 2"),
        (["--steps=0"], "--steps must be at least 1"),
        (["--clock=cpu", "--threads=2"], "use it with --threads 1"),
    ],
)
def test_what_the_benchmark_refuses(monkeypatch, capsys, wrong, message):
    with pytest.raises(SystemExit):
        _run(monkeypatch, *wrong)
    assert message in capsys.readouterr().err


PROBLEMS = [
    Problem("small", "mnist", 3, clip=False),
    Problem("small", "cifar10", 2, clip=True),
    Problem("large-same", "mnist", 1, clip=False),  # with nn.ZeroPad2d
]
CONTENDERS = [
    pytest.param(name, each, marks=pytest.mark.slow if name == "compile" else ())
    for name, rival in baselines.RIVALS.items()
    for each in rival.formats
]


@pytest.fixture(scope="module", params=PROBLEMS, ids=lambda p: f"{p.model}-{p.dataset}-{p.batch}")
def exact(request) -> tuple[Problem, Exact]:
    return request.param, Exact.of(request.param)


@pytest.mark.parametrize(("name", "memory_format"), CONTENDERS)
def test_every_contender_agrees_with_the_oracle(exact, name, memory_format):
    if name == "auto_lirpa":
        pytest.importorskip("auto_LiRPA")
    contender, facts = checked(exact[0], baselines.RIVALS[name], memory_format, exact[1])
    assert 0 < float(facts["gradient_error"]) <= facts["tolerance"]
    before = [parameter.clone() for parameter in contender.model.parameters()]
    contender.optimizer.step()
    for old, new in zip(before, contender.model.parameters(), strict=True):
        assert torch.equal(old, new)  # the timed steps are the one that was checked


@pytest.mark.parametrize("wrong", ["nominal", "robust", "width"])
def test_a_term_that_is_off_by_a_hundredth_is_found(monkeypatch, wrong):
    def build(model, ball):
        right = baselines.naive(model, ball)

        def terms(x: torch.Tensor, y: torch.Tensor) -> Terms:
            found = right(x, y)
            return found._replace(**{wrong: 1.01 * getattr(found, wrong)})

        return terms

    monkeypatch.setitem(baselines.RIVALS, "naive", replace(baselines.RIVALS["naive"], build=build))
    with pytest.raises(AssertionError, match=r"wrong: loss off by .*, a gradient by"):
        checked(PROBLEMS[0], baselines.RIVALS["naive"], "nchw", Exact.of(PROBLEMS[0]))


def test_a_network_of_the_benchmark_exercises_all_of_the_step():
    """Each ReLU sees active, dead and undecided units, and each term of the loss counts."""
    problem = Problem("large-same", "mnist", 2, clip=False)
    model, (x, y) = problem.network(), problem.data()
    lower, upper = problem.ball.streams(x)
    with torch.no_grad():
        for module in model:
            if isinstance(module, torch.nn.ReLU):
                for share in (lower > 0, upper <= 0, (lower <= 0) & (upper > 0)):
                    assert share.float().mean() > 0.05
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                lower, upper = baselines.two_passes(module, lower, upper)
            else:
                lower, upper = module(lower), module(upper)
        terms = baselines.naive(model, problem.ball)(x, y)
    assert all(0.3 < term < 30 for term in terms)


def test_flops_of_the_small_network_by_hand():
    conv1, conv2 = 16 * 13 * 13 * 16, 32 * 10 * 10 * 16 * 16  # outputs x products of an output
    others = conv2 + 3200 * 100 + 100 * 10
    expected = 2 * 5 * (6 * conv1 + 9 * others)  # batch 5
    assert Problem("small", "mnist", 5, clip=False).flops() == expected


def test_saved_bytes_counts_each_storage_once_without_parameters_and_batch():
    contender = Contender(PROBLEMS[0], baselines.RIVALS["naive"], "nchw")
    weight = next(contender.model.parameters())

    def terms(x: torch.Tensor, y: torch.Tensor) -> Terms:
        saved = torch.zeros(1000, requires_grad=True).exp()  # its result
        twice = (saved * saved[:]).sum()  # the same again
        return Terms(twice, (x[0, 0, 0, 0] * weight).sum(), weight.new_zeros(()))

    contender.terms = terms
    assert contender.saved_bytes() == 4000


@pytest.mark.parametrize("name", ["naive", "fused"])
def test_the_peak_memory_of_a_step_in_a_child(name):
    try:
        step._reset_peak()
    except OSError:
        pytest.skip("no /proc/self/clear_refs")
    problem = Problem("small", "mnist", 100, clip=False)
    growth = step.in_child(step.peak_growth, problem, name, "nchw", 1)
    saved = Contender(problem, baselines.RIVALS[name], "nchw").saved_bytes()
    assert 0.9 * saved < growth < 10 * saved


def _main(*arguments) -> int:
    return cli.main(["bench", *map(str, arguments), "--threads", "1"])


def _step_csv(path: Path, *options: str) -> list[dict[str, str]]:
    quick = ["--models", "small", "--datasets", "mnist", "--rounds", "2"]
    assert _main("step", *quick, *options, "--output", path) == 0
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def step_csv(tmp_path_factory) -> Path:
    """A table of two batch sizes; one contender is not there, and not compiled for speed."""
    path = tmp_path_factory.mktemp("step") / "new" / "step.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "auto_LiRPA", None)
        names = ["fused", "fast", "layers", "naive", "four", "auto_lirpa", "naive_bf16"]
        _step_csv(path, "--batch", "1", "2", "--contenders", *names)
    return path


def test_the_table_of_the_step(step_csv):
    with step_csv.open() as file:
        rows = list(csv.DictReader(file))
    keys = {tuple(row[key] for key in step.KEYS) for row in rows}
    assert len(keys) == len(rows) == 2 * 2 * 10  # batches, optimizers, contenders and formats
    assert {row["contender"] for row in rows if row["note"]} == {"auto_lirpa"}
    for row in rows:
        assert None not in row and all(row[key] for key in (*step.KEYS, *common.CONDITIONS))
        assert row["command"].startswith("cibp-fast bench step --models small --datasets mnist")
        if row["note"]:
            assert row["note"].startswith("ModuleNotFoundError: ") and not row["ms"]
            continue
        ms, gflop = float(row["ms"]), float(row["gflop"])
        assert 0 < float(row["ms_q1"]) <= ms <= float(row["ms_q3"])
        assert gflop == pytest.approx(
            Problem("small", "mnist", int(row["batch"]), False).flops() / 1e9, rel=1e-2
        )
        assert float(row["effective_gflops"]) == pytest.approx(1e3 * gflop / ms, abs=0.06, rel=1e-2)
        share = float(row["effective_gflops"]) / float(row["peak_gflops"])
        assert float(row["effective_to_peak"]) == pytest.approx(share, abs=5e-3)
        flag = "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()
        assert row["avx512_bf16"] == str(flag) and row["isa"] in backends.ISAS
        assert float(row["ms_per_example"]) == pytest.approx(ms / int(row["batch"]), rel=1e-3)
        assert float(row["ms_per_gflop"]) == pytest.approx(ms / gflop, rel=1e-2)
        assert float(row["gradient_error"]) <= float(row["tolerance"])
        assert int(row["saved_bytes"]) > 0 and not row["rss_bytes"]
    for batch in ("1", "2"):
        for optimizer in step.OPTIMIZERS:
            own = [row for row in rows if (row["batch"], row["optimizer"]) == (batch, optimizer)]
            naive = min(
                (row for row in own if row["contender"] == "naive"),
                key=lambda row: float(row["ms"]),
            )
            assert float(naive["ratio"]) == 1
            (fused,) = (row for row in own if row["contender"] == "fused")
            assert float(fused["fused_ratio"]) == 1
    alone, adam = (
        {
            row["contender"]: float(row["ms"])
            for row in rows
            if row["optimizer"] == each and row["ms"]
        }
        for each in step.OPTIMIZERS
    )
    assert all(alone[name] < adam[name] for name in alone)


def test_a_contender_that_is_wrong_is_not_timed(monkeypatch, tmp_path, capsys):
    strict = replace(baselines.RIVALS["naive_bf16"], tolerance=1e-6)
    monkeypatch.setitem(baselines.RIVALS, "naive_bf16", strict)
    monkeypatch.setattr(step, "peak_gflops", lambda: 100.0)
    rows = _step_csv(tmp_path / "step.csv", "--batch", "1", "--contenders", "naive_bf16", "layers")
    wrong = [row for row in rows if row["contender"] == "naive_bf16"]
    assert len(wrong) == 2
    assert all(row["note"].startswith("wrong: loss off by") and not row["ms"] for row in wrong)
    assert capsys.readouterr().out.count("not timed: wrong: loss off by") == 1
    others = [row for row in rows if row["contender"] == "layers"]
    assert len(others) == 4 and all(row["ms"] and not row["ratio"] for row in others)


def test_the_table_of_the_layers(tmp_path, capsys):
    path = tmp_path / "layers.csv"
    assert (
        _main("layer", "--models", "small", "--datasets", "mnist", "--rounds", 2, "--output", path)
        == 0
    )
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = ["1 conv 1->16 4x4 s2", "2 conv 16->32 4x4 s1", "3 fc 3200->100", "4 fc 100->10"]
    assert [(row["layer"], row["pass"]) for row in rows] == [
        (name, kind) for name in names for kind in ("forward", "training")
    ]
    assert all(all(row.values()) and None not in row for row in rows)
    assert capsys.readouterr().out.count("all layers") == 2


def test_a_wrong_layer_is_not_timed(monkeypatch):
    def wrong(inputs, geometry):
        lower, upper, nominal, width = layer.naive(inputs, geometry)
        return lower, upper, 1.001 * nominal, width

    monkeypatch.setitem(layer.CONTENDERS, "naive", wrong)
    with pytest.raises(AssertionError, match="naive nchw: nominal is off by"):
        layer.calls(layer.layers("small", "mnist")[0], training=False)


def test_the_table_of_channel_counts(channels_csv):
    with channels_csv.open() as file:
        rows = list(csv.DictReader(file))
    names = ["fused", "fast", "naive", "naive"]
    assert [(row["model"], row["dataset"], row["contender"]) for row in rows] == [
        ("plain", dataset, name)
        for dataset in ("1x16x16", "5x16x16")
        for name in 2 * names  # optimizers
    ]
    assert all(row["ms"] for row in rows)
    first, second = 5 * 14 * 14 * 9 * 5, 5 * 12 * 12 * 9 * 5  # outputs x products of an output
    flops = 2 * 3 * (6 * first + 9 * (second + 10 * 12 * 12 * 5))
    assert float(rows[-1]["gflop"]) == pytest.approx(flops / 1e9, abs=1e-4)


@pytest.fixture(scope="module")
def channels_csv(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("channels") / "channels.csv"
    options = ["--batch", 3, "--contenders", "fused", "fast", "naive", "--rounds", 2]
    assert _main("step", "--channels", 1, 5, *options, "--output", path) == 0
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A data root with 250 and 30 random images in MNIST's place."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 250), ("t10k", 30)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return root


def _precisions(digits: Path, output: Path, *options: object) -> list[dict[str, str]]:
    quick = ["--steps", 6, "--window", 3, "--seeds", 2, "--unverified-data"]
    assert _main("precision", *quick, "--data-root", digits, "--output", output, *options) == 0
    with output.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def precisions_csv(tmp_path_factory, digits) -> Path:
    path = tmp_path_factory.mktemp("precisions") / "precisions.csv"
    _precisions(digits, path)
    return path


@pytest.mark.filterwarnings("ignore:.*official")
def test_the_table_of_the_precisions(precisions_csv, digits, tmp_path, capsys):
    with precisions_csv.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["precision"], row["seed"], row["step"]) for row in rows] == [
        (precision, seed, step)
        for seed in ("0", "1")
        for precision in PRECISIONS
        for step in ("3", "6")
    ]
    assert all(all(row.values()) and None not in row for row in rows)
    assert rows[0]["command"].startswith("cibp-fast bench precision --steps 6 --window 3")

    def losses(rows: list[dict[str, str]]) -> list[str]:
        return [row["loss"] for row in rows]

    assert losses(rows[:2]) != losses(rows[4:6])  # another seed
    again = _precisions(digits, tmp_path / "again.csv", "--jobs", 2)
    assert losses(again) == losses(rows)
    assert f"mnist-small-0.4-cibp: {Comparison.of(rows).verdict}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*official")
def test_the_losses_are_those_of_the_training_loop(digits, tmp_path):
    config = precision.first_steps(preset("mnist-small-0.4-cibp", seed=3), 5)
    found, _ = precision.losses(config, digits, verify=False, threads=1, alone=True)
    config = config.replace(pgd_steps=0, pgd_restarts=0)
    loop.train(config, tmp_path, data_root=digits, verify_data=False)
    epochs = [record["loss"] for record in runs.read_metrics(tmp_path)]
    assert epochs == pytest.approx([np.mean(found[at : at + 2]) for at in (0, 2, 4)], rel=1e-9)


@pytest.mark.parametrize("name", ["mnist-small-0.4-cibp-gowal", "cifar10-small-8of255-cibp"])
@pytest.mark.parametrize("steps", [1, 5_000, 20_000])
def test_first_steps_keep_the_schedules(name, steps):
    config = preset(name)
    first = precision.first_steps(config, steps)
    assert first.steps == steps
    for schedule in ("eps_schedule", "kappa_schedule", "lr_schedule"):
        ours, theirs = getattr(first, schedule)(), getattr(config, schedule)()
        at = range(0, steps, max(1, steps // 50))
        assert [ours(i) for i in at] == pytest.approx([theirs(i) for i in at], rel=1e-12)


def _curves(*curves: list[list[float]]) -> list[dict[str, object]]:
    return [
        {"precision": precision, "seed": seed, "step": 100 * (i + 1), "loss": loss}
        for precision, own in zip(PRECISIONS, curves, strict=True)
        for seed, curve in enumerate(own)
        for i, loss in enumerate(curve)
    ]


def test_a_comparison_by_hand():
    made = Comparison.of(_curves([[1.0, 5.0], [3.0, 9.0]], [[1.2, 5.0], [3.4, 9.0]]))
    # variances over the seeds 2 and 2.42 in the first window, 8 and 8 in the second
    assert (made.step, made.distance) == (100, pytest.approx(0.3 / 2.21**0.5))
    assert made.same_seed == pytest.approx(0.2)
    assert made.others == pytest.approx(4 / 8**0.5)  # seed 0 against seed 1, second window
    assert made.verdict.startswith("within the noise of the seeds: the precisions are 0.2 ")


def test_a_comparison_that_finds_a_difference():
    curves = [[1.0], [1.1], [0.9]], [[2.0], [2.1], [1.9]]
    assert Comparison.of(_curves(*curves)).verdict.startswith("beyond the noise of the seeds")
    same = Comparison.of(_curves(curves[0], curves[0]))
    assert same.verdict.startswith("the curves are the same") and same.distance == 0


def test_a_comparison_of_too_little():
    rows = _curves([[1.0], [2.0]], [[1.0], [2.0]])
    for part in (rows[1:], [row for row in rows if row["seed"] == 0]):
        with pytest.raises(ValueError, match="2 or more seeds needs all steps in both"):
            Comparison.of(part)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--contenders", "fastest"], "invalid choice: 'fastest'"),
        (["step", "--models", "tiny"], "invalid choice: 'tiny'"),
        (["step", "--threads", "0"], "threads must be from 1 to 1024, not 0"),
        (["step", "--threads", "2", "--clock", "cpu"], "use it with --threads 1"),
        (["step", "--rounds", "1"], "rounds must be 2 or more, not 1"),
        (["step", "--batch", "4", "0"], "batch must be 1 or more, not 0"),
        (["step", "--channels", "4", "0"], "channels must be 1 or more, not 0"),
        (["step", "--output", "{tmp}/file/step.csv"], "{tmp}/file"),
        (["step", "--output", "{tmp}"], "cannot write {tmp}: it is a folder"),
        (["layer", "--output", "{tmp}"], "cannot write {tmp}: it is a folder"),
        (["layer", "--contenders", "fused"], "unrecognized arguments"),
        (["precision", "--seeds", "1"], "seeds must be from 2 to 8, not 1"),
        (["precision", "--steps", "0"], "steps must be 1 or more, not 0"),
        (["precision", "--window", "0"], "window must be 1 or more, not 0"),
        (["precision", "--jobs", "0"], "jobs must be 1 or more, not 0"),
        (["precision", "--steps", "150"], "steps must be a multiple of window, 100, not 150"),
        (["precision", "--steps", "60100"], "steps must be at most the 60000 of mnist-small"),
        (["precision", "--presets", "mnist-tiny-0.4-cibp"], "unknown preset"),
        (["precision", "--presets", "mnist-small-0.4-nominal"], "float32 for method nominal"),
        (["precision", "--output", "{tmp}"], "cannot write {tmp}: it is a folder"),
        (["precision", "--data-root", "{tmp}"], "{tmp}"),
        (["steps"], "invalid choice: 'steps'"),
        ([], "required: BENCHMARK"),
    ],
)
def test_one_line_for_bad_input(tmp_path, capsys, arguments, message):
    (tmp_path / "file").touch()
    line = error_line(capsys, "bench", *(word.format(tmp=tmp_path) for word in arguments))
    assert message.format(tmp=tmp_path) in line


@pytest.mark.parametrize("name", ["step", "layer", "precision"])
def test_help(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", name, "--help"])
    assert f"example:\n  cibp-fast bench {name} --" in capsys.readouterr().out


@pytest.fixture
def readme(monkeypatch, step_csv, channels_csv, precisions_csv, tmp_path):
    """bench/report.py with the tables above, that of the step completed."""
    spec = importlib.util.spec_from_file_location("update_readme", BENCH / "update_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with step_csv.open() as file:
        rows = list(csv.DictReader(file))
    rows += [row | {"contender": "compile"} for row in rows if row["contender"] == "four"]
    common.write(tmp_path / "step.csv", step.FIELDS, rows)
    shutil.copy(channels_csv, tmp_path)
    shutil.copy(precisions_csv, tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_the_section_of_the_step(readme):
    lines = readme.performance()
    small = [line for line in lines if line.startswith("| small mnist ")]
    assert len(small) == 2  # batch sizes
    header = next(line for line in lines if line.startswith("| network"))
    assert all(line.count("|") == header.count("|") for line in small)
    assert all(line.count("not timed") == 1 for line in small)  # auto_LiRPA
    assert sum("Not timed: `auto_lirpa`: ModuleNotFoundError" in line for line in lines) == 1
    with (readme.RESULTS / "step.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["contender"] == "fused")
    assert f"| {float(row['ms']):.3g} (" in small[0]
    effective = float(row["effective_gflops"]) / float(row["peak_gflops"])
    assert f"| {float(row['effective_gflops']):.0f} ({effective:.2f}) |" in small[0]
    assert "share of peak" not in "".join(lines) and "are no share of it" in lines[-1]


@pytest.fixture
def two_processors(readme):
    """An older table of an AVX2 processor, and one of a processor with AVX512_BF16."""
    rows = [row for row in readme.read("step") if row["batch"] == "1"]
    fields = [name for name in step.FIELDS if name != "avx512_bf16"]
    speeds = {"naive_bf16": (0.05, 1.5), "fused": (1.7, 2.0)}
    for name, columns, isa, speed in (
        ("step", fields, "avx2", 0),
        ("step_avx512", None, "avx512", 1),
    ):
        own = [row | {"isa": isa, "cpu": f"a made-up {isa}"} for row in rows]
        for row in own:
            if row["contender"] in speeds:
                row["ratio"] = str(speeds[row["contender"]][speed])
            if columns is None:
                row["avx512_bf16"] = "True"
            else:
                del row["avx512_bf16"]
        common.write(readme.RESULTS / f"{name}.csv", columns or step.FIELDS, own)
    return readme


def test_a_processor_has_its_own_table(two_processors):
    text = "\n".join(two_processors.performance())
    old, new = text.split("**a made-up avx512, avx512 kernels, with AVX512_BF16.**")
    assert "**a made-up avx2, avx2 kernels, without AVX512_BF16.**" in old
    assert "has 0.05 to 0.05 times the speed of the two-pass" in old
    assert "has 1.50 to 1.50 times the speed of the two-pass" in new
    for part, units in ((old, "without"), (new, "with")):
        (header,) = [line for line in part.splitlines() if line.startswith("| network")]
        (row,) = [line for line in part.splitlines() if line.startswith("| small mnist 1 ")]
        assert header.count("|") == row.count("|")
        assert f"| two-pass, bf16 autocast ({units} AVX512_BF16) |" in header
    assert "`bench/results/step.csv`" in old and "`bench/results/step_avx512.csv`" in new
    (two_processors.RESULTS / "step_avx512.csv").unlink()
    lines = two_processors.performance()
    assert sum(line.startswith("| network") for line in lines) == 1


@pytest.mark.parametrize(
    ("isa", "recorded", "text"),
    [
        ("avx2", None, "without AVX512_BF16"),
        ("avx512", None, "AVX512_BF16 unknown"),
        ("avx512", "True", "with AVX512_BF16"),
        ("avx512", "False", "without AVX512_BF16"),
        ("avx2", "True", "with AVX512_BF16"),  # kernels that were asked for
        ("portable", "unknown", "AVX512_BF16 unknown"),
    ],
)
def test_what_bf16_was_measured_on(readme, isa, recorded, text):
    row = {"isa": isa} | ({} if recorded is None else {"avx512_bf16": recorded})
    assert readme.bf16_units(row) == text


def test_the_chart_of_the_step_shows_each_processor_with_every_value(two_processors):
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure(layout="constrained")
    two_processors.draw_step(figure)
    figure.draw_without_rendering()
    headings = [subfigure.get_suptitle() for subfigure in figure.subfigs]
    assert headings == [
        "a made-up avx2, avx2 kernels, without AVX512_BF16",
        "a made-up avx512, avx512 kernels, with AVX512_BF16",
    ]
    names = ["cf.fuse", 'precision="fast"', "cf.bounds", "two-pass eager", "four products"]
    names += ["torch.compile", "auto_LiRPA", "two-pass, bf16 autocast"]
    for axes, (fused, bf16) in zip(figure.axes, (("1.70", "0.05"), ("2.00", "1.50")), strict=True):
        assert [label.get_text() for label in axes.get_yticklabels()] == names
        texts = [text.get_text() for text in axes.texts]
        assert [texts[0], texts[3], texts[6], texts[7]] == [fused, "1.00", "not timed", bf16]
        boxes = [text.get_window_extent() for text in axes.texts]
        bars = [bar.get_window_extent() for bar in axes.patches]
        assert not any(text.overlaps(bar) for text in boxes for bar in bars)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert max(box.x1 for box in boxes) <= axes.get_window_extent().x1


def test_charts_have_the_colours_of_the_methods(two_processors):
    colors = pytest.importorskip("matplotlib.colors")
    figure_module = pytest.importorskip("matplotlib.figure")
    step_figure, precisions = figure_module.Figure(), figure_module.Figure()
    two_processors.draw_step(step_figure)
    two_processors.draw_precisions(precisions)
    bars = [colors.to_hex(bar.get_facecolor()) for bar in step_figure.axes[0].patches]
    lines = [line.get_color() for line in precisions.axes[0].lines]
    assert bars[:2] == lines  # float32 and fast
    assert lines[0] == plotting.METHOD_COLOURS["cibp"].lower()
    assert set(bars[3:]) == {plotting.GREY.lower()}


def test_features_of_the_processor(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: a\nflags\t\t: fpu avx512_bf16x avx2\n")
    assert common.has_cpu_flag("avx2", cpuinfo) is True
    assert common.has_cpu_flag("avx512_bf16", cpuinfo) is False
    cpuinfo.write_text("model name\t: a\n")
    assert common.has_cpu_flag("avx2", cpuinfo) == "unknown"
    assert common.has_cpu_flag("avx2", tmp_path / "none") == "unknown"


def test_the_section_of_the_channel_counts(readme):
    lines = readme.channels()
    header, _, *rows = (line for line in lines if line.startswith("|"))
    assert header == "| channels | 1 | 5 |" and len(rows) == 3
    with (readme.RESULTS / "channels.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["optimizer"] == "none"]
    last = [float(row["ms_per_gflop"]) for row in table if row["dataset"] == "5x16x16"]
    fused, _, *naive = last
    for row, value in zip((rows[0], rows[2]), (fused, min(naive)), strict=True):
        assert row.endswith(f"| {readme.three_digits(value)} |")


def test_the_section_of_the_precisions(readme):
    lines = readme.precisions()
    assert sum(line.startswith("| `mnist-small-0.4-cibp` | ") for line in lines) == 1
    with (readme.RESULTS / "precisions.csv").open() as file:
        verdict = Comparison.of(list(csv.DictReader(file))).verdict
    assert f"`mnist-small-0.4-cibp`: {verdict}." in "".join(lines)
    assert "The loss over the first 6 steps" in lines[0] and "2 seeds each" in lines[0]


def test_peak_memory_is_shown_where_it_was_measured(readme):
    assert "peak MiB" not in "".join(readme.performance())
    path = readme.RESULTS / "step.csv"
    rows = [row | {"rss_bytes": 3 * 2**20} for row in readme.read("step")]
    common.write(path, step.FIELDS, rows)
    lines = readme.performance()
    table = [line for line in lines if line.startswith("|")]
    assert (
        'peak MiB, `"fast"`, two-pass |' in table[0]
        and len({line.count("|") for line in table}) == 1
    )
    assert all(line.endswith("| 3.0, 3.0, 3.0 |") for line in table[2:])


@pytest.mark.parametrize(
    ("name", "table"),
    [("step", "step"), ("step", "step_avx512"), ("precisions", "precisions")],
)
def test_an_old_chart_is_found(readme, monkeypatch, tmp_path, name, table):
    (tmp_path / "README.md").write_text("")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "SECTIONS", {})
    monkeypatch.setattr(sys, "argv", ["update_readme.py"])
    readme.main()
    monkeypatch.setattr(sys, "argv", ["update_readme.py", "--check"])
    readme.main()
    with (tmp_path / f"{table}.csv").open("a") as file:
        file.write("\n")
    with pytest.raises(SystemExit, match=rf"{name}\.png is out of date"):
        readme.main()


def test_a_step_table_that_lacks_a_contender_is_refused(readme):
    table = readme.RESULTS / "step.csv"
    text = table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in text if ",compile," not in line))
    with pytest.raises(SystemExit, match="lacks compile"):
        readme.performance()
