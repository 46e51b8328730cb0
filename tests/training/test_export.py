"""Exports for other verifiers: the network in ONNX Runtime, and properties read by a parser."""

from __future__ import annotations

import copy
import re
import sys
from fractions import Fraction
from math import ulp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from digits import TOY_PRESET, colour, load_toy, toy_dataset
from torch import nn

import cibp_fast as cf
from cibp_fast import cli
from cibp_fast.training import datasets, export, runs
from cibp_fast.training.config import preset


def network(name: str, **changes: Any) -> runs.Network:
    """Returns an untrained network, with biases."""
    torch.manual_seed(3)
    config = preset(name, init="torch", **changes)
    model = runs.build_model(config)
    return runs.Network("toy", config, model, safetensors.torch.save(model.state_dict()))


def examples(name: str) -> datasets.Split:
    digits = toy_dataset()
    return (colour(digits) if name.startswith("cifar10") else digits).test


class Property:
    """Reads a file of VNN-LIB of the form that VNN-COMP has for classifiers, in exact numbers."""

    def __init__(self, path: Path) -> None:
        lines = [line for line in path.read_text().splitlines() if not line.startswith(";")]
        words = re.findall(r"[()]|[^\s()]+", "\n".join(lines))
        self.declared: list[str] = []
        self.lower: dict[str, Fraction] = {}
        self.upper: dict[str, Fraction] = {}
        self.any_of: list[tuple[str, str]] = []  # one of these: the first at least the second
        while words:
            self.statement(self.tree(words))

    def tree(self, words: list[str]) -> Any:
        word = words.pop(0)
        if word != "(":
            return word
        found = []
        while words[0] != ")":
            found.append(self.tree(words))
        words.pop(0)
        return found

    def statement(self, tree: Any) -> None:
        match tree:
            case ["declare-const", name, "Real"]:
                self.declared.append(name)
            case ["assert", [">=", name, number]]:
                assert name in self.declared and name not in self.lower
                self.lower[name] = self.number(number)
            case ["assert", ["<=", name, number]]:
                assert name in self.declared and name not in self.upper
                self.upper[name] = self.number(number)
            case ["assert", ["or", *cases]]:
                assert not self.any_of
                for case in cases:
                    assert case[0] == "and" and len(case) == 2 and case[1][0] == ">="
                    assert {*case[1][1:]} <= {*self.declared}
                    self.any_of.append(tuple(case[1][1:]))
            case _:
                raise AssertionError(tree)

    def number(self, text: str) -> Fraction:
        assert re.fullmatch(r"-?\d+\.\d+", text)  # no exponent, which some parsers do not take
        return Fraction(text)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mnist-small-0.3-cibp", {}),
        ("cifar10-small-8/255-cibp", {}),  # which normalises
        ("cifar10-small-8/255-cibp-normalized", {}),
        ("mnist-small-0.3-cibp", {"padding": "same"}),  # with ZeroPad2d
    ],
)
def test_onnx_runtime_gives_the_same_logits(name, changes):
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    found = network(name, **changes)
    digits = examples(name)
    images = torch.cat([digits.images, *(digits.images.roll(k, 3) for k in range(1, 5))])
    x = runs.to_input(found.config)(images.to(torch.float32) / 255)
    assert len(x) == 200
    found.model.train()
    content = export.to_onnx(found.model, x.shape[1:])
    assert found.model.training
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto, full_check=True)
    assert [each.version for each in proto.opset_import] == [18]
    (given,), (returned,) = proto.graph.input, proto.graph.output
    assert (given.name, returned.name) == ("input", "logits")
    sizes = [each.dim_value or each.dim_param for each in given.type.tensor_type.shape.dim]
    assert sizes == ["N", *x.shape[1:]]
    known = {"Sub", "Div", "Conv", "Relu", "Reshape", "Gemm"}
    kinds = {node.op_type for node in proto.graph.node}
    assert kinds <= known
    pads = [
        tuple(each.ints)
        for node in proto.graph.node
        for each in node.attribute
        if each.name == "pads"
    ]
    assert (pads == [(1, 1, 1, 1), (1, 1, 2, 2)]) == ("padding" in changes)  # ZeroPad2d's are in
    assert ("Div" in kinds) == (name == "cifar10-small-8/255-cibp")
    assert str(Path(torch.__file__).parent).encode() not in content  # nothing of this machine

    weights = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    for key, value in found.model.state_dict().items():
        assert np.array_equal(weights[key], value)
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    expected = found.model(x).detach()
    for count in (1, 200):
        (logits,) = session.run(None, {"input": x[:count].numpy()})
        # sums of at most 3200 products, in another order
        torch.testing.assert_close(torch.from_numpy(logits), expected[:count], rtol=1e-4, atol=1e-5)
        assert np.array_equal(logits.argmax(1), expected[:count].argmax(1))
    assert len({*expected.argmax(1).tolist()}) > 1


