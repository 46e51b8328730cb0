"""The command line: what it prints, and one clear line for bad input."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import SHORT, load_toy
from digits import TOY_PRESET as PRESET
from processes import python

from cibp_fast import __version__, attacks, certificates, cli, commands, options, parsing
from cibp_fast.certificates import Certificate
from cibp_fast.training import datasets, evaluation, loop, runs
from cibp_fast.training.config import Config, as_text, preset
from cibp_fast.training.step import KernelStep

SHORT_TRAIN = ["train", "--preset", PRESET]  # and SHORT in its command-line form
for name, value in SHORT.items():
    SHORT_TRAIN += [f"--{name.replace('_', '-')}", as_text(value)]
PGD = ["--steps", "1", "--restarts", "1"]


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Returns the one line on stderr of a command that fails with exit code 2."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2
    (line,) = captured.err.splitlines()
    assert line.startswith("cibp-fast: error: ")
    return line


@pytest.fixture(autouse=True)
def _toy_data(monkeypatch):
    monkeypatch.setattr(datasets, "load", load_toy)


@pytest.fixture
def damaged(toy_run, tmp_path):
    """Copies the finished run, to be changed."""
    return Path(shutil.copytree(toy_run, tmp_path / "damaged"))


def test_train_certify_attack_and_plot(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert cli.main([*SHORT_TRAIN, "--run-dir", run, "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    result = runs.read_result(tmp_path / "run")
    assert runs.read_config(tmp_path / "run") == preset(PRESET, **SHORT, seed=5)
    for error in ("test_error", "pgd_error", "verified_error"):
        assert f"{100 * result[error]:.1f} %" in printed
    assert "PGD (2 steps)" in printed and run in printed

    count = round(40 * result["verified_error"])
    error = f"verified error at eps 0.001: {100 * count / 40:.2f} % ({count} of 40"
    for words, out, warning in (
        (["certify", run], error, ""),
        (["certify", run], "sound: real (proven", ""),
        (["certify", run, "--semantics", "float32"], "sound: float32 (proven", ""),
        (["certify", run, "--semantics", "none"], "sound: false", ""),
        (["certify", run, "--eps", "1"], "100.00 % (40 of 40", ""),
        (["attack", run, *PGD, "--examples", "20"], "PGD error (1 step, 1 restart)", ""),
        (["attack", run, *PGD, "--eps", "0.4", "--step-size", "none"], "", ""),
        (["attack", run, *PGD, "--eps", "0.4"], "", "warning: 1 step of 0.01 cannot cross"),
        (["attack", run, *PGD, "--eps", "0.4"], "", "more, or --step-size none for 2.5 * eps"),
    ):
        assert cli.main(words) == 0
        captured = capsys.readouterr()
        assert out in captured.out and warning in captured.err
        assert captured.err.count("\n") == bool(warning)

    picture = tmp_path / "curves.png"
    pytest.importorskip("matplotlib")
    assert cli.main(["plot", run, "-o", str(picture)]) == 0
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


@pytest.mark.parametrize(
    ("stopped_in", "earlier"),  # the seed of one that is there, finished
    [("ibp", None), ("ibp", 1), ("cibp", None), ("cibp", 0)],
)
def test_a_quickstart_that_was_stopped_goes_on(tmp_path, capsys, monkeypatch, stopped_in, earlier):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(commands, "preset", lambda name, **more: preset(name, **SHORT, **more))
    quickstart = ["quickstart", "--output", str(tmp_path)]
    if earlier is not None:
        assert cli.main([*quickstart, "--seed", str(earlier)]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 1 if stopped_in == "ibp" else SHORT["steps"] + 1)
        assert cli.main(quickstart) == 130
    run_dir = tmp_path / f"mnist5k-small-0.1-{stopped_in}"
    message = f"stopped after step 1 and saved in {run_dir}: the same command goes on\n"
    assert message in capsys.readouterr().err
    assert cli.main(quickstart) == 0
    printed = capsys.readouterr().out
    assert "Going on after step 1." in printed
    assert printed.count("epoch    1/3") == (2 if stopped_in == "ibp" else 1)
    assert {runs.read_config(folder.parent).seed for folder in tmp_path.rglob("result.json")} == {0}


def _interrupt_after(monkeypatch, steps):
    taken = []

    def interrupt(self):
        taken.append(self)
        if len(taken) >= steps:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.Progress, "update", interrupt)


def _help(capsys, *words):
    """Returns the text of a help, without its frames and line breaks."""
    with pytest.raises(SystemExit) as exit:
        cli.main([*words, "--help"])
    assert exit.value.code == 0
    return " ".join(capsys.readouterr().out.translate(str.maketrans("│╭╮╰╯─", " " * 6)).split())


def test_every_field_of_the_config_is_an_option_with_help(capsys):
    printed = _help(capsys, "train")
    for name, value in preset(options.DEFAULT_PRESET):
        about = " ".join(Config.model_fields[name].description.split())
        assert f"--{name.replace('_', '-')}" in printed
        assert f"{about} [{as_text(value)}]" in printed
    assert "examples: cibp-fast train" in printed
    grammar = "dataset-net-eps-method[-gowal][-fast-ramp][-same][-normalized]"
    assert grammar in printed.replace(" ", "")  # which lines are broken in
    assert f"(default: {options.DEFAULT_PRESET})" in printed


def _imported(*words: object, before: str = "") -> str:
    """Returns what the command prints, and then what it has imported."""
    return python(f"""{before}
