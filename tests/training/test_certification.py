"""Folders of certificates: every field, and what is left by a kill at every point."""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import exact
import numpy as np
import pytest
import safetensors.torch
import torch
from digits import TOY_PRESET, colour, load_toy, toy_dataset
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import cli, environment
from cibp_fast.certificates import Certificate
from cibp_fast.ops import backends
from cibp_fast.training import certification, datasets, files, runs
from cibp_fast.training.config import preset

CONFIG = preset("mnist5k-small-0.1-cibp", eval_batch_size=7)
EPS = 0.045
FILES = ["certificates.jsonl", "inputs.npz", "result.json", "weights.safetensors"]


@cache
def state_dict() -> dict[str, Tensor]:
    """Returns weights that are right about most of the toy digits: the nearest mean of a class."""
    torch.manual_seed(1)
    train = toy_dataset().train
    model = layers_of_network()
    features = model[:3](train.pixels()).detach()
    means = torch.stack([features[train.labels == label].mean(0) for label in range(10)])
    head = {"3.weight": means, "3.bias": -0.5 * (means * means).sum(1)}
    return model.state_dict() | head


def layers_of_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 7, stride=7), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


def network(**changes: Any) -> runs.Network:
    model = layers_of_network()
    model.load_state_dict(state_dict())
    weights = safetensors.torch.save(model.state_dict())
    return runs.Network("toy", CONFIG.replace(**{"eps": EPS} | changes), model, weights)


def certify_to(folder: Path, found: runs.Network | None = None, **options: Any) -> dict[str, Any]:
    options = {"semantics": "real"} | options
    return certification.certify_to(folder, found or network(), toy_dataset().test, **options)