@pytest.mark.parametrize(
    ("clip", "eps"), [((0.0, 1.0), 0.1), (None, 8 / 255), ((-0.5, 0.75), 0.3), (None, 0.0)]
)
def test_a_property_contains_the_exact_box(tmp_path, clip, eps):
    torch.manual_seed(0)
    x = torch.rand(3, 4, 4).clamp(max=0.75)
    x[2] *= 1e-9
    x.view(-1)[:4] = torch.tensor([0.0, 0.1, 0.75, eps])
    path = tmp_path / "one.vnnlib"
    path.write_text(export.vnnlib(x, 2, 4, eps, clip, "about"))
    found = Property(path)
    inputs = [f"X_{i}" for i in range(x.numel())]
    assert found.declared == [*inputs, "Y_0", "Y_1", "Y_2", "Y_3"]
    assert found.lower.keys() == found.upper.keys() == {*inputs}
    for name, value in zip(inputs, x.flatten().tolist(), strict=True):
        lower, upper = Fraction(value) - Fraction(eps), Fraction(value) + Fraction(eps)
        if clip is not None:
            lower, upper = max(lower, Fraction(clip[0])), min(upper, Fraction(clip[1]))
        for written, exact, sign in (
            (found.lower[name], lower, -1),
            (found.upper[name], upper, 1),
        ):
            for read in (written, Fraction(float(written))):  # exactly, and as float64
                beyond = sign * (read - exact)
                assert 0 <= beyond <= Fraction(1.001) * Fraction(ulp(float(exact)))
    assert found.any_of == [("Y_0", "Y_2"), ("Y_1", "Y_2"), ("Y_3", "Y_2")]


@pytest.mark.parametrize("up", [False, True])
def test_decimal_numbers_are_rounded_outward(up):
    random = np.random.default_rng(0)
    values = [Fraction(1, 3), Fraction(-1, 3), Fraction(1, 255), Fraction(2), Fraction(0)]
    values += [Fraction(0.1) + Fraction(1, 2**90), Fraction(1) - Fraction(1, 2**60)]
    values += [Fraction(int(n), 2**70) for n in random.integers(-(2**62), 2**62, 200)]
    for value in values:
        text = export.decimal(value, up)
        for read in (Fraction(text), Fraction(float(text))):
            assert (read >= value) if up else (read <= value)
            assert abs(read - value) <= Fraction(1.001) * Fraction(ulp(float(value)))
    assert export.decimal(Fraction(0), up) == "0.0"
    assert export.decimal(Fraction(1), up) == "1.0"
    assert export.decimal(Fraction(-3, 8), up) == "-0.375"


@pytest.fixture
def toy_data(monkeypatch):
    monkeypatch.setattr(datasets, "load", load_toy)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command(tmp_path, capsys, monkeypatch, toy_data, toy_run):
    pytest.importorskip("onnxscript")  # which brings onnx
    monkeypatch.chdir(tmp_path)
    words = ["export", str(toy_run), "--examples", "12", "--eps", "0.25", "--timeout", "30"]
    assert cli.main(words) == 0
    folder = Path("export") / toy_run.name
    captured = capsys.readouterr()
    assert f"wrote {folder}: network.onnx, instances.csv and the properties of 12" in captured.out
    assert captured.err == ""
    names = [f"example-{index}.vnnlib" for index in range(12)]
    assert sorted(contents(folder)) == sorted([*names, "network.onnx", "instances.csv"])
    rows = [f"network.onnx,{name},30\n" for name in names]
    assert (folder / "instances.csv").read_text() == "".join(rows)
    test = toy_dataset().test
    for index in (0, 11):
        found = Property(folder / names[index])
        lower = [float(found.lower[f"X_{i}"]) for i in range(784)]
        upper = [float(found.upper[f"X_{i}"]) for i in range(784)]
        pixels = test.pixels()[index].flatten().double()
        assert lower == (pixels - 0.25).clamp(min=0).tolist()
        assert upper == (pixels + 0.25).clamp(max=1).tolist()
        label = int(test.labels[index])
        others = [(f"Y_{j}", f"Y_{label}") for j in range(10) if j != label]
        assert found.any_of == others and len(found.declared) == 794

    before = contents(folder)
    assert cli.main(words) == 2
    held = f"{folder} holds an export: replace it with --overwrite, or choose another folder"
    assert held in capsys.readouterr().err and contents(folder) == before
    fewer = ["export", str(toy_run / "model.safetensors"), "--preset", TOY_PRESET]
    fewer += ["--output", str(folder), "--examples", "2", "--overwrite"]
    assert cli.main(fewer) == 0
    assert sorted(contents(folder)) == [*names[:2], "instances.csv", "network.onnx"]
    assert contents(folder)["network.onnx"] == before["network.onnx"]
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    assert cli.main(fewer) == 2
    assert "holds notes.txt, which is no file of an export" in capsys.readouterr().err
    assert contents(folder) == before


