"""Files of weights of other programs: keys, prefixes, other numbers, and what does not fit."""

from __future__ import annotations

import warnings

import pytest
import safetensors.torch
import torch
from test_own import Residual
from torch import nn

import cibp_fast as cf


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)),
    )


def trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randint(1, 9, value.shape))
    return model


def saved(content, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.net.", "_orig_mod."])
def test_names_with_something_in_front(tmp_path, suffix, prefix):
    source = trained(network())
    state = {prefix + name: value for name, value in source.state_dict().items()}
    path = saved(state, tmp_path / f"weights{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        assert cf.load_weights(model, path) is model
    assert same(model, source)


def test_a_network_that_is_wrapped_itself(tmp_path):
    source = trained(network())
    path = saved(source.state_dict(), tmp_path / "weights.pt")
    wrapped = nn.ModuleDict({"net": network()})
    cf.load_weights(wrapped, path)
    assert same(wrapped["net"], source)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "weights"])
def test_the_usual_keys(tmp_path, key):
    """Reads Shi's and the expressive losses' layout: state_dict beside epoch and optimizer."""
    source = trained(network())
    content = {"epoch": 3, key: source.state_dict(), "optimizer": {"state": {}, "lr": 0.1}}
    model = cf.load_weights(network(), saved(content, tmp_path / "weights.pth"))
    assert same(model, source)


def test_the_layouts_of_others(tmp_path):
    """Reads files named and laid out as the programs write them, of small networks."""
    source = trained(network())
    state = source.state_dict()
    marks = {"weight": "/w.", "bias": "/b.", "running_mean": "/running_mean."}
    lirpa = {marks.get(name.rpartition(".")[2], "/x.") + name: each for name, each in state.items()}
    shi = {"state_dict": lirpa, "optimizer": {}, "epoch": 70, "best": (1.0, 2.0, 3)}
    ctrain = {f"layers.{name}": value for name, value in state.items()}
    for content, file in ((shi, "ckpt_best"), (ctrain, "a.pt"), ({"state_dict": ctrain}, "b.ckpt")):
        model = cf.load_weights(network(), saved(content, tmp_path / file))
        assert same(model, source), file

    # CTBench: the first layer normalises, by mean and sigma [1, C, 1, 1]
    ctbench = {"layers.0.mean": torch.full((1, 1, 1, 1), 3.0), "layers.0.sigma": torch.ones(1, 1)}
    for name, value in state.items():
        number, _, rest = name.partition(".")
        ctbench[f"layers.{int(number) + 1}.{rest}"] = value
    model = nn.Sequential(cf.models.Normalize([0.5], [0.25]), *network())
    cf.load_weights(model, saved(ctbench, tmp_path / "net.pt"))
    assert same(model[1:], source) and (model[0].mean.item(), model[0].std.item()) == (3, 1)


def test_a_key_by_name(tmp_path):
    sources = {name: trained(network()) for name in ("model", "ema", "teacher")}
    content = {name: each.state_dict() for name, each in sources.items()} | {"epoch": 3}
    path = saved(content, tmp_path / "weights.pt")
    assert same(cf.load_weights(network(), path, "teacher"), sources["teacher"])
    with pytest.raises(ValueError, match="has tensors under model, ema: choose one with key"):
        cf.load_weights(network(), path)
    with pytest.raises(ValueError, match="no key 'student'; its keys are model, ema, teacher, ep"):
        cf.load_weights(network(), path, "student")
    with pytest.raises(ValueError, match="'epoch' is no state_dict"):
        cf.load_weights(network(), path, "epoch")