def certificates(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "certificates.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_times(folder: Path) -> dict[str, Any]:
    """Returns what does not depend on when it was made."""
    result = json.loads((folder / "result.json").read_text())
    del result["date"], result["seconds"]
    return {"result": result, "lines": (folder / "certificates.jsonl").read_bytes()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Gives a finished folder, not to be changed."""
    torch.set_num_threads(1)  # as in the tests
    folder = tmp_path_factory.mktemp("certificates") / "whole"
    certify_to(folder)
    return folder


def copy(folder: Path, to: Path, *, unfinished: int | None = None) -> None:
    """Copies a finished folder, or makes of it one that has written so many bytes of lines."""
    to.mkdir()
    for name, content in contents(folder).items():
        (to / name).write_bytes(content)
    if unfinished is not None:
        task = json.loads((to / "result.json").read_text()) | {"seconds": 1.5}
        (to / "task.json").write_text(json.dumps(task))
        (to / "result.json").unlink()
        os.truncate(to / "certificates.jsonl", unfinished)


@pytest.mark.parametrize("semantics", ["real", "float32"])
@pytest.mark.parametrize("clip", [(0.0, 1.0), None, (-0.1, 1.5)])
def test_every_field(tmp_path, semantics, clip):
    found = network(clip=clip)
    before = datetime.now(timezone.utc) - timedelta(seconds=1)
    returned = certify_to(tmp_path, found, semantics=semantics)
    assert names(tmp_path) == FILES
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == returned and (tmp_path / "result.json").read_text().startswith('{\n  "format')

    weights, lines = (
        (tmp_path / name).read_bytes() for name in ("weights.safetensors", "certificates.jsonl")
    )
    assert weights == found.weights
    arrays = np.load(tmp_path / "inputs.npz", allow_pickle=False)
    x, y = arrays["x"], arrays["y"]
    assert (x.dtype, y.dtype) == (np.float32, np.int64)
    test = toy_dataset().test
    assert np.array_equal(x, test.images.numpy().astype(np.float32) / np.float32(255))
    assert np.array_equal(y, test.labels)
    seconds, date = result.pop("seconds"), datetime.fromisoformat(result.pop("date"))
    assert 0 < seconds < 60 and before <= date <= datetime.now(timezone.utc)
    written = certificates(tmp_path)
    verified = sum(line["verified"] for line in written)
    assert 5 < verified < 35
    assert result == {
        "format": "cibp_fast certificates 1",
        "semantics": semantics,
        "eps": "{}/{}".format(*EPS.as_integer_ratio()),
        "clip": {None: None, 0.0: ["0", "1"], -0.1: [str(Fraction(-0.1)), "3/2"]}[clip and clip[0]],
        "network": [
            {
                "layer": "conv2d",
                "weight": "0.weight",
                "bias": "0.bias",
                "stride": [7, 7],
                "padding": [0, 0],
                "dilation": [1, 1],
                "groups": 1,
            },
            {"layer": "relu"},
            {"layer": "flatten"},
            {"layer": "linear", "weight": "3.weight", "bias": "3.bias"},
        ],
        "weights": {"file": "weights.safetensors", "sha256": hashlib.sha256(weights).hexdigest()},
        "inputs": {
            "file": "inputs.npz",
            "sha256": hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest(),
            "shape": [40, 1, 28, 28],
            "dtype": "float32",
        },
        "certificates": {
            "file": "certificates.jsonl",
            "sha256": hashlib.sha256(lines).hexdigest(),
        },
        "examples": 40,
        "verified": verified,
        "verified_error": (40 - verified) / 40,
        "dataset": "mnist5k",
        "run": "toy",
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "kernels": backends.in_use(torch.device("cpu"), torch.float64)[0],
    }

    expected = cf.certify(found.model, test.pixels(), test.labels, EPS, clip, semantics=semantics)
    model = found.model.double()
    for index, line in enumerate(written):
        assert list(line) == ["index", "label", "predicted", "verified", "margin"]
        assert (line["index"], line["label"]) == (index, y[index])
        assert line["predicted"] == expected.predicted[index]
        assert line["verified"] is bool(expected.verified[index])
        margin = float.fromhex(line["margin"])
        proven = expected.margin[index].item()
        assert margin == proven - 2.0**-36 * abs(proven) < proven
        assert margin.hex() == line["margin"]
        assert line["verified"] == (margin > 0 and line["predicted"] == line["label"])
        if index < 3:  # at most the exact one, and not much less
            box = exact.ball(torch.from_numpy(x[index]), EPS, clip)
            margins = exact.margins(model, *box, y[index])
            least = min(each for each in margins if each is not None)
            assert Fraction(margin) <= least
            # the kernels round in float32, and "float32" allows for as much again
            assert least - Fraction(margin) < (1e-3 if semantics == "real" else 1e-2)


def test_a_nan_and_an_infinite_margin_are_read_again(tmp_path, monkeypatch):
    """Checks that margins beyond the finite ones survive a resume."""
    values = torch.tensor([torch.nan, -torch.inf, 0.1, -0.0, 5e-324] * 8, dtype=torch.float64)

    def certify(model, x, y, *args, **options):
        margin = values[: len(y)]
        return Certificate(margin > 0, margin, margin[:, None], y, True)

    monkeypatch.setattr(certification, "certify", certify)
    found = network(eval_batch_size=40)
    certify_to(tmp_path / "whole", found)
    margins = [line["margin"] for line in certificates(tmp_path / "whole")[:5]]
    assert margins == [
        "nan",
        "-inf",
        "0x1.9999999980000p-4",
        "-0x0.0p+0",
        "0x0.0000000000001p-1022",
    ]
    path = tmp_path / "whole" / "certificates.jsonl"
    lines = path.read_bytes()
    assert certification._kept(path, toy_dataset().test.labels) == 40
    assert path.read_bytes() == lines


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("half", [False, True])
def test_a_kill_at_every_write(tmp_path, finished, monkeypatch, half):
    """Kills it before each write, or in the middle of it; the same call goes on."""
    writes = {name: getattr(certification, name) for name in ("write_atomic", "append")}
    left = [0]

    def dying(name):
        def write(path, content):
            left[0] -= 1
            if left[0] < 0:
                if half and name == "append":
                    writes[name](path, content[: len(content) // 2])
                elif half:  # what write_atomic leaves of a killed process
                    path.with_name(f".{path.name}.1.tmp").write_bytes(content[:9])
                raise Killed
            writes[name](path, content)

        return write

    for module, name in ((certification, "append"), (files, "write_atomic")):
        monkeypatch.setattr(module, name, dying(name))
    monkeypatch.setattr(certification, "write_atomic", files.write_atomic)
    done, points = False, 0
    while not done:
        folder = tmp_path / str(points)
        left[0] = points
        try:
            certify_to(folder)
            done = True
        except Killed:
            points += 1
            assert not (folder / "result.json").exists()
            left[0] = 10**9
            certify_to(folder)
        assert names(folder) == FILES
        assert without_times(folder) == without_times(finished)
    assert points == 4 + 2 * 6  # task, weights, inputs, result; 6 batches and their seconds


def test_a_file_cut_anywhere_goes_on(tmp_path, finished, monkeypatch):
    """Cuts certificates.jsonl at various bytes; only what is lost is certified again."""
    lines = (finished / "certificates.jsonl").read_bytes()
    asked = []
    certify = certification.certify

    def counting(model, x, *args, **options):
        asked.append(len(x))
        return certify(model, x, *args, **options)

    monkeypatch.setattr(certification, "certify", counting)
    whole = [0, len(lines), lines.index(b"\n"), lines.index(b"\n") + 1, len(lines) - 1]
    for cut in (*whole, *random.Random(0).sample(range(len(lines)), 15)):
        folder = tmp_path / str(cut)
        copy(finished, folder, unfinished=cut)
        asked.clear()
        result = certify_to(folder)
        assert without_times(folder) == without_times(finished) and names(folder) == FILES
        assert sum(asked) == 40 - lines[:cut].count(b"\n")
        assert result["seconds"] >= 1.5


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b'"index": 9', b'"index": 8'),
        lambda line: line.replace(b'"label": 9', b'"label": 7'),
        lambda line: line.replace(b'"verified": ', b'"verified":'),
        lambda line: line.replace(b"0x", b"zz"),
        lambda line: b"\0" * (len(line) - 1) + b"\n",
        lambda line: b"[]\n",
    ],
)
def test_what_is_no_line_is_certified_again(tmp_path, finished, damage):
    """Damages the tenth line, as a power failure may."""
    lines = (finished / "certificates.jsonl").read_bytes().splitlines(keepends=True)
    copy(finished, tmp_path / "again", unfinished=0)
    lines[9], old = damage(lines[9]), lines[9]
    assert lines[9] != old
    (tmp_path / "again" / "certificates.jsonl").write_bytes(b"".join(lines))
    certify_to(tmp_path / "again")
    assert without_times(tmp_path / "again") == without_times(finished)


def test_a_finished_folder_is_not_certified_again(tmp_path, finished, monkeypatch, capsys):
    monkeypatch.delattr(certification, "certify")
    before = contents(finished)
    result = certify_to(finished)
    assert result == json.loads(before["result.json"])
    assert f"The certificates in {finished} are finished already." in capsys.readouterr().out
    assert contents(finished) == before
    copy(finished, tmp_path / "kept")  # a kill between the last two steps
    (tmp_path / "kept" / "task.json").write_text("{")
    certify_to(tmp_path / "kept")
    assert contents(tmp_path / "kept") == before


def other_weights() -> runs.Network:
    found = network()
    with torch.no_grad():
        found.model[3].bias[0] += 1
    return replace(found, weights=safetensors.torch.save(found.model.state_dict()))


@pytest.mark.parametrize("unfinished", [None, 1000])
@pytest.mark.parametrize(
    ("other", "options", "named"),
    [
        (lambda: network(eps=0.2), {}, r"\(eps 0.045 there, 0.2 now\)"),
        (lambda: network(clip=None), {}, r"\(clip \['0', '1'\] there, None now\)"),
        (network, {"semantics": "float32"}, r"\(semantics real there, float32 now\)"),
        (other_weights, {}, r"\(weights.sha256 \w{12}\.\.\. there, \w{12}\.\.\. now\)"),
        (
            network,
            {"count": 30},
            r"\(inputs.sha256 .* there, .* now; inputs.shape .*; examples 40 t",
        ),
        (network, {"version": "9.9"}, r"\(versions.cibp_fast \S+ there, 9.9 now\)"),
    ],
)
def test_another_task_is_refused_by_name(
    tmp_path, finished, monkeypatch, other, options, named, unfinished
):
    copy(finished, tmp_path / "there", unfinished=unfinished)
    folder, before = tmp_path / "there", contents(tmp_path / "there")
    if "version" in options:
        versions = environment.versions() | {"cibp_fast": options["version"]}
        monkeypatch.setattr(certification, "versions", lambda: versions)
    test = toy_dataset().test[: options.get("count", 40)]
    semantics = options.get("semantics", "real")
    with pytest.raises(FileExistsError, match=f"{folder} holds another task {named}"):
        certification.certify_to(folder, other(), test, semantics)
    assert contents(folder) == before
    result = certification.certify_to(folder, other(), test, semantics, overwrite=True)
    assert names(folder) == FILES and result["examples"] == len(test)
    certification.certify_to(tmp_path / "fresh", other(), test, semantics)
    assert without_times(folder) == without_times(tmp_path / "fresh")


def test_other_batches_and_names_are_the_same_task(tmp_path, finished):
    copy(finished, tmp_path / "there", unfinished=1000)
    renamed = replace(network(eval_batch_size=40), name="renamed")
    assert certify_to(tmp_path / "there", renamed)["run"] == "renamed"
    again, first = without_times(tmp_path / "there"), without_times(finished)
    assert again["lines"] == first["lines"]


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("result.json", b"{", "result.json is damaged"),
        ("result.json", b"[]", "result.json is damaged"),
        ("result.json", b"{}", "result.json is damaged .'format' is missing"),
        ("result.json", None, "task.json of stopped certificates is gone"),
        ("inputs.npz", None, "inputs.npz of finished certificates is gone"),
        ("certificates.jsonl", None, "certificates.jsonl of finished certificates is gone"),
        ("notes.txt", b"mine", "holds notes.txt, which is no file of certificates"),
    ],
)
def test_a_damaged_folder_is_named_and_kept(tmp_path, finished, file, content, problem):
    folder = tmp_path / "there"
    copy(finished, folder)
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    before = contents(folder)
    with pytest.raises((OSError, ValueError), match=problem):
        certify_to(folder)
    assert contents(folder) == before
    if file == "notes.txt":
        with pytest.raises(FileExistsError, match=problem):
            certify_to(folder, overwrite=True)
        assert contents(folder) == before
    else:
        certify_to(folder, overwrite=True)
        assert without_times(folder) == without_times(finished)


def test_two_processes_do_not_write_in_one_folder(tmp_path):
    with (
        runs.locked(tmp_path, certification.FILES, "certifying"),
        pytest.raises(BlockingIOError, match=f"another process is certifying in {tmp_path}"),
    ):
        certify_to(tmp_path)
    assert names(tmp_path) == []


def test_inputs_are_what_the_network_is_given(tmp_path):
    """Checks the normalised pixels of a network that does not normalise itself."""
    config = preset("cifar10-small-8of255-ibp-normalized", eval_batch_size=3)
    model = runs.build_model(config)
    found = runs.Network("run", config, model, safetensors.torch.save(model.state_dict()))
    test = colour(toy_dataset()).test[:4]
    result = certification.certify_to(tmp_path, found, test, "real")
    assert result["clip"] is None and result["eps"] == str(Fraction(8 / 255))
    assert result["network"][0]["layer"] == "conv2d"
    mean, std = (torch.tensor(each)[:, None, None] for each in datasets.CHANNEL_STATS["cifar10"])
    x = np.load(tmp_path / "inputs.npz")["x"]
    assert torch.equal(torch.from_numpy(x), (test.pixels() - mean) / std)


# The command.


@pytest.fixture
def toy_data(monkeypatch):
    monkeypatch.setattr(datasets, "load", load_toy)


def test_the_command(tmp_path, capsys, monkeypatch, toy_data, toy_run):
    folder = tmp_path / "certificates"
    words = ["certify", str(toy_run), "--output", str(folder), "--examples", "6"]
    words += ["--eval-batch-size", "2"]
    certify, calls = certification.certify, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return certify(*arguments, **options)

    monkeypatch.setattr(certification, "certify", interrupted)
    assert cli.main([*words, "--overwrite"]) == 130
    stopped = f"stopped after 4 of 6 examples, saved in {folder}: the same command without --over"
    assert stopped in capsys.readouterr().err
    assert len(certificates(folder)) == 4
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    missed = 6 - result["verified"]
    error = f"verified error at eps 0.001: {100 * missed / 6:.2f} % ({missed} of 6 held-out ex"
    for line in (
        "Going on after 4 examples.",
        error,
        "sound: real",
        f"certificates are in {folder}",
    ):
        assert line in printed
    assert len(calls) == 4 and result["run"] == toy_run.name
    assert (folder / "weights.safetensors").read_bytes() == (
        toy_run / "model.safetensors"
    ).read_bytes()
    assert cli.main(words) == 0
    assert error in capsys.readouterr().out and len(calls) == 4


def error_line(capsys, *words: object) -> str:
    assert cli.main(list(map(str, words))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_words(tmp_path, capsys, toy_data, toy_run):
    folder = tmp_path / "out"
    for seed in (3, 4):
        (tmp_path / "runs" / f"seed{seed}").mkdir(parents=True)
        for path in toy_run.iterdir():
            (tmp_path / "runs" / f"seed{seed}" / path.name).write_bytes(path.read_bytes())
    several = tmp_path / "runs"
    output = ["--output", folder]
    for words, problem in (
        ([toy_run, "--overwrite"], "--overwrite must come with --output"),
        ([toy_run, *output, "--semantics", "none"], "--semantics must be real or float32 to write"),
        (
            [several, *output],
            f"{several} holds 2 runs, but files are written for one: name it, such as",
        ),
        ([toy_run, "--output", toy_run], f"{toy_run} holds config.json, which is no file of cert"),
        (
            [toy_run, "--output", toy_run / "config.json"],
            "config.json: it is a file, not a folder",
        ),
        ([toy_run, *output, "--examples", "41"], "--examples must be from 1 to the 40 of"),
        ([toy_run / "model.safetensors"], "is a file of weights: name its network with --preset"),
    ):
        assert problem in error_line(capsys, "certify", *words)
    assert not folder.exists()


# Files of weights.


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_file_of_weights(tmp_path, capsys, toy_data, toy_run, suffix):
    path, original = tmp_path / f"weights{suffix}", toy_run / "model.safetensors"
    if suffix == ".safetensors":
        path.write_bytes(original.read_bytes())
    else:
        torch.save(safetensors.torch.load(original.read_bytes()), path)
    for command in (["certify", "--semantics", "none"], ["attack", "--steps", "3"]):
        printed = []
        for words in ([toy_run], [path, "--preset", TOY_PRESET]):
            assert cli.main([*command, *map(str, words), "--examples", "10"]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1] and "of 10 held-out examples" in printed[0]
    certified = ["certify", str(path), "--preset", TOY_PRESET, "--examples", "1"]
    assert cli.main([*certified, "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["run"] == "weights"
    written = safetensors.torch.load((tmp_path / "out" / "weights.safetensors").read_bytes())
    expected = safetensors.torch.load(original.read_bytes())
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_malicious_file_is_not_executed(tmp_path, capsys, toy_data, old_format):
    path, made = tmp_path / "evil.pt", tmp_path / "made"
    zipped = not old_format
    torch.save({"0.weight": Malicious(made)}, path, _use_new_zipfile_serialization=zipped)
    words = ("certify", path, "--preset", TOY_PRESET)
    assert "evil.pt is damaged, or holds more than tensors" in error_line(capsys, *words)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # it would have been


def test_weights_that_do_not_fit_are_named(tmp_path, capsys, toy_data, toy_run):
    state = safetensors.torch.load((toy_run / "model.safetensors").read_bytes())
    does_not_hold = "does not hold this network: "
    less = {name: value for name, value in state.items() if name != "5.bias"}
    shape = "7.weight must be float32 [10, 100], not float32 [9, 100]"
    dtype = "7.weight must be float32 [10, 100], not float64 [10, 100]"
    others = {f"module.a{name}": value for name, value in state.items()}
    for content, problem in (
        (less, f"{does_not_hold}missing: 5.bias float32 [100]"),
        (
            state | {"9.bias": torch.zeros(2)},
            f"{does_not_hold}not of this network: 9.bias float32 [2]",
        ),
        (state | {"7.weight": state["7.weight"][:9]}, f"{does_not_hold}misfitting: {shape}"),
        (state | {"7.weight": state["7.weight"].double()}, f"{does_not_hold}misfitting: {dtype}"),
        (
            others | {"b": torch.zeros(1)},
            f"{does_not_hold}missing: 0.weight float32 [16, 1, 4, 4] (nearest: module.a0.weight)",
        ),
        ({"state": state}, "it is no state_dict, which has a tensor for each name"),
        ([1, 2], "it is no state_dict, which has a tensor for each name"),
        (state["5.bias"], "it is no state_dict, which has a tensor for each name"),
        (state | {"5.bias": state["5.bias"].to_sparse()}, does_not_hold),
    ):
        files = ["weights.pt"]
        if "no state_dict" not in problem and problem != does_not_hold:
            files.append("weights.safetensors")
            safetensors.torch.save_file(
                {name: value.contiguous() for name, value in content.items()},
                tmp_path / files[1],
            )
        torch.save(content, tmp_path / files[0])
        for file in files:
            words = (tmp_path / file, "--preset", TOY_PRESET)
            line = error_line(capsys, "certify", *words)
            assert str(tmp_path / file) in line
            assert problem in line
            assert error_line(capsys, "attack", *words) == line


def test_files_that_are_no_weights(tmp_path, capsys, toy_data, toy_run):
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "folder.pt").mkdir()
    for file, problem in (
        ("cut.pt", "cut.pt is damaged"),
        ("empty.pth", "empty.pth is damaged"),
        ("text.safetensors", "text.safetensors is damaged"),
        ("folder.pt", "folder.pt: Is a directory"),
        ("missing.pt", "missing.pt: No such file"),
        ("weights.bin", "weights.bin must be a file of weights, .safetensors, .pt, .pth, .ckpt"),
    ):
        words = ("certify", tmp_path / file, "--preset", TOY_PRESET)
        assert problem in error_line(capsys, *words)
    words = ("certify", toy_run / "model.safetensors", "--preset", "mnist-tiny-0.1-ibp")
    assert "unknown preset 'mnist-tiny-0.1-ibp'" in error_line(capsys, *words)