import sys
from cibp_fast.cli import main
try:
    print(main({[*map(str, words)]}))
finally:
    print(sorted({{"torch", "torch._dynamo", "numpy", "matplotlib"}} & set(sys.modules)))
""")


def test_help_and_version_answer_at_once_without_torch():
    for word, answer in (("--help", "quickstart"), ("--version", f"cibp-fast {__version__}\n")):
        begin = time.perf_counter()
        printed = _imported(word)
        # 0.3 s where nothing else runs; importing torch alone takes 2 there
        assert time.perf_counter() - begin < 5
        assert answer in printed and printed.endswith("[]\n")


def test_a_plot_needs_no_torch(toy_run, tmp_path):
    pytest.importorskip("matplotlib")
    printed = _imported("plot", toy_run, "-o", tmp_path / "curves.png")
    assert printed.endswith("0\n['matplotlib', 'numpy']\n")


def test_training_does_not_import_the_compiler(tmp_path):
    """Keeps the compiler out: its import takes longer than torch itself."""
    toy = "import digits; from cibp_fast.training import datasets; datasets.load = digits.load_toy"
    printed = _imported(*SHORT_TRAIN, "--run-dir", tmp_path, before=toy)
    assert printed.endswith("0\n['numpy', 'torch']\n")


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_of_every_command(capsys, command):
    about, *paragraphs = (commands.COMMANDS[command].__doc__ or "").split("\n\n")
    shown = _help(capsys, command)
    assert f"usage: cibp-fast {command} " in shown and about in shown
    assert f"{command} {about}" in _help(capsys)
    example = re.search(rf"examples?: cibp-fast {command}(?= )", shown)
    assert example and not {"VALUE", "STR", "(default: False)"} & set(shown.split())
    if len(paragraphs) > 2:  # what comes before examples and attributes
        assert " ".join(paragraphs[0].split()) in shown and paragraphs[0] not in _help(capsys)


@pytest.fixture
def trained(monkeypatch):
    """Collects what `loop.train` is called with, in place of training."""
    calls = []

    def train(config, run_dir, **options):
        calls.append((config, run_dir, options))
        return {}

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(commands, "_table", lambda results: "")
    return calls


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_examples_of_the_help_are_right(monkeypatch, tmp_path, trained, command):
    """Runs those of `train`; of the others, which need runs, only the words are read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "own_factory", lambda text: None)
    found = re.findall(r"^ +cibp-fast (.*)$", commands.COMMANDS[command].__doc__, re.MULTILINE)
    assert found
    for example in found:
        name, *words = example.split()
        assert name == command
        read = parsing.tyro.cli(commands.COMMANDS[name], args=words)
        if command == "train":
            read.run()
    assert len(trained) == (len(found) if command == "train" else 0)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_help_fits_the_terminal(monkeypatch, columns, terminal, encoding):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    for words in ([], *([command] for command in commands.COMMANDS)):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(stdout, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        printed = stdout.buffer.getvalue().decode(encoding)
        assert ("\x1b[" in printed) == terminal and ("│" in printed) == (encoding == "utf-8")
        lines = re.sub(r"\x1b\[[\d;]*m", "", printed).splitlines()
        assert len(lines) > 5 and max(map(len, lines)) <= columns, words
        assert not any(re.fullmatch(r"│\s*│", line) for line in lines), words  # a hint alone


def test_without_a_command_it_shows_the_help(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        cli.main([])
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == shown


@pytest.mark.parametrize("words", ["info", "train --help"])
def test_a_closed_pipe_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "cibp_fast", *words.split()]
    done = subprocess.run(command, cwd="/", stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


def test_the_spelling_that_long_runs_use(trained):
    """Checks the options with which scripts start runs of weeks: they stay."""
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
        "model": None,
        "data_root": Path("elsewhere"),
        "verify_data": True,
        "device": "cpu",
        "backend": "auto",
        "overwrite": False,
    }
    assert torch.get_num_threads() == 1


def test_options_replace_the_preset(trained):
    words = "--clip none --no-elide --lr-decay-at none --method ibp --width-weight 0 --epochs 3 "
    words += "--eps 8/255 --pgd-step-size 1of255"
    assert cli.main(["train", "--preset", PRESET, *words.split()]) == 0
    changes = {"clip": None, "elide": False, "lr_decay_at": (), "pgd_step_size": 1 / 255}
    ((config, run_dir, _),) = trained
    assert config == preset("mnist5k-small-8of255-ibp", steps=120, **changes)
    assert run_dir == Path("runs") / config.folder


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("train --preset mnist5k-smal-0.1-cibp", "did you mean 'mnist5k-small-0.1-cibp'"),
        ("train --eps 8/0", "--eps must be a number from 0 to 1e18, as 0.1 or 8/255, not '8/0'"),
        ("train --eps-train-ratio -1", "--eps-train-ratio must be a number from 0 to 1e18, not -1"),
        ("train --clip 0", "--clip must be low,high with low < high, or none, not 0"),
        ("train --lr-decay-at x", "--lr-decay-at must be steps a,b,..., or none, not x"),
        (
            "train --method ibp",
            "--width-weight must be 0 for method ibp, not 1.0 (of the preset): set",
        ),
        ("train --eps", "--eps needs a value; see cibp-fast train --help"),
        (
            "train --net tiny",
            "--net must be 'small', 'medium', 'large', 'cnn7' or 'resnet', not 'tiny'",
        ),
        ("train --seeds 0", "--seeds must be from 1 to 1000, not 0"),
        (f"train --seeds {10**13}", "--seeds must be from 1 to 1000, not 10000000000000"),
        (
            f"train --seed {2**63 - 1} --seeds 2",
            "--seed must be a whole number from 0 to 2**63 - 1",
        ),
        ("train --threads 0", "--threads must be from 1 to 1024, not 0"),
        ("info --threads 1025", "--threads must be from 1 to 1024, not 1025"),
        ("train --threads two", "--threads must be a whole number, not 'two'; see cibp"),
        (
            "train --backend cpp",
            "--backend must be auto, torch, cpu, triton or cuda, not 'cpp'; see",
        ),
        ("train --batch-size 16 --run-dir /proc/cibp_fast", "make the folder /proc/cibp_fast: "),
        (
            "train --batch-size 16 --backend cuda",
            "--backend cuda cannot run: the CUDA kernels are for NVIDIA's",
        ),
        ("train --batch-size 99", "--batch-size must be at most the 80 training examples, not 99"),
        (
            "train --stpes 5",
            "train does not take '--stpes': did you mean '--steps'?; see cibp-fast tr",
        ),
        ("train foo", "train does not take 'foo'; see cibp-fast train --help"),
        ("train --elide maybe", "train does not take 'maybe'; see cibp-fast train --help"),
        ("train --batch-size 16 --run-dir A_FILE", "A_FILE: it is a file, not a folder"),
        ("quickstart --seed -1", "--seed must be a whole number from 0 to 2**63 - 1, not -1"),
        ("quickstart --steps 3", "quickstart does not take '--steps'"),
        ("quickstart --output A_FILE", "A_FILE: it is a file, not a folder"),
        ("info --device cuda", "info does not take '--device'; see cibp-fast info --help"),
        ("certify A_FILE", "A_FILE is not a run folder: it is a file"),
        ("certify steps=4", "error: steps=4 is not a run folder: there is no such"),
        ("certify RUN steps=4", "certify does not take 'steps=4'; see cibp-fast certify --help"),
        ("certify RUN --seed 3", "certify does not take '--seed'; see cibp-fast certify --help"),
        ("certify --data-root=", "a word is empty: cibp-fast certify --data-root="),
        ("certify nowhere", "nowhere is not a run folder: there is no such folder"),
        ("certify .", "error: . is not a run folder: config.json is missing"),
        (f"certify {'x' * 300}", f"cannot read {'x' * 300}/config.json: File name too long"),
        ("certify a\0b", "a\0b/config.json is damaged (embedded null byte)"),
        ("certify", "certify needs RUN_DIR: folder that `cibp-fast train` wrote, of"),
        ("certify RUN --examples 0", "--examples must be from 1 to the 40 of the test set, not 0"),
        (
            "certify RUN --examples 41",
            "--examples must be from 1 to the 40 of the test set, not 41",
        ),
        ("attack RUN --seed 1.5", "--seed must be a whole number, not '1.5'; see cibp-fast attack"),
        ("attack RUN --device x", "--device must be cpu or cuda, not 'x'"),
        ("attack RUN --steps -1", "--steps must be a whole number from 0 to 2**63 - 1, not -1"),
        ("attack RUN --step sgd", "--step must be sign or adam, not 'sgd'; see cibp-fast attack"),
        ("attack RUN --loss both", "--loss must be auto, cross_entropy or margin, not 'both'"),
        ("attack RUN --step-size 0", "--step-size must be a number above 0, or none, not 0"),
        ("plot RUN -o missing/a.png", "missing is not a folder: make it, or plot elsewhere"),
        ("plot nowhere -o a.png", "nowhere is not a run folder"),
        ("plot -o a.png", "plot takes either run folders or --preset NAME"),
        ("plot nowhere --preset x -o a.png", "plot takes either run folders or --preset NAME"),
        ("plot --preset x -o a.png", "unknown preset 'x'"),
        ("plot nowhere", "plot needs --output FILE: file of the picture, .png, .pdf or .svg; see"),
        ("audit nowhere", "nowhere is not a folder of certificates: result.json is missing"),
        ("audit RUN --sample -1", "--sample must be 0 or more, not -1"),
        (
            "reproduce fig2",
            "TARGET must be table2, fig3, fig4, fig5, fig6, fig7 or all, not 'fig2'",
        ),
        (
            "--verbose",
            "unknown option '--verbose'. The commands are info, quickstart, train, reproduce, "
            "certify, audit, attack, export, plot; see",
        ),
        ("trian", "unknown command 'trian': did you mean 'train'? The commands are info, quick"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path, toy_run, words, problem):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    stands = {"RUN": str(toy_run), "A_FILE": str(toy_run / "config.json")}
    arguments = [stands.get(word, word) for word in words.split(" ") if word]
    line = error_line(capsys, *arguments)
    assert problem.replace("A_FILE", stands["A_FILE"]) in line
    assert len(line) < 370 or "unknown preset" in line  # of which it says all
    assert list(tmp_path.iterdir()) == []  # nothing written, half or whole


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["certify", ""], "a word is empty: cibp-fast certify ''"),
        (["quickstart", "--output", ""], "a word is empty: cibp-fast quickstart --output ''"),
        ([""], "unknown command ''"),
    ],
)
def test_an_empty_word_is_not_the_current_folder(capsys, monkeypatch, toy_run, words, named):
    monkeypatch.chdir(toy_run)
    assert named in error_line(capsys, *words)