def test_other_numbers_are_matched_by_order_with_a_warning(tmp_path):
    source = trained(network())
    numbers = {"0": "blocks.2", "1": "blocks.3", "4": "blocks.7", "6": "blocks.9"}
    state = {
        numbers[name.partition(".")[0]] + "." + name.partition(".")[2]: value
        for name, value in source.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    path = saved(state, tmp_path / "weights.pt")
    model = network()
    with pytest.warns(UserWarning, match=r"\(blocks.2.weight for 0.weight\): the 10 tensors are m"):
        cf.load_weights(model, path)
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(model.eval()(x), source.eval()(x))
    # a shape, or the kind of a tensor, that differs: no guess
    bias, weight = "blocks.9.bias", "blocks.9.weight"
    for wrong in (
        state | {weight: torch.zeros(3, 4)},
        {{bias: "blocks.9.shift"}.get(name, name): value for name, value in state.items()},
        dict(reversed(state.items())),
        {name: value for name, value in state.items() if name != bias},
    ):
        fresh = network()
        before = {name: value.clone() for name, value in fresh.state_dict().items()}
        with pytest.raises(ValueError, match="does not hold this network: "):
            cf.load_weights(fresh, saved(wrong, path))
        assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


def test_constants_of_normalize_may_be_missing_but_none_is_dropped(tmp_path):
    source = trained(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    path = saved(source.state_dict(), tmp_path / "weights.pt")
    normalize = cf.models.Normalize([0.5], [0.25])
    model = nn.Sequential(normalize, nn.Flatten(), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match="matched by their order"):
        cf.load_weights(model, path)
    assert torch.equal(model[2].weight, source[1].weight) and normalize.mean.item() == 0.5
    saved(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"not of this network: 0\.mean"):
        cf.load_weights(nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(4, 3)), path)


def test_what_does_not_fit_is_named_with_the_nearest(tmp_path):
    state = trained(Residual()).state_dict()
    state["lsat.weight"] = state.pop("last.weight")
    path = saved(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError) as error:
        cf.load_weights(Residual(), path)
    assert str(error.value) == (
        f"{path} does not hold this network: missing: last.weight float32 [3, 64] (nearest: "
        "lsat.weight); not of this network: lsat.weight float32 [3, 64] (nearest: last.weight)"
    )
    with pytest.raises(ValueError, match=r"misfitting: last.weight must be float32 \[4, 64\], not"):
        cf.load_weights(
            Residual(classes=4), saved(trained(Residual()).state_dict(), tmp_path / "other.pt")
        )


def test_a_file_of_code_is_not_run(tmp_path):
    path = tmp_path / "whole.pt"
    torch.save(Residual(), path)
    with pytest.raises(
        ValueError, match="holds more than tensors, of which nothing was ru"
    ) as error:
        cf.load_weights(Residual(), path)
    assert "weights_only" not in str(error.value)  # torch's advice is to run it
    with pytest.raises(ValueError, match="must be a file of weights"):
        cf.load_weights(Residual(), tmp_path / "weights.bin")
    with pytest.raises(OSError, match=r"nothing.pt: No such file"):
        cf.load_weights(Residual(), tmp_path / "nothing.pt")


def test_a_network_stays_as_it_was_where_a_tensor_has_no_data(tmp_path):
    state = trained(network()).state_dict()
    state["6.bias"] = state["6.bias"].to("meta")
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"6.bias must be float32 \[3\], not float32 \[3\] without"
    ):
        cf.load_weights(model, saved(state, tmp_path / "weights.pt"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_errors_are_one_short_line_whatever_the_names(tmp_path):
    state = trained(network()).state_dict()
    names = ("z" * 100_000, "two\nlines", *(f"{i}.{'q' * 500}" for i in range(2000)))
    path = saved(state | dict.fromkeys(names, torch.zeros(1)), tmp_path / "weights.pt")
    with pytest.raises(ValueError) as error:
        cf.load_weights(network(), path)
    assert len(str(error.value)) < 600 and "and 1999 more" in str(error.value)
    path = saved({"two\nlines": torch.zeros(1)}, tmp_path / "lines.pt")
    with pytest.raises(ValueError, match=r"not of this network: 'two\\nlines' float32") as error:
        cf.load_weights(network(), path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"has no key 'net'; its keys are 0.weight, 0.bias, 1.wei"):
        cf.load_weights(network(), saved(state, tmp_path / "top.pt"), key="net")


def test_an_error_does_not_compare_thousands_of_names(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "difflib.get_close_matches", lambda name, *_, **__: calls.append(name) or []
    )
    state = {f"blocks.{i}.scale": torch.zeros(2) for i in range(50)}
    with pytest.raises(ValueError, match=r"not of this network: .* and 4. more"):
        cf.load_weights(network(), saved(state, tmp_path / "weights.pt"))
    assert len(calls) == 6  # three that are missing, three that are too many


def test_what_is_no_network_or_has_no_weights_yet(tmp_path):
    path = saved(trained(network()).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not a str"):
        cf.load_weights("small", path)
    with pytest.raises(ValueError, match="model must have its weights: call it once"):
        cf.load_weights(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), path)
