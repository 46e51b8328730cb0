"""A user's own network on the command line: --model."""

from __future__ import annotations

import json
from pathlib import Path

from digits import load_toy
from test_own import DATA, chain, tiny

import cibp_fast as cf
from cibp_fast import cli
from cibp_fast.training import datasets, runs

NETS = """
from torch import nn

def residual(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, classes))

def broken():
    raise RuntimeError("no luck")

def number():
    return 3

def once():
    return net

net = residual((1, 28, 28), 10)
count = 3
"""


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "load", load_toy)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # which is undone after the test
    Path("my_nets.py").write_text(NETS)
    Path("exiting.py").write_text("import sys\n\nsys.exit(4)\n")
    Path("statistics.py").write_text(NETS)  # Python's own comes first, which the error shows
    given = ["--model", "my_nets:residual"]
    recipe = ["--preset", "mnist5k-small-0.001-cibp", "--steps", "12", "--batch-size", "16"]
    recipe += ["--pgd-steps", "2", "--eval-batch-size", "25"]
    assert cli.main(["train", *recipe, *given, "--run-dir", "run"]) == 0
    config = runs.read_config(Path("run"))
    assert (config.dataset, config.net) == ("mnist5k", "my_nets:residual")
    assert runs.read_result(Path("run"))["sound"]
    for command in ("certify", "attack"):
        assert cli.main([command, "run", *given, "--examples", "8"]) == 0
    weights = ["certify", "run/model.safetensors", "--preset", "mnist5k-small-0.001-cibp", *given]
    capsys.readouterr()
    assert cli.main([*weights, "--examples", "8", "--output", "out"]) == 0
    assert "of 8 held-out examples" in capsys.readouterr().out
    assert json.loads(Path("out/result.json").read_text())["network"][0] == {"layer": "flatten"}

    for words, problem in (
        (["certify", "run"], "error: --model must be given, the network or its factory"),
        (["train", *recipe, *given], "error: --run-dir must be given where --model is"),
        (["certify", "run", "--model", "nowhere:net"], "'nowhere:net' has none (nowhere)"),
        (["certify", "run", "--model", "my_nets:residuals"], "did you mean 'residual'?"),
        (["certify", "run", "--model", "my_nets"], "must be package.module:factory, not 'my_nets'"),
        (
            ["certify", "run", "--model", "my_nets:broken"],
            "my_nets:broken failed: RuntimeError: no",
        ),
        (
            ["certify", "run", "--model", "my_nets:number"],
            "must return a torch.nn.Module, not a int",
        ),
        (["certify", "run", "--model", "my_nets:net"], "and my_nets:net is a Sequential"),
        (["certify", "run", "--model", "my_nets:count"], "and my_nets:count is a int"),
        (["certify", "run", "--model", "exiting:net"], "cannot be imported: SystemExit: 4"),
        (["certify", "run", "--model", "statistics:net"], "statistics.py) has no net"),
    ):
        assert cli.main(words) == 2
        captured = capsys.readouterr()
        assert problem in captured.err
        assert captured.err.count("\n") == 1


def test_the_command_line_has_not_the_data_of_python(tmp_path, capsys, monkeypatch):
    cf.train(tiny(1), tmp_path / "run", model=chain, data=DATA)
    words = ["certify", str(tmp_path / "run"), "--model", "test_own:chain"]
    assert cli.main(words) == 2
    assert "is a run of data that only Python has" in capsys.readouterr().err


def test_runs_of_several_seeds_do_not_share_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "load", load_toy)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    Path("seed_nets.py").write_text(NETS)
    recipe = ["--preset", "mnist5k-small-0.001-cibp", "--steps", "2", "--batch-size", "16"]
    train = ["train", *recipe, "--pgd-steps", "1", "--run-dir", "runs", "--seeds", "2", "--model"]
    problem = "must make a new network each time it is called, and seed_nets:once returned the same"
    assert cli.main([*train, "seed_nets:once"]) == 2
    assert problem in capsys.readouterr().err and not Path("runs").exists()
    assert cli.main([*train, "seed_nets:residual"]) == 0
    certify = ["certify", "runs", "--semantics", "none", "--examples", "8", "--model"]
    assert cli.main([*certify, "seed_nets:residual"]) == 0
    capsys.readouterr()
    assert cli.main([*certify, "seed_nets:once"]) == 2
    assert problem in capsys.readouterr().err