def test_a_run_is_not_written_among_other_files(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in ([], ["--overwrite"]):
        line = error_line(capsys, *SHORT_TRAIN, "--run-dir", str(tmp_path), *overwrite)
        assert f"{tmp_path} holds notes.txt but no run" in line
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("terminal", [True, False])
def test_bad_options_are_one_line_everywhere(capsys, monkeypatch, encoding, terminal):
    """Tries encodings and colours of the terminal, after which tyro draws its boxes."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", stdout)
    for words, problem in (
        (["train", "--stpes", "5"], "train does not take '--stpes': did you mean '--steps'?; see"),
        (["train", "--threads", "x"], "--threads must be a whole number, not 'x'; see"),
        (
            ["train", "--backend", "x"],
            "--backend must be auto, torch, cpu, triton or cuda, not 'x'",
        ),
        (["plot", "a"], "plot needs --output FILE: file of the picture, .png, .pdf or .svg"),
    ):
        line = error_line(capsys, *words)
        assert line.startswith(f"cibp-fast: error: {problem}")
        assert line.endswith(f"; see cibp-fast {words[0]} --help") and line.isprintable()
        assert not {"│", "─", "|", "+"} & set(line) and "---" not in line


def _stop(run_dir):
    """Makes it a stopped run that has lost its checkpoint."""
    for name in ("result.json", "model.safetensors"):
        (run_dir / name).unlink()


def _set_config(run_dir, **changes):
    config = runs.read_config(run_dir).replace(**changes)
    (run_dir / "config.json").write_text(config.to_json())


@pytest.mark.parametrize(
    ("damage", "command", "words"),
    [
        (
            lambda run: (run / "metrics.jsonl").write_text("{"),
            "plot",
            "metrics.jsonl, line 1, is d",
        ),
        (
            lambda run: (run / "metrics.jsonl").unlink(),
            "train",
            "a finished run: metrics.jsonl is missing",
        ),
        (
            lambda run: (run / "config.json").write_text("{"),
            "attack",
            "config.json is damaged (EOF",
        ),
        (lambda run: _set_config(run, clip=(0.2, 0.5)), "certify", "outside clip=(0.2, 0.5)"),
        (lambda run: _set_config(run, clip=(0.2, 0.5)), "attack", "outside clip=(0.2, 0.5)"),
        (lambda run: _set_config(run, net="medium"), "attack", "does not hold this run's network"),
        (lambda run: (run / "result.json").write_text("{}"), "train", "'test_error' is missing"),
        (lambda run: (run / "model.safetensors").unlink(), "train", "safetensors is missing"),
        (_stop, "attack", "not finished: model.safetensors is missing; where it was stopped, the"),
        (_stop, "train", "checkpoint.safetensors of a stopped run is missing: start anew"),
        (lambda run: _set_config(run, lr=0.5), "train", "another config (lr 0.5 there, 0.001 now)"),
    ],
)
def test_a_damaged_run_is_one_line_and_kept(capsys, damaged, damage, command, words):
    pytest.importorskip("matplotlib")
    damage(damaged)
    before = {path: path.read_bytes() for path in damaged.iterdir()}
    options = {
        "train": [*SHORT_TRAIN, "--run-dir", str(damaged)],
        "plot": ["plot", str(damaged), "-o", str(damaged / "curves.png")],
    }
    assert words in error_line(capsys, *options.get(command, [command, str(damaged)]))
    assert {path: path.read_bytes() for path in damaged.iterdir()} == before


def test_the_steps_and_the_loss_of_an_attack_are_those_asked_for(toy_run, monkeypatch, capsys):
    seen = []

    def watched(*args, **options):
        seen.append((options["step"], options["loss"]))
        return attacks.pgd(*args, **options)

    monkeypatch.setattr(evaluation, "pgd", watched)
    words = ["attack", str(toy_run), *PGD, "--eps", "0.4", "--step-size", "none"]
    assert cli.main(words) == 0 and set(seen) == {("sign", "auto")}
    for step in attacks.STEPS:
        for loss in attacks.LOSSES:
            seen.clear()
            assert cli.main([*words, "--step", step, "--loss", loss]) == 0
            assert set(seen) == {(step, loss)}


def _verify_everything(monkeypatch):
    def everything(model, x, y, *args, **kwargs):
        margins = torch.full((len(y), 10), 0.5).double()
        return Certificate(y >= 0, margins[:, 0], margins, y, True)

    monkeypatch.setattr(evaluation, "certify", everything)


def test_bounds_that_the_attack_refutes_are_one_line_and_the_result_is_saved(
    capsys, tmp_path, monkeypatch
):
    _verify_everything(monkeypatch)
    monkeypatch.setattr(loop, "provable", lambda *_: None)
    line = error_line(capsys, *SHORT_TRAIN, "--lr", "0", "--run-dir", str(tmp_path))
    result = runs.read_result(tmp_path)
    count = result["contradictions"]
    assert f"the bounds verify {count} of 40 examples that the attack breaks" in line
    assert count == round(40 * result["pgd_error"]) > 0 and result["verified_error"] == 0
    runs.read_model(tmp_path)
    assert cli.main(["attack", str(tmp_path), *PGD, "--step-size", "1"]) == 0
    warning = capsys.readouterr().err
    assert f"warning: {tmp_path}: ordinary bounds verify {count} of 40 examples that" in warning


def test_a_sound_certificate_that_the_attack_refutes_is_one_line_and_the_evidence_is_saved(
    capsys, tmp_path, monkeypatch
):
    _verify_everything(monkeypatch)
    words = [*SHORT_TRAIN, "--lr", "0", "--run-dir", str(tmp_path)]
    line = error_line(capsys, *words)
    (file,) = tmp_path.glob("evidence-*.npz")
    assert line.endswith(f": the certificate is wrong, see {file}")
    assert runs.read_result(tmp_path) is None
    assert error_line(capsys, *words) == line  # goes on with the network, and judges it again
    assert list(tmp_path.glob("evidence-*")) == [file]
    with np.load(file) as evidence:
        stored = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
        assert evidence["weights_sha256"] == stored and evidence["eps"] == 0.001
    monkeypatch.undo()
    monkeypatch.setattr(datasets, "load", load_toy)
    assert cli.main([*words, "--overwrite"]) == 0
    assert not list(tmp_path.glob("evidence-*")) and runs.read_result(tmp_path)


@pytest.mark.parametrize(
    ("where", "command", "words"),
    [
        ((KernelStep, "__call__"), "train", "a step of training with batch_size=16"),
        ((certificates, "_bounded"), "train", "evaluation with eval_batch_size=25"),
        ((attacks, "_step"), "train", "evaluation with eval_batch_size=25"),
        ((certificates, "_in_one_op"), "certify", "evaluation with eval_batch_size=7"),
        ((attacks, "_step"), "attack", "evaluation with eval_batch_size=7"),
    ],
)
def test_a_gpu_without_memory_is_one_line(
    capsys, toy_run, tmp_path, monkeypatch, where, command, words
):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")

    monkeypatch.setattr(*where, full)
    options = [command, str(toy_run), "--eval-batch-size", "7"]
    if command == "train":
        options = [*SHORT_TRAIN, "--run-dir", str(tmp_path)]
    words = words.replace("eval_batch_size=", "--eval-batch-size ")
    words = words.replace("batch_size=", "--batch-size ")
    line = f"error: {words}: CUDA out of memory; take a smaller one"
    assert error_line(capsys, *options).endswith(line)


def test_a_finished_run_is_shown_and_not_trained_again(capsys, toy_run):
    before = {path: path.read_bytes() for path in toy_run.iterdir()}
    assert cli.main([*SHORT_TRAIN, "--run-dir", str(toy_run)]) == 0
    printed = capsys.readouterr().out
    assert "has finished already" in printed and "epoch" not in printed
    assert f"{100 * runs.read_result(toy_run)['verified_error']:.1f} %" in printed
    assert {path: path.read_bytes() for path in toy_run.iterdir()} == before


def test_a_run_goes_on_after_ctrl_c_unless_overwritten(capsys, tmp_path, monkeypatch):
    options = [*SHORT_TRAIN, "--run-dir", str(tmp_path)]
    for overwrite, words in (
        (["--seed", "1", "--overwrite"], "the same command without --overwrite goes on"),
        (["--overwrite"], "the same command without --overwrite goes on"),
        ([], "the same command goes on"),
    ):
        with monkeypatch.context() as patch:
            _interrupt_after(patch, 1)
            assert cli.main([*options, *overwrite]) == 130
        done = 1 if overwrite else 2
        message = f"stopped after step {done} and saved in {tmp_path}: {words}\n"
        assert message in capsys.readouterr().err

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "pgd", interrupt)
        assert cli.main(options) == 130
    trained = f"final evaluation, with the trained network in {tmp_path}"
    assert trained in capsys.readouterr().err
    assert cli.main(options) == 0
    assert "Going on after step 12." in capsys.readouterr().out
    assert runs.read_config(tmp_path).seed == runs.read_result(tmp_path)["seed"] == 0


def test_a_warning_is_one_line(capsys, monkeypatch, toy_run):
    def warn(*args, **kwargs):
        for _ in range(2):
            warnings.warn(
                "data_root must\n be lr=1e-3: not (lr=1) or lr=2/config.json", stacklevel=2
            )
        return load_toy(*args, **kwargs)

    monkeypatch.setattr(datasets, "load", warn)
    assert cli.main(["certify", str(toy_run)]) == 0
    line = "--data-root must be --lr 1e-3: not (lr=1) or lr=2/config.json"
    assert capsys.readouterr().err == f"cibp-fast: warning: {line}\n"


def test_seeds(capsys, tmp_path):
    options = [*SHORT_TRAIN, "--run-dir", str(tmp_path / "runs")]
    assert cli.main([*options, "--seeds", "2", "--seed", "3"]) == 0
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
    assert printed.count("sound: real") == 1
    assert cli.main(["attack", both, "--steps", "1", "--restarts", "0", "--eps", "1/255"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("PGD error (1 step, 0 restarts) at eps 0.003922: ") == 2
    assert "of 2 seeds: pgd " in printed
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.svg"
    assert cli.main(["plot", both, "-o", str(picture)]) == 0
    assert "(2 seeds)" in picture.read_text()


def test_interrupt(capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupt)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "\ncibp-fast: interrupted\n"


def test_an_interrupt_during_the_imports_is_one_line():
    """Interrupts in the middle of those of pydantic, whose compiled part would print a page."""
    code = """
import signal, sys
from cibp_fast.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "pydantic_core._pydantic_core":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.stderr = sys.stdout
print(main(["info"]))
"""
    assert python(code) == "\ncibp-fast: interrupted\n130\n"


def test_python_dash_m_has_no_traceback(tmp_path):
    command = [sys.executable, "-m", "cibp_fast", "certify", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("cibp-fast: error: ") and done.stderr.count("\n") == 1