def test_inputs_are_what_the_network_is_given(tmp_path):
    """Checks the normalised pixels of a network that does not normalise itself."""
    pytest.importorskip("onnxscript")  # which brings onnx
    found = network("cifar10-small-8of255-ibp-normalized", eps=0.25)
    split = examples("cifar10")[:2]
    export.export_run(tmp_path, found, split)
    assert "; X is normalised by channel\n" in (tmp_path / "example-1.vnnlib").read_text()
    mean, std = (torch.tensor(each)[:, None, None] for each in datasets.CHANNEL_STATS["cifar10"])
    x = ((split.pixels() - mean) / std)[1].flatten().double()
    lower = Property(tmp_path / "example-1.vnnlib").lower
    assert [float(lower[f"X_{i}"]) for i in range(3072)] == (x - 0.25).tolist()


def test_an_export_that_is_stopped_has_no_instances(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")  # which brings onnx
    found, split = network("mnist5k-small-0.1-ibp"), toy_dataset().test[:3]
    export.export_run(tmp_path, found, split)

    def stopped(*arguments):
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export, "to_onnx", stopped)
        export.export_run(tmp_path, found, split, overwrite=True)
    assert sorted(tmp_path.iterdir()) == before  # nothing was removed yet
    monkeypatch.setattr(export, "vnnlib", stopped)
    with pytest.raises(KeyboardInterrupt):
        export.export_run(tmp_path, found, split, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [export.NETWORK]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("RUN --examples 0", "--examples must be from 1 to the 40 of the test set, not 0"),
        ("RUN --examples 41", "--examples must be from 1 to the 40 of the test set, not 41"),
        ("RUN --timeout 0 --examples 1", "--timeout must be 1 second or more, not 0"),
        ("RUN --eps -1", "--eps must be a number from 0 to 1e18, as 0.1 or 8/255, not -1"),
        ("nowhere", "nowhere is not a run folder: there is no such folder"),
        ("RUN --output FILE --examples 1", "config.json: it is a file, not a folder"),
        ("RUN --eval-batch-size 3", "export does not take '--eval-batch-size'"),
        ("RUN --device cuda", "export does not take '--device'"),
    ],
)
def test_bad_words(tmp_path, capsys, monkeypatch, toy_data, toy_run, words, problem):
    pytest.importorskip("onnxscript")  # which brings onnx
    monkeypatch.chdir(tmp_path)
    stands = {"RUN": str(toy_run), "FILE": str(toy_run / "config.json")}
    assert cli.main(["export", *(stands.get(word, word) for word in words.split())]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch, toy_data, toy_run, package):
    if package == "onnxscript":
        pytest.importorskip("onnx")  # asked first
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["export", str(toy_run), "--output", str(tmp_path / "out")]) == 2
    problem = f"needs the package {package}, which is not installed: pip install 'cibp-fast[export]"
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_examples_and_a_network_of_ones_own(tmp_path: Path) -> None:
    """Exports what cf.certify was asked, and leaves the network as it was; names what is wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    x, y = torch.rand(2, 1, 3, 3), torch.tensor([2, 0])
    before = copy.deepcopy(model.state_dict())
    cf.export(model, x, y, 0.25, tmp_path / "some", clip=None, timeout=7)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    names = sorted(path.name for path in (tmp_path / "some").iterdir())
    assert names == ["example-0.vnnlib", "example-1.vnnlib", "instances.csv", "network.onnx"]
    assert (tmp_path / "some/instances.csv").read_text().splitlines()[1] == (
        "network.onnx,example-1.vnnlib,7"
    )
    asked = (tmp_path / "some/example-0.vnnlib").read_text()
    assert asked == export.vnnlib(x[0], 2, 3, 0.25, None, "Example 0 of x")
    for wrong, options, message in (
        ((model, x.double(), y, 0.1), {}, "x must be float32"),
        ((model, x, y + 1, 0.1), {}, "label"),
        ((model, x, y, -0.1), {}, "eps"),
        ((model, x, y, torch.tensor(0.1)), {}, "eps must be one number"),
        ((model, x, y, 0.1), {"clip": (1, 0)}, "clip"),
        ((model, x, y, 0.1), {"timeout": 0}, "timeout must be 1"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            cf.export(*wrong, tmp_path / "wrong", **options)
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(FileExistsError, match="holds an export"):
        cf.export(model, x, y, 0.1, tmp_path / "some")
