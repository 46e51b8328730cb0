"""Writes the figures of README.md from the committed results; --check only compares.

    python bench/update_readme.py [--check]

Each section between `<!-- NAME: ... -->` and `<!-- end NAME -->` is made anew: "quickstart" from
the runs in results/quickstart, "runs" from the others in results, "layers" and "loop" from
bench/results.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"IBP": "mnist5k-small-0.1-ibp", "constrained IBP": "mnist5k-small-0.1-cibp"}


def quickstart() -> list[str]:
    folder = ROOT / "results" / "quickstart"
    results = {
        label: json.loads((folder / name / "result.json").read_text())
        for label, name in RUNS.items()
    }
    first = next(iter(results.values()))
    lines = [
        "`make quickstart` trains the paper's small network on 4,000 digits and evaluates it on",
        f"1,000 others, at radius eps {first['eps']:g} (seed {first['seed']}):",
        "",
        f"| method | test error | PGD error ({first['pgd_steps']} steps) | verified error | time |",
        "|---|---|---|---|---|",
    ]
    for label, result in results.items():
        test, pgd, verified = (
            f"{100 * result[f'{kind}_error']:.1f} %" for kind in ("test", "pgd", "verified")
        )
        lines.append(f"| {label} | {test} | {pgd} | {verified} | {result['seconds']:.0f} s |")
    machine = first["hardware"]
    return [
        *lines,
        "",
        "![Errors and bound widths by epoch](results/quickstart/quickstart.png)",
        "",
        f"Measured on {machine['threads']} threads of an {machine['cpu']} ({machine['kernels']}), "
        f"torch {first['versions']['torch']}; runs in `results/quickstart`.",
    ]


# Runs in results/, and what the paper's Table 2 prints for them: test, PGD and verified error in %.
FULL_RUNS = {
    "mnist-small-0.4-ibp-seed0": "2.62 / 14.14 / 20.74",
    "mnist-small-0.4-cibp-seed0": "7.24 / 17.24 / 21.31",
    "mnist-small-0.4-cibp-seed1": "7.24 / 17.24 / 21.31",
    "fashion_mnist-small-0.1-cibp-seed0": "",
    "cifar10-small-8of255-cibp-normalized-seed0": "47.22 / 56.14 / 60.12, after 350 epochs",
}


def full_runs() -> list[str]:
    lines = [
        "| run | steps (epochs) | test | PGD | verified error | the paper's | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, paper in FULL_RUNS.items():
        folder = ROOT / "results" / name
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        steps, time = f"{last['step']:,} ({last['epoch']})", last["seconds"]
        errors = {"test": last["test_error"], "pgd": None, "verified": last["verified_error"]}
        if (folder / "result.json").exists():
            result = json.loads((folder / "result.json").read_text())
            errors = {kind: result[f"{kind}_error"] for kind in errors}
            time = result["train_seconds"]
        else:
            steps += ", stopped"
        cells = ["" if error is None else f"{100 * error:.2f} %" for error in errors.values()]
        lines.append(
            f"| {' | '.join([f'`{name}`', steps, *cells, paper, f'{time / 60:.0f} min'])} |"
        )
    machine = result["hardware"]
    return [
        *lines,
        "",
        f"All {result['examples']:,} test examples; PGD with {result['pgd_steps']} steps and "
        f"{result['pgd_restarts']} restarts. Each on {machine['threads']} thread of an "
        f"{machine['cpu']} ({machine['kernels']}) whose other core was busy too, torch "
        f"{result['versions']['torch']}; the presets, with `--steps` where there are fewer. The "
        "runs are in `results`.",
        "",
        *unsettled(),
    ]


def unsettled() -> list[str]:
    """How the two seeds of constrained IBP on MNIST end, from their metrics."""
    errors = [
        [
            100 * json.loads(line)["verified_error"]
            for line in (ROOT / "results" / f"mnist-small-0.4-cibp-seed{seed}" / "metrics.jsonl")
            .read_text()
            .splitlines()
        ]
        for seed in (0, 1)
    ]
    jumps = [after - before for before, after in zip(errors[0], errors[0][1:], strict=False)]
    lost = jumps.index(max(jumps)) + 1  # the epoch before the worst
    late = errors[1][40:]
    return [
        "The paper's learning rate for MNIST is constant, and constrained IBP does not settle "
        f"under it: seed 0 went from {errors[0][lost - 1]:.1f} % verified error after epoch {lost} "
        f"to {errors[0][lost]:.1f} % after the next, and seed 1 was anywhere from "
        f"{min(late):.1f} to {max(late):.1f} % after its last {len(late)} epochs, with a median of "
        f"{statistics.median(late):.1f} %.",
    ]


def layers() -> list[str]:
    with (ROOT / "bench" / "results" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["dataset"]), []).append(row)
    lines = [
        "Time of the naive two-pass layer over that of the fused op, each in the better of NCHW",
        "and channels_last: a network's layers together, and in brackets the range of the layers.",
        "",
        "| network, data, batch | forward | forward + backward |",
        "|---|---|---|",
    ]
    for (model, dataset), group in groups.items():
        cells = [f"{model} {dataset} {group[0]['batch']}"]
        for kind in ("forward", "training"):
            chosen = [row for row in group if row["pass"] == kind]
            fused, naive = (
                sum(float(row[f"{name}_ms"]) for row in chosen) for name in ("fused", "naive")
            )
            ratios = [float(row["ratio"]) for row in chosen]
            cells.append(f"{naive / fused:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    where = rows[0]
    return [
        *lines,
        "",
        f"{where['cpu']}, {where['isa']} kernels, {where['threads']} threads, torch "
        f"{where['torch']}, {where['date']}: `{where['command']}`. Every layer is in "
        "`bench/results/layers.csv`.",
    ]


def loop() -> list[str]:
    with (ROOT / "bench" / "results" / "loop.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = [
        "What the training loop of `cibp-fast train` costs beside the step itself (loss, backward "
        "pass, Adam):",
        "",
        "| preset | examples a second | data, augmentation | logging | writing | rest | outside |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = [f"{100 * float(row[part]):.2f} %" for part in PARTS_OUTSIDE]
        outside = f"{100 * (1 - float(row['step'])):.2f} %"
        cells = [f"`{row['preset']}`", f"{float(row['examples_per_s']):.0f}", *shares, outside]
        lines.append(f"| {' | '.join(cells)} |")
    where = rows[0]
    return [
        *lines,
        "",
        f"{where['repeats']} epochs of {where['epoch_steps']} steps without their evaluation, in "
        f"{'processor' if where['clock'] == 'cpu' else 'wall'} time, threads: {where['threads']} "
        f"of an {where['cpu']} ({where['kernels']}), torch {where['torch']}, "
        f"{where['date']}: `{where['command']}`.",
    ]


PARTS_OUTSIDE = ("data", "logging", "writing", "other")

SECTIONS: dict[str, Callable[[], list[str]]] = {
    "quickstart": quickstart,
    "runs": full_runs,
    "layers": layers,
    "loop": loop,
}


def updated(text: str) -> str:
    """README text with every section made anew."""
    for name, make in SECTIONS.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end {name} -->)"
        body = "\n".join(make())

        def section(match: re.Match[str], body: str = body) -> Any:
            return f"{match[1]}\n{body}\n\n{match[2]}"

        text, count = re.subn(pattern, section, text, flags=re.DOTALL)
        if count != 1:
            sys.exit(f"README.md must have one section {name}, found {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fail where README.md is out of date")
    options = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    new = updated(text)
    if options.check and new != text:
        sys.exit("README.md is out of date: python bench/update_readme.py")
    if not options.check:
        path.write_text(new)


if __name__ == "__main__":
    main()
