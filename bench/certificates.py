"""Times `cf.certify` on test sets, sound against ordinary bounds, and counts what is verified.

The networks are the trained ones in results/, on their test sets; and those of --presets with fresh
weights, on random images, for their time alone. "ordinary" is sound=False through the fused
kernels; "real" and "float32" are sound certificates. Ratios are times over the ordinary one's.

With --widths, a second table: by how much sound boxes are wider than those of float64, mean by
mean, behind each ReLU of the trained networks. With --audits, a third: what the independent checker
says of all their certificates, and by how much its exact bounds are above the margins.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import machine
import timing
import torch
from timing import Row, number
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import check_certificates
from cibp_fast.certificates import boxes, widened
from cibp_fast.fusion import of_torch_alone
from cibp_fast.soundness import Box
from cibp_fast.training import certification, datasets, runs
from cibp_fast.training.config import Config, preset

RESULTS = Path(__file__).resolve().parent.parent / "results"
KINDS = {
    "ordinary": {"sound": False},
    "real": {"semantics": "real"},
    "float32": {"semantics": "float32"},
}
COLUMNS = {
    "certificates": "{contender}",
    "ms": "{ms:.4g}",
    "[quartiles]": "[{ms_q1:.4g}, {ms_q3:.4g}]",
    "ratio": "{fused_ratio:.3f}",
    "verified": "{verified}",
    "of": "{examples}",
}
GROWTH = {
    "ReLU": "{layer}",
    "inputs of a sum": "{products}",
    "mean width": "{width:.4g}",
    "real": "{real:.2e}",
    "float32": "{float32:.2e}",
}
AUDIT = {
    "certificates": "{semantics}",
    "confirmed": "{confirmed}",
    "refuted": "{refuted}",
    "fractions": "{fractions}",
    "slack, median": "{slack_median:.2e}",
    "greatest": "{slack_greatest:.2e}",
    "s": "{seconds}",
}
Problem = tuple[Config, nn.Sequential, Tensor, Tensor]  # with x [N, ...] and y [N]


def trained(name: str, options: argparse.Namespace) -> Problem:
    """Returns a run of results/, with the examples of its test set."""
    config, model = runs.read_config(RESULTS / name), runs.read_model(RESULTS / name).eval()
    split = datasets.load(config.dataset, options.data_root).test[: options.examples]
    return config, model, runs.to_input(config)(split.pixels()), split.labels


def fresh(name: str, options: argparse.Namespace) -> Problem:
    """Returns a preset's network with new weights, and random images, whose labels are right."""
    torch.manual_seed(0)
    config = preset(name)
    model = runs.build_model(config).eval()
    pixels = torch.rand(options.fresh_examples, *datasets.INPUT_SHAPES[config.dataset])
    x = runs.to_input(config)(pixels)
    with torch.no_grad():
        return config, model, x, model(x).argmax(1)


def timed(name: str, make: Callable[..., Problem], options: argparse.Namespace) -> list[Row]:
    config, model, x, y = make(name, options)

    def maker(kind: str) -> tuple[timing.Call, Row]:
        call = partial(cf.certify, model, x, y, config.eps, config.clip, **KINDS[kind])  # type: ignore[arg-type]
        return call, {"verified": int(call().verified.sum())}

    makers = {(kind, ""): partial(maker, kind) for kind in KINDS}
    facts = {"network": name, "trained": make is trained, "examples": len(x)}
    timer = timing.timer(x.device)
    rows = timing.interleaved(makers, timer, options.rounds, "ordinary")
    return [facts | row for row in rows]


def noted(
    measure: Callable[..., list[Row]], name: str, *rest: Callable[..., Problem] | argparse.Namespace
) -> list[Row]:
    try:
        return measure(name, *rest)
    except timing.USER_ERRORS as error:  # a data set that is not there must not stop the others
        return [{"network": name, "note": timing.line(error)}]


