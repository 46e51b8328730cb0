"""The command line: what it prints, and one clear line for bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from commands import error_line
from digits import SHORT, load_toy

from cibp_fast import attacks, certificates, cli
from cibp_fast.certificates import Certificate
from cibp_fast.training import datasets, evaluation, loop, runs
from cibp_fast.training.config import Config, preset

PRESET = "mnist5k-small-0.001-cibp"
TRAIN = ["train", "--batch-size", "16"]  # that fit the toy data


def _short_options() -> list[str]:
    """SHORT in its command-line form."""
    options = []
    for name, value in SHORT.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        options += [f"--{name.replace('_', '-')}", text]
    return options


@pytest.fixture(autouse=True)
def _toy_data(monkeypatch):
    monkeypatch.setattr(datasets, "load", load_toy)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished toy run."""
    path = tmp_path_factory.mktemp("runs") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", load_toy)
        loop.train(preset(PRESET, **SHORT), path)
    return path


def test_train_certify_attack_and_plot(tmp_path, capsys):
    run_dir = tmp_path / "run"
    options = _short_options()
    assert (
        cli.main(["train", "--preset", PRESET, "--run-dir", str(run_dir), "--seed", "5", *options])
        == 0
    )
    printed = capsys.readouterr().out
    result = runs.read_result(run_dir)
    assert runs.read_config(run_dir) == preset(PRESET, **SHORT, seed=5)
    for error in ("test_error", "pgd_error", "verified_error"):
        assert f"{100 * result[error]:.1f} %" in printed
    assert "PGD (2 steps)" in printed and str(run_dir) in printed

    assert cli.main(["certify", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    count = round(40 * result["verified_error"])
    assert f"verified error at eps 0.001: {100 * count / 40:.2f} % ({count} of 40" in printed
    assert "sound: false" in printed

    assert cli.main(["certify", str(run_dir), "--eps", "1"]) == 0
    assert "100.00 % (40 of 40" in capsys.readouterr().out

    assert (
        cli.main(["attack", str(run_dir), "--steps", "1", "--restarts", "1", "--examples", "20"])
        == 0
    )
    captured = capsys.readouterr()
    assert "PGD error (1 steps, 1 restarts)" in captured.out and not captured.err
    far = ["attack", str(run_dir), "--steps", "1", "--restarts", "1", "--eps", "0.4"]
    assert cli.main([*far, "--step-size", "none"]) == 0
    assert not capsys.readouterr().err
    assert cli.main(far) == 0
    assert "warning: 1 steps of 0.01 do not cross the box" in capsys.readouterr().err

    picture = tmp_path / "pictures" / "curves.png"
    pytest.importorskip("matplotlib")
    assert cli.main(["plot", str(run_dir), "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_of_schedules(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "schedules.svg"
    options = ["--preset", "svhn-large-8of255-cibp-normalized", "-o", str(picture)]
    assert cli.main(["plot", *options]) == 0
    assert "svhn-large-8of255-cibp-normalized" in picture.read_text()
    assert str(picture) in capsys.readouterr().out


def test_quickstart(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    real = cli.preset
    monkeypatch.setattr(cli, "preset", lambda name, **overrides: real(name, **SHORT, **overrides))
    for _ in range(2):  # a second one replaces the first
        assert cli.main(["quickstart", "--output", str(tmp_path / "quick")]) == 0
    table = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("IBP", "constr"))
    ]
    assert len(table) == 4 and len({len(line) for line in table}) == 1
    assert sorted(path.name for path in (tmp_path / "quick").iterdir()) == [
        "mnist5k-small-0.1-cibp",
        "mnist5k-small-0.1-ibp",
        "quickstart.png",
    ]


def test_info(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in (
        "python",
        torch.__version__,
        "cibp_fast",
        "processor",
        "CPU kernels",
        "on cpu",
    ):
        assert word in printed


def test_every_field_of_the_config_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", "--help"])
    assert exit.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for option in fields(Config):
        assert f"--{option.name.replace('_', '-')}" in printed
        assert option.metadata["help"] in printed
    assert "examples: cibp-fast train" in printed


@pytest.mark.parametrize("command", ["info", "quickstart", "train", "certify", "attack", "plot"])
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    assert f"cibp-fast {command}" in capsys.readouterr().out


def test_options_replace_the_preset(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "train", lambda config, *args, **kwargs: seen.append(config) or {})
    monkeypatch.setattr(cli, "_table", lambda results: "")
    options = ["--clip", "none", "--no-elide", "--lr-decay-at", "none", "--method", "ibp"]
    cli.main(["train", "--preset", PRESET, *options, "--width-weight", "0", "--eps", "0.25"])
    expected = {"clip": None, "elide": False, "lr_decay_at": (), "eps": 0.25}
    assert seen == [preset("mnist5k-small-0.001-ibp", **expected)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--preset", "mnist5k-smal-0.1-cibp"], "did you mean 'mnist5k-small-0.1-cibp'"),
        (["train", "--eps", "-1"], "eps must be 0 or more, not -1.0"),
        (["train", "--eps", "nan"], "eps must be a finite number, not nan"),
        (["train", "--steps", "many"], "steps must be a whole number, not 'many'"),
        (["train", "--eps-ramp", "10,5"], "eps_ramp cannot be 10,5"),
        (["train", "--eps-ramp", "0,4000"], "eps_ramp must be within steps 0 to 3000, not 0,4000"),
        (["train", "--preset", "mnist5k-small-0.1-ibp-normalized"], "eps_space must be pixel for"),
        (["train", "--preset", "mnist5k-small-0.1-ibp-gowal"], "mnist5k has one recipe"),
        (["train", "--augmentation", "flip"], "augmentation must be none or crop-flip, not 'flip'"),
        (["train", "--device", "tpu"], "device must be cpu or cuda, not 'tpu'"),
        (["train", "--seeds", "0"], "seeds must be 1 or more, not 0"),
        (["train", "--clip", "1,0"], "clip must be low,high with low < high"),
        (["train", "--clip", "0,nan"], "clip must be a finite number, not nan"),
        (
            [*TRAIN, "--clip", "0.2,0.5"],
            "clip must contain the pixels' 0 to 1, or be none, not (0.2, 0.5)",
        ),
        (["train", "--batch-size", "81"], "batch_size must be at most the 80 training examples"),
        (["train", "--seed", str(10**25)], "seed must be 9223372036854775807 or less, not 1000"),
        (["quickstart", "--seed", "-1"], "seed must be 0 or more, not -1"),
        ([*TRAIN, "--run-dir", "x" * 300], f"cannot make the folder {'x' * 300}: File name too"),
        ([*TRAIN, "--run-dir", "a\0b"], "cannot make the folder a\0b: embedded null byte"),
        ([*TRAIN, "--run-dir", "/proc/cibp_fast_run"], "make the folder /proc/cibp_fast_run: "),
        (["certify", "x" * 300], f"cannot read {'x' * 300}/config.json: File name too long"),
        (["certify", "a\0b"], "cannot read a\0b/config.json: embedded null byte"),
        (["info", "--threads", str(10**12)], "threads must be from 1 to 1024, not 1000000000000"),
        (["train", "--net", "tiny"], "net must be small, medium or large, not 'tiny'"),
        (["train", "--threads", "0"], "threads must be from 1 to 1024, not 0"),
        (["train", "--stpes", "5"], "unrecognized arguments: --stpes 5 (see cibp-fast --help)"),
        (["certify", "nowhere"], "nowhere is not a run folder: config.json is missing"),
        (["attack", "nowhere"], "nowhere is not a run folder"),
        (["plot", "nowhere", "-o", "a.png"], "nowhere is not a run folder"),
        (["plot", "-o", "a.png"], "plot takes either run folders or --preset NAME"),
        (["plot", "nowhere", "--preset", PRESET, "-o", "a.png"], "either run folders or --preset"),
        (["plot", "--preset", "x", "-o", "a.png"], "unknown preset 'x'"),
        (["plot", "nowhere"], "required: -o/--output (see cibp-fast plot --help)"),
        ([], "required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in error_line(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []  # nothing written, half or whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["certify", "--eps", "-0.5"], "eps must be 0 or more, not -0.5"),
        (["certify", "--device", "tpu"], "device must be cpu or cuda, not 'tpu'"),
        (["attack", "--device", "tpu"], "device must be cpu or cuda, not 'tpu'"),
        (["certify", "--eval-batch-size", "0"], "eval_batch_size must be 1 or more, not 0"),
        (["certify", "--eps", "inf"], "eps must be a finite number, not inf"),
        (["certify", "--eps", "nan"], "eps must be a finite number, not nan"),
        (["attack", "--eps", "inf"], "eps must be a finite number, not inf"),
        (["attack", "--seed", str(10**20)], "seed must be 9223372036854775807 or less, not 1000"),
        (["attack", "--step-size", "nan"], "pgd_step_size must be a finite number or none"),
        (
            ["certify", "--examples", "0"],
            "examples must be from 1 to the 40 of the test set, not 0",
        ),
        (["certify", "--examples", "41"], "examples must be from 1 to the 40"),
        (["attack", "--steps", "-1"], "pgd_steps must be 0 or more, not -1"),
        (["attack", "--restarts", "-1"], "restarts must be 0 or more, not -1"),
        (["attack", "--steps", "x"], "argument --steps: invalid int value: 'x'"),
    ],
)
def test_bad_input_about_a_run(capsys, run_dir, arguments, words):
    assert words in error_line(capsys, arguments[0], str(run_dir), *arguments[1:])


def test_unwritable_folder(capsys, tmp_path, run_dir):
    (tmp_path / "file").write_text("in the way")
    below = str(tmp_path / "file" / "run")
    words = error_line(capsys, "train", *_short_options(), "--run-dir", below)
    assert f"cannot make the folder {below}: Not a directory" in words
    pytest.importorskip("matplotlib")
    words = error_line(capsys, "plot", str(run_dir), "-o", f"{below}/curves.png")
    assert f"cannot make the folder {below}: Not a directory" in words
    picture = str(tmp_path / ("x" * 300 + ".png"))
    assert f"cannot write {picture}: File name too" in error_line(
        capsys, "plot", str(run_dir), "-o", picture
    )


@pytest.fixture
def damaged(run_dir, tmp_path):
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(run_dir, tmp_path / "damaged"))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.jsonl", '{"epoch": 1}', "metrics.jsonl, line 1: 'step' is missing"),
        ("metrics.jsonl", "5", "metrics.jsonl, line 1: must be a JSON object, not int"),
        ("result.json", "{}", "result.json: 'test_error' is missing"),
        ("result.json", "[]", "result.json: must be a JSON object, not list"),
        ("config.json", "[]", "config.json: a config must be a JSON object, not list"),
    ],
)
def test_plot_of_a_damaged_run(capsys, damaged, file, content, words):
    pytest.importorskip("matplotlib")
    (damaged / file).write_text(content)
    assert words in error_line(capsys, "plot", str(damaged), "-o", str(damaged / "curves.png"))
    assert not (damaged / "curves.png").exists()


@pytest.mark.parametrize("command", ["certify", "attack"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_folder_in_a_files_place(capsys, damaged, command, file):
    (damaged / file).unlink()
    (damaged / file).mkdir()
    words = error_line(capsys, command, str(damaged))
    assert f"cannot read {damaged / file}: Is a directory" in words


@pytest.mark.parametrize("command", ["certify", "attack"])
def test_networks_and_boxes_that_do_not_fit(capsys, damaged, command):
    config = runs.read_config(damaged)
    (damaged / "config.json").write_text(replace(config, clip=(0.2, 0.5)).to_json())
    assert "outside clip=(0.2, 0.5)" in error_line(capsys, command, str(damaged))
    (damaged / "config.json").write_text(replace(config, net="medium").to_json())
    assert "does not hold this run's network" in error_line(capsys, command, str(damaged))
    (damaged / "config.json").write_text(config.to_json())
    runs.write_model(damaged, runs.build_model(config).double())
    assert "must be torch.float32, not torch.float64" in error_line(capsys, command, str(damaged))


def test_a_network_with_nan_is_never_verified(capsys, damaged):
    model = runs.read_model(damaged)
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    runs.write_model(damaged, model)
    assert cli.main(["certify", str(damaged)]) == 0
    assert cli.main(["attack", str(damaged), "--steps", "1", "--restarts", "1"]) == 0
    assert capsys.readouterr().out.count("100.00 % (40 of 40") == 2


def test_bounds_that_the_attack_refutes_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        evaluation,
        "certify",
        lambda model, x, y, *args, **kwargs: Certificate(y >= 0, *[y] * 3, True),
    )
    options = [*_short_options(), "--lr", "0", "--run-dir", str(tmp_path)]
    assert "that the attack breaks" in error_line(capsys, "train", *options)
    assert runs.read_result(tmp_path)["contradictions"] > 0


def test_a_gpu_without_memory_is_one_line(capsys, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")

    monkeypatch.setattr(loop._Loss, "forward", full)
    options = [*_short_options(), "--batch-size", "20", "--run-dir", str(tmp_path)]
    assert (
        "a step of training with batch_size=20: CUDA out of memory; take a smaller batch_size"
        in error_line(capsys, "train", *options)
    )


@pytest.mark.parametrize(
    ("where", "command", "words"),
    [
        ((certificates, "_bounded"), "train", "evaluation with eval_batch_size=25"),
        ((attacks, "_step"), "train", "evaluation with eval_batch_size=25"),
        ((certificates, "_bounded"), "certify", "certification with eval_batch_size=7"),
        ((attacks, "_step"), "attack", "PGD with eval_batch_size=7"),
    ],
)
def test_a_gpu_without_memory_for_an_evaluation_is_one_line(
    capsys, run_dir, tmp_path, monkeypatch, where, command, words
):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")

    monkeypatch.setattr(*where, full)
    options = [str(run_dir), "--eval-batch-size", "7"]
    if command == "train":
        options = [*_short_options(), "--run-dir", str(tmp_path)]
    line = f"error: {words}: CUDA out of memory; take a smaller eval_batch_size"
    assert error_line(capsys, command, *options).endswith(line)


def test_a_run_of_another_config_is_not_replaced_unless_asked(capsys, run_dir):
    before = (run_dir / "result.json").read_bytes()
    options = [*_short_options(), "--preset", PRESET, "--run-dir", str(run_dir)]
    words = error_line(capsys, "train", *options, "--lr", "0.5")
    assert "holds a run of another config (lr 0.001 there, 0.5 now)" in words
    assert (run_dir / "result.json").read_bytes() == before


def test_a_finished_run_is_shown_and_not_trained_again(capsys, run_dir):
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    options = [*_short_options(), "--preset", PRESET, "--run-dir", str(run_dir)]
    assert cli.main(["train", *options]) == 0
    printed = capsys.readouterr().out
    assert "has finished already" in printed and "epoch" not in printed
    assert f"{100 * runs.read_result(run_dir)['verified_error']:.1f} %" in printed
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [({"pgd_steps": None}, "'pgd_steps' must be a whole number"), ({"seconds": "x"}, "'seconds'")],
)
def test_a_finished_run_with_a_damaged_result(capsys, damaged, change, words):
    result = json.loads((damaged / "result.json").read_text())
    (damaged / "result.json").write_text(json.dumps(result | change))
    options = [*_short_options(), "--preset", PRESET, "--run-dir", str(damaged)]
    assert words in error_line(capsys, "train", *options)


def test_a_finished_run_without_its_network(capsys, damaged):
    (damaged / "model.safetensors").unlink()
    options = [*_short_options(), "--preset", PRESET, "--run-dir", str(damaged)]
    assert "model.safetensors is missing" in error_line(capsys, "train", *options)


@pytest.mark.parametrize(
    ("overwrite", "words"),
    [
        ([], "the same command goes on"),
        (["--overwrite"], "the same command without overwrite goes on"),
    ],
)
def test_what_goes_on_after_ctrl_c(capsys, tmp_path, monkeypatch, overwrite, words):
    def interrupt(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("cibp_fast.training.progress.Progress.advance", interrupt)
    options = [*_short_options(), "--preset", PRESET, "--run-dir", str(tmp_path)]
    assert cli.main(["train", *options, *overwrite]) == 130
    assert f"stopped after step 1 and saved in {tmp_path}: {words}\n" in capsys.readouterr().err


def test_ctrl_c_in_the_final_evaluation(capsys, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "pgd", interrupt)
        options = [*_short_options(), "--preset", PRESET, "--run-dir", str(tmp_path)]
        assert cli.main(["train", *options]) == 130
        assert (
            f"final evaluation, with the trained network in {tmp_path}" in capsys.readouterr().err
        )
    assert cli.main(["train", *options]) == 0
    assert "Going on after step 12." in capsys.readouterr().out


def test_a_warning_is_one_line(capsys, monkeypatch, run_dir):
    def warn(*args, **kwargs):
        warnings.warn("the file is\n not the official one", stacklevel=2)
        return load_toy(*args, **kwargs)

    monkeypatch.setattr(datasets, "load", warn)
    assert cli.main(["certify", str(run_dir)]) == 0
    assert capsys.readouterr().err == "cibp-fast: warning: the file is not the official one\n"


def test_seeds_that_do_not_fit_are_refused_before_training(capsys, tmp_path):
    options = ["--seed", str(2**63 - 1), "--seeds", "2", "--run-dir", str(tmp_path / "runs")]
    assert "seed must be 9223372036854775807 or less" in error_line(capsys, "train", *options)
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_says_what_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*_short_options(), "--preset", PRESET, "--eps", "0.25", "--seeds", "2"]
    assert cli.main(["train", *options]) == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"mnist5k-small-0.25-cibp-seed{seed}" for seed in (0, 1)]


def test_seeds(capsys, tmp_path):
    options = [*_short_options(), "--preset", PRESET, "--run-dir", str(tmp_path / "runs")]
    assert cli.main(["train", *options, "--seeds", "2", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    results = [runs.read_result(tmp_path / "runs" / f"seed{seed}") for seed in (3, 4)]
    assert [result["seed"] for result in results] == [3, 4]
    mean = 50 * sum(result["verified_error"] for result in results)
    spread = 100 * abs(results[0]["verified_error"] - results[1]["verified_error"]) / 2**0.5
    assert "of 2 seeds: test " in printed
    assert f"verified {mean:.2f} +- {spread:.2f} %" in printed


def test_overwrite(tmp_path):
    options = ["train", "--preset", PRESET, "--run-dir", str(tmp_path), *_short_options()]
    assert cli.main([*options, "--seed", "1"]) == 0
    assert cli.main([*options, "--seed", "2", "--overwrite"]) == 0
    assert runs.read_config(tmp_path).seed == runs.read_result(tmp_path)["seed"] == 2


def test_missing_data_package(capsys, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'cibp-fast[demo]'" in error_line(
        capsys, "train", "--run-dir", str(tmp_path / "run")
    )
    assert not (tmp_path / "run").exists()


def test_missing_data_says_where_to_put_it(capsys, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    options = ["train", "--preset", "mnist-small-0.4-cibp"]
    assert "--data-root" in error_line(capsys, *options, "--data-root", "elsewhere")
    monkeypatch.setenv("CIBP_FAST_DATA", "somewhere")
    assert "somewhere" in error_line(capsys, *options)
    assert list(tmp_path.iterdir()) == []


def test_interrupt(capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupt)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "\ncibp-fast: interrupted\n"


def test_python_dash_m_has_no_traceback(tmp_path):
    command = [sys.executable, "-m", "cibp_fast", "certify", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("cibp-fast: error: ") and done.stderr.count("\n") == 1
