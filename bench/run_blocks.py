"""The blocks of README.md and docs that are made from the runs in results, and from the presets."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claims import claims as claimed
from tables import table

from cibp_fast.training import presets, reproduction
from cibp_fast.training.reproduction import ERRORS

RESULTS = Path(__file__).resolve().parent.parent / "results"
QUICKSTART = {"IBP": "mnist5k-small-0.1-ibp", "constrained IBP": "mnist5k-small-0.1-cibp"}
NO_DATA = ("svhn",)  # data sets that were never at hand


def json_of(path: Path) -> dict[str, Any]:
    text = path.read_text()
    return json.loads(text.splitlines()[-1] if path.suffix == ".jsonl" else text)


def quickstart() -> list[str]:
    folder = RESULTS / "quickstart"
    results = {name: json_of(folder / run / "result.json") for name, run in QUICKSTART.items()}
    first = results["IBP"]
    machine = first["hardware"]
    body = [
        [
            name,
            *(f"{100 * found[f'{each}_error']:.1f} %" for each in ERRORS),
            f"{found['seconds']:.0f} s",
        ]
        for name, found in results.items()
    ]
    pgd = f"PGD error ({first['pgd_steps']} steps)"
    return [
        "`make quickstart` trains the paper's small network on 4,000 digits and evaluates it on",
        f"1,000 others, at radius eps {first['eps']:g} (seed {first['seed']}):",
        "",
        *table(["method", "test error", pgd, "verified error", "time"], body),
        "![Errors and bound widths by epoch](results/quickstart/quickstart.png)",
        "",
        f"Measured on {machine['threads']} threads of an {machine['cpu']} ({machine['kernels']}), "
        f"torch {first['versions']['torch']}; runs in `results/quickstart`.",
    ]


def table2() -> list[str]:
    found = reproduction.look_all(reproduction.TABLE, 0, RESULTS)
    return reproduction.table_markdown(reproduction.table_rows(found, NO_DATA))


def claims() -> list[str]:
    rows = claimed(RESULTS)
    return table(["the paper's claim of constrained IBP", "measured", "verdict"], rows)[:-1]


def runs() -> list[str]:
    rows, used = [], []
    for folder in sorted(path.parent for path in RESULTS.glob("*/result.json")):
        last, result = json_of(folder / "metrics.jsonl"), json_of(folder / "result.json")
        errors = " / ".join(f"{100 * result[f'{each}_error']:.2f}" for each in ERRORS)
        machine = result["hardware"]
        where = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}, {machine['kernels']}"
        time = f"{result['train_seconds'] / 60:.0f} min"
        rows.append(
            [f"`{folder.name}`", f"{last['step']:,} ({last['epoch']})", errors, time, where]
        )
        used.append((machine["cpu"], result["versions"]["torch"], result["pgd_steps"]))
    cpus, versions, steps = (
        sorted({str(each) for each in column}) for column in zip(*used, strict=True)
    )
    head = ["run", "steps (epochs)", "test / PGD / verified error in %", "training", "on"]
    return [
        *table(head, rows),
        f"Whole test sets; PGD with {' or '.join(steps)} steps. {' or '.join(cpus)}, torch "
        f"{' or '.join(versions)}.",
    ]


def recipes() -> list[str]:
    sources: list[str] = []
    rows = []
    for setting in presets.SETTINGS:
        if setting.source not in sources:
            sources.append(setting.source)
        start, end = setting.warm_up, setting.warm_up + setting.growth
        steps, size = setting.attack
        for method, (l1, alpha) in setting.coefficients.items():
            attacked = method in presets.ATTACKED
            eps = "EPS" if setting.eps == "any" else setting.eps
            attack = f"{steps} x {size:g}" + f", {setting.attack_ratio:g} x" * (
                setting.attack_ratio != 1
            )
            rows.append(
                [
                    f"`{setting.dataset}-NET-{eps}-{method}`",
                    f"{setting.epochs} of {setting.examples // setting.batch_size} x "
                    f"{setting.batch_size}",
                    f"{start}-{end}",
                    " ".join(map(str, setting.decays)),
                    f"{setting.train_ratio:g}",
                    f"{alpha:g}" if attacked else "-",
                    f"{l1:g}",
                    f"{setting.regularizer:g}",
                    attack if attacked else "-",
                    setting.statistics if attacked else "clean",
                    str(sources.index(setting.source) + 1),
                ]
            )
    head = [
        *("preset", "epochs of steps x examples", "eps grows in epochs", "lr / 5 after"),
        *("`eps_train_ratio`", "`alpha`", "`l1`", "`regularizer`", "attack, radius"),
        *("`statistics`", "source"),
    ]
    numbered = [f"{number}. {source}." for number, source in enumerate(sources, start=1)]
    return [*table(head, rows), "Sources:", "", *numbered]


def recipe_runs() -> list[str]:
    """Makes a table for each data set, radius, width and length that `cnn7` or `resnet` has run."""
    groups: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for folder in sorted(path.parent for path in RESULTS.glob("*/result.json")):
        config, result = json_of(folder / "config.json"), json_of(folder / "result.json")
        if config["net"] in ("cnn7", "resnet"):
            epochs = json_of(folder / "metrics.jsonl")["epoch"]
            title = (
                f"`{config['dataset']}`, `{config['net']}` of width {config['net_width']}, eps "
                f"{config['eps']:g}, {epochs} epochs, {result['examples']:,} test examples:"
            )
            weight = 0 if config["method"] == "cibp" else config["width_weight"]
            method = config["method"] + (f", `width_weight` {weight:g}" if weight else "")
            groups[title][method].append(folder)
    head = ["method", "test / PGD / verified error in %", "seeds", "steps", "minutes at least"]
    order = {name: place for place, name in enumerate(("ibp", "cibp", *presets.FIELD))}
    lines: list[str] = []
    for title, methods in groups.items():
        rows, means = [], {}
        for method in sorted(methods, key=lambda each: (order[each.partition(",")[0]], each)):
            results = [json_of(folder / "result.json") for folder in methods[method]]
            found = {error: reproduction.mean_and_spread(results, error) for error in ERRORS}
            means[method] = {error: each["mean"] for error, each in found.items()}
            errors = " / ".join(map(reproduction.as_text, found.values()))
            minutes = min(result["train_seconds"] for result in results) / 60
            steps = json_of(methods[method][0] / "metrics.jsonl")["step"]
            rows.append([method, errors, str(len(results)), f"{steps:,}", f"{minutes:.0f}"])
        lines += [title, "", *table(head, rows), *width_term(means)]
    return lines[:-1]


def width_term(means: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Says what the width term adds to Shi's recipe, where both have run."""
    lines = []
    for method, more in means.items():
        if method.startswith("shi,") and "shi" in means:
            by = {error: more[error] - means["shi"][error] for error in ("verified", "test")}
            words = {
                error: f"{abs(each):.2f} points {'more' if each > 0 else 'less'} {error} error"
                for error, each in by.items()
            }
            weight = method.rpartition(" ")[2]
            lines += [
                f"A width term of weight {weight} gives Shi's recipe {words['verified']} and "
                f"{words['test']}.",
                "",
            ]
    return lines