def growth(name: str, options: argparse.Namespace) -> list[Row]:
    config, model, x, _ = trained(name, options)
    x, rows = x[:100], []
    ball = boxes(x, config.eps, config.clip)
    box = widened(Box(ball.lower, ball.upper))
    wide = cf.Interval.ball(x.double(), config.eps, config.clip, validate=False)
    layers = list(model)
    for place, layer in enumerate(layers):
        if not isinstance(layer, nn.ReLU):
            continue
        part = nn.Sequential(*layers[: place + 1], nn.Flatten())
        with torch.no_grad():
            features = part(x).shape[1]
            right = part.double()(wide)
            width = (right.upper - right.lower).mean().item()
            whole = nn.Sequential(*part, nn.Linear(features, 2)).float()
            fused = of_torch_alone(whole, x)
            assert fused is not None
            found = {}
            for kind in ("real", "float32"):
                lower, upper, _ = fused._sound_features(kind, x, box.lower, box.upper)
                if width:  # where all units are dead there is none
                    found[kind] = (upper - lower).double().mean().item() / width - 1
        products = layers[place - 1].weight[0].numel()
        facts = {"network": name, "layer": len(rows) + 1, "products": products, "examples": len(x)}
        rows.append(facts | timing.rounded({"width": width, **found}))
    return rows


def audits(name: str, options: argparse.Namespace) -> list[Row]:
    rows = []
    network = runs.read_network(RESULTS / name)
    split = datasets.load(network.config.dataset, options.data_root).test[: options.examples]
    for semantics in ("real", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            with redirect_stdout(io.StringIO()):
                result = certification.certify_to(Path(folder), network, split, semantics)
            words = [sys.executable, "-I", check_certificates.__file__, folder, "--sample", "0"]
            done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode > 1:
            raise ValueError(f"the checker says: {done.stderr}")
        *_, counts, slack, time = done.stdout.splitlines()
        confirmed, refuted, open_, fractions = map(int, re.findall(r"\d+", counts))
        median, greatest = (float(word) for word in re.findall(r"[\d.]+(?:e-?\d+)?", slack))
        found = {"confirmed": confirmed, "refuted": refuted, "without_a_claim": open_}
        found |= {"fractions": fractions, "slack_median": median, "slack_greatest": greatest}
        facts = {"network": name, "semantics": semantics, "eps": network.config.eps}
        facts |= {"verified": result["verified"], "examples": result["examples"]}
        seconds = {"seconds": float(time.split(" in ")[1].split()[0])}
        rows.append(facts | found | seconds | {"sha256": result["certificates"]["sha256"]})
    return rows


def run(options: argparse.Namespace) -> None:
    names = sorted(path.parent.name for path in RESULTS.glob("*/model.safetensors"))
    names = [name for name in names if options.networks is None or name in options.networks]
    options.device = "cpu"  # where sound certificates are computed
    where = machine.conditions(options)

    def cases() -> Iterator[tuple[str, Callable[[], list[Row]]]]:
        for name in names:
            yield name, partial(noted, timed, name, trained, options)
        for name in options.presets:
            yield f"{name}, fresh weights", partial(noted, timed, name, fresh, options)

    timing.collect(cases(), where, options.output, COLUMNS)
    if options.widths:
        table = ((name, partial(noted, growth, name, options)) for name in names)
        timing.collect(table, where, options.widths, GROWTH)
    if options.audits:
        checked = ((name, partial(noted, audits, name, options)) for name in names)
        timing.collect(checked, where, options.audits, AUDIT)


script = timing.Script(
    "certificates",
    __doc__,
    "--data-root data --rounds 5 --widths bench/results/widths.csv",
    run,
    presets=["mnist-medium-0.4-cibp", "cifar10-medium-8of255-cibp"],
    rounds=9,
    output=None,
)
script.option("--networks", None, "only these folders of results/", nargs="*", metavar="NAME")
script.option("--data-root", None, "folder of the data sets", type=Path, metavar="DIR")
script.option("--examples", None, "of each test set (default: all)", type=number(1))
script.option("--fresh-examples", 1000, "random images of --presets", type=number(1))
script.option("--audits", None, "also check all certificates, table", type=Path, metavar="CSV")
script.option("--widths", None, "also write the table of widths there", type=Path, metavar="CSV")

if __name__ == "__main__":
    sys.exit(script.main())
