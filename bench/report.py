"""Writes the figures of README.md from the committed results; --check only compares.

    python bench/update_readme.py [--check]

Each section between `<!-- NAME: ... -->` and `<!-- end NAME -->` is made anew: "quickstart" from
the runs in results/quickstart, "runs" from the others in results, the rest from bench/results,
where the charts step.png and precisions.png are drawn too. "gpu" takes what there is of gpu_*.csv.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
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
    "mnist-small-0.4-cibp-decay-seed0": "7.24 / 17.24 / 21.31",
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
        f"{result['versions']['torch']}; the presets, with `--steps` where there are fewer, and "
        "with `--lr-decay-at 15000,25000` in the one named decay. The times are rough: some runs "
        "were halted now and then. The runs are in `results`.",
        "",
        *learning_rate(),
    ]


def learning_rate() -> list[str]:
    """How constrained IBP on MNIST ends under either learning rate, from the metrics."""

    def verified(run: str) -> list[float]:
        lines = (ROOT / "results" / run / "metrics.jsonl").read_text().splitlines()
        return [100 * json.loads(line)["verified_error"] for line in lines]

    first, second, decayed = (
        verified(f"mnist-small-0.4-cibp-{run}") for run in ("seed0", "seed1", "decay-seed0")
    )
    jumps = [after - before for before, after in pairwise(first)]
    lost = jumps.index(max(jumps)) + 1  # the epoch before the worst
    late = slice(40, None)
    return [
        "The paper's learning rate for MNIST is constant, and constrained IBP does not settle "
        f"under it: seed 0 went from {first[lost - 1]:.1f} % verified error after epoch {lost} "
        f"to {first[lost]:.1f} % after the next and stayed there, and seed 1 was anywhere from "
        f"{min(second[late]):.1f} to {max(second[late]):.1f} % after its last "
        f"{len(second[late])} epochs, with a median of {statistics.median(second[late]):.1f} %. "
        "With the rate lowered at steps 15,000 and 25,000, as Gowal et al. do, seed 0 was between "
        f"{min(decayed[late]):.1f} and {max(decayed[late]):.1f} % after each of these epochs.",
    ]


RESULTS = ROOT / "bench" / "results"
RIVALS = {
    "fast": '`precision="fast"`',
    "naive": "two-pass eager",
    "four": "four products",
    "compile": "torch.compile",
    "auto_lirpa": "auto_LiRPA",
    "naive_bf16": "two-pass, bf16 autocast",
    "layers": "`cf.bounds`",
}
STEP_TABLES = ("step", "step_avx512")  # each measured on another processor


def performance() -> list[str]:
    tables = step_tables()
    lines = [
        "A training step of `cf.fuse` (nominal and interval pass, constrained IBP loss, backward "
        "pass), and how many times",
        "as long the others take (below 1: less long); in brackets with fused Adam. Each in the "
        "better of NCHW and channels_last.",
        "Every processor has a table of its own, since the ratios depend on it, those of bf16 "
        "autocast most.",
        "",
    ]
    for name, rows in tables.items():
        lines += step_table(name, rows)
    memory = any(row["rss_bytes"] for rows in tables.values() for row in rows)
    return [
        *lines,
        "![Speed against the two-pass eager step](bench/results/step.png)",
        "",
        "Effective GFLOP/s count the FLOPs of direct products, the same for all, and are compared "
        "with the machine's peak, multiply-adds between registers. Where Winograd's convolutions "
        '(`"fast"`) do fewer products, they can be above the peak, and are no share of it. Each '
        "step was checked against a float64 step before it was timed. Saved is what autograd keeps "
        "for the backward pass"
        + (", peak what a step adds to the process's memory." if memory else "."),
    ]


def step_tables() -> dict[str, list[dict[str, str]]]:
    """The rows of step.csv and, where it was measured, of step_avx512.csv."""
    return {name: read(name) for name in STEP_TABLES if (RESULTS / f"{name}.csv").exists()}


def step_table(name: str, rows: list[dict[str, str]]) -> list[str]:
    """The lines of one processor."""
    where = rows[0]
    contenders = RIVALS | {"naive_bf16": f"{RIVALS['naive_bf16']} ({bf16_units(where)})"}
    memory = {"saved_bytes": 'saved MiB, `"fast"`, two-pass'}
    if any(row["rss_bytes"] for row in rows):
        memory["rss_bytes"] = 'peak MiB, `"fast"`, two-pass'
    found = step_results(name, rows)
    speeds = [alone["naive_bf16"]["ratio"] for alone, _ in found.values()]
    bf16 = sorted(float(speed) for speed in speeds if speed)
    lines = [
        f"**{where['cpu']}, {where['isa']} kernels, {bf16_units(where)}.**"
        + (
            f" bf16 autocast has {bf16[0]:.2f} to {bf16[-1]:.2f} times the speed of the two-pass "
            "step in float32 here."
            if bf16
            else ""
        ),
        "",
        "| network, data, batch | ms | effective GFLOP/s (over the peak) "
        f"| {' | '.join((*contenders.values(), *memory.values()))} |",
        f"|{'---|' * (len(contenders) + len(memory) + 3)}",
    ]
    for problem, (alone, adam) in found.items():
        fused = alone["fused"]
        cells = [" ".join(problem), f"{time(fused)} ({time(adam['fused'])})", effective(fused)]
        for contender in contenders:
            times = [results[contender]["fused_ratio"] for results in (alone, adam)]
            cells.append(
                "{:.2f} ({:.2f})".format(*map(float, times)) if all(times) else "not timed"
            )
        for key in memory:
            each = (fused, alone["fast"], alone["naive"])
            cells.append(", ".join(mebibytes(row[key]) for row in each))
        lines.append(f"| {' | '.join(cells)} |")
    notes = sorted({f"`{row['contender']}`: {row['note']}" for row in rows if row["note"]})
    return [
        *lines,
        "",
        "".join(f"Not timed: {note}. " for note in notes)
        + f"Peak {float(where['peak_gflops']):.0f} GFLOP/s. Medians of {where['rounds']} "
        f"interleaved rounds, {where['clock']} time, {machine(where)}, torch {where['torch']}, "
        f"{where['date']}: `{where['command']}`. All figures are in `bench/results/{name}.csv`.",
        "",
    ]


def machine(row: dict[str, str]) -> str:
    return f"threads: {row['threads']} of an {row['cpu']} ({row['isa']} kernels)"


def bf16_units(row: dict[str, str]) -> str:
    """Says whether the processor multiplies bfloat16 numbers.

    Older tables do not record it; kernels for AVX2 ran where the processor had no AVX-512 at all.
    """
    recorded = row.get("avx512_bf16") or ("unknown" if row["isa"] == "avx512" else "False")
    texts = {"True": "with AVX512_BF16", "False": "without AVX512_BF16"}
    return texts.get(recorded, "AVX512_BF16 unknown")


def effective(row: dict[str, str]) -> str:
    if not row["ms"]:
        return "not timed"
    return f"{float(row['effective_gflops']):.0f} ({float(row['effective_to_peak']):.2f})"


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


Results = dict[str, dict[str, str]]  # contender: its row in its better memory format


def step_results(
    table: str, rows: list[dict[str, str]]
) -> dict[tuple[str, ...], tuple[Results, Results]]:
    """By network, data set and batch: the results without and with Adam."""
    found: dict[tuple[str, ...], tuple[Results, Results]] = {}
    for row in rows:
        results = found.setdefault((row["model"], row["dataset"], row["batch"]), ({}, {}))
        own = results[row["optimizer"] == "adam"]
        best = own.get(row["contender"])
        if best is None or float(row["ms"] or "inf") < float(best["ms"] or "inf"):
            own[row["contender"]] = row
    for problem, results in found.items():
        missing = {"fused", *RIVALS} - set(results[0])
        if missing:
            sys.exit(f"{table}.csv: {' '.join(problem)} lacks {', '.join(sorted(missing))}")
    return found


def time(row: dict[str, str]) -> str:
    if not row["ms"]:
        return "not timed"
    return three_digits(float(row["ms"]))


def three_digits(value: float) -> str:
    """At least three, without an exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def mebibytes(text: str) -> str:
    return f"{int(text) / 2**20:.1f}" if text else "-"


def draw_step(figure: Any) -> None:
    """The speed of each contender relative to the two-pass eager step.

    A row a processor, a panel a network in it, and a bar with its value a contender: ours are in
    the shades of constrained IBP, which all of them train with, and the others are grey.
    """
    from matplotlib.patheffects import withStroke

    from cibp_fast.training.plotting import GREY, TITLE

    halo = [withStroke(linewidth=2.5, foreground="white")]
    tables = {name: (rows, step_results(name, rows)) for name, rows in step_tables().items()}
    names = {"fused": "cf.fuse", **{name: text.replace("`", "") for name, text in RIVALS.items()}}
    order = ("fused", "fast", "layers", *(name for name in names if name not in OURS))
    shades = precision_colours()
    colours = {"fused": shades["float32"], "fast": shades["fast"], "layers": shades["layers"]}
    most = max(
        float(row["ratio"] or 0)
        for _, results in tables.values()
        for alone, _ in results.values()
        for row in alone.values()
    )
    figure.set_size_inches(13, 0.5 + 3 * len(tables))
    figure.suptitle("A training step with constrained IBP: speed, two-pass eager = 1", **TITLE)
    subfigures = figure.subfigures(len(tables), 1, squeeze=False).flat
    for subfigure, (rows, results) in zip(subfigures, tables.values(), strict=True):
        where = rows[0]
        subfigure.suptitle(f"{where['cpu']}, {where['isa']} kernels, {bf16_units(where)}")
        panels = subfigure.subplots(1, len(results), sharey=True, squeeze=False).flat
        for axes, (problem, (alone, _)) in zip(panels, results.items(), strict=True):
            for place, name in enumerate(order):
                ratio = float(alone[name]["ratio"] or 0)
                axes.barh(place, ratio, 0.8, color=colours.get(name, GREY))
                text = f"{ratio:.2f}" if ratio else "not timed"
                axes.text(
                    ratio + 0.03 * most, place, text, va="center", fontsize=9, path_effects=halo
                )
            axes.axvline(1, color="dimgrey", linewidth=0.8, zorder=0)
            axes.set_xlim(0, 1.3 * most)
            axes.set_title("\n".join((" ".join(problem[:2]), f"batch {problem[2]}")), fontsize=11)
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(order)), [names[name] for name in order], fontsize=10)
        panels[0].invert_yaxis()


OURS = ("fused", "fast", "layers")


def precision_colours() -> dict[str, str]:
    """Shades of constrained IBP's colour: of its trainings in either precision, of `cf.bounds`."""
    from cibp_fast.training.plotting import METHOD_COLOURS, SHADES, shade

    names = ("float32", "fast", "layers")
    return {
        name: shade(METHOD_COLOURS["cibp"], depth)
        for name, depth in zip(names, SHADES, strict=True)
    }


def batches() -> list[str]:
    rows = [row for row in read("batch") if row["optimizer"] == "none"]
    by_network: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        own = by_network.setdefault((row["model"], row["dataset"]), {})
        own[int(row["batch"])] = f"{float(row['ms_per_gflop']):.1f}"
    sizes = sorted({size for own in by_network.values() for size in own})
    where = rows[0]
    return [
        "Milliseconds a GFLOP (of direct products) of the same step of `cf.fuse`, by batch size:",
        "",
        f"| network | {' | '.join(f'{size:,}' for size in sizes)} |",
        f"|{'---|' * (len(sizes) + 1)}",
        *(
            f"| {' '.join(network)} | {' | '.join(own.get(size, '') for size in sizes)} |"
            for network, own in by_network.items()
        ),
        "",
        f"Medians of {where['rounds']} rounds, {machine(where)}, {where['date']}: "
        f"`{where['command']}`.",
    ]


def channels() -> list[str]:
    rows = [row for row in read("channels") if row["optimizer"] == "none"]
    names = {"fused": "`cf.fuse`", **{name: RIVALS[name] for name in ("fast", "naive")}}
    best: dict[tuple[str, int], float] = {}  # ms a GFLOP in the better memory format
    for row in rows:
        key = row["contender"], int(row["dataset"].partition("x")[0])
        best[key] = min(best.get(key, math.inf), float(row["ms_per_gflop"]))
    counts = sorted({count for _, count in best})
    where = rows[0]
    _, height, width = where["dataset"].split("x")
    return [
        "Milliseconds a GFLOP (of direct products), by channel count: two 3x3 convolutions of as "
        f"many channels as the images have, and a linear layer, on {where['batch']} images of "
        f"{height}x{width}:",
        "",
        f"| channels | {' | '.join(map(str, counts))} |",
        f"|{'---|' * (len(counts) + 1)}",
        *(
            f"| {text} | {' | '.join(three_digits(best[name, count]) for count in counts)} |"
            for name, text in names.items()
        ),
        "",
        f"Medians of {where['rounds']} interleaved rounds, {machine(where)}, {where['date']}: "
        f"`{where['command']}`.",
    ]


def comparisons() -> dict[str, Any]:
    """By preset: the `Comparison` of its two precisions."""
    from precision import Comparison

    rows = read("precisions")
    presets = dict.fromkeys(row["preset"] for row in rows)
    return {name: Comparison.of([row for row in rows if row["preset"] == name]) for name in presets}


def precisions() -> list[str]:
    found = comparisons()
    _, seeds, _ = next(iter(found.values())).curves.shape
    steps = next(iter(found.values())).steps
    lines = [
        f'The loss over the first {steps[-1]:,} steps of training in float32 and with `"fast"`, '
        f"{seeds} seeds each, as means over windows of {steps[0]} steps; at the end, mean and "
        "standard deviation over the seeds:",
        "",
        '| preset | float32, at the end | `"fast"` | the same seed\'s curves apart, at most |',
        "|---|---|---|---|",
    ]
    for name, made in found.items():
        ends = [f"{end.mean():.4f} +- {end.std(ddof=1):.4f}" for end in made.curves[:, :, -1]]
        lines.append(f"| `{name}` | {' | '.join(ends)} | {100 * made.same_seed:.2g} % |")
    where = read("precisions")[0]
    return [
        *lines,
        "",
        "![The loss of training in both precisions](bench/results/precisions.png)",
        "",
        *(f"`{name}`: {made.verdict}.\n" for name, made in found.items()),
        "Distances are between mean curves of half of the trainings each, where they are furthest "
        "apart, in standard deviations over the seeds there (pooled over both precisions). A seed "
        f"has the same initial weights and batches in both. T{machine(where)[1:]}, torch "
        f"{where['torch']}, {where['date']}: `{where['command']}`.",
    ]


def draw_precisions(figure: Any) -> None:
    """A panel a preset: mean loss over the seeds of each precision, in a band of their range."""
    from cibp_fast.training.plotting import TITLE

    found = comparisons()
    figure.set_size_inches(11, 4.5)
    panels = figure.subplots(1, len(found), squeeze=False)
    styles: dict[str, Any] = {"float32": "-", "fast": (0, (4, 2))}
    colours = precision_colours()
    for precision, (label, line) in enumerate(styles.items()):
        colour = colours[label]
        for axes, (name, made) in zip(panels.flat, found.items(), strict=True):
            curves = made.curves[precision]
            band = curves.min(axis=0), curves.max(axis=0)
            axes.fill_between(made.steps, *band, color=colour, alpha=0.2, linewidth=0)
            shown = label if axes is panels.flat[0] else None
            axes.plot(made.steps, curves.mean(axis=0), color=colour, linestyle=line, label=shown)
            axes.set_title(name, fontsize=11)
            axes.set_xlabel("step")
    panels.flat[0].set_ylabel("loss")
    seeds = next(iter(found.values())).curves.shape[1]
    title = f"Constrained IBP in both precisions: mean and range of {seeds} seeds"
    figure.suptitle(title, **TITLE)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


def layers() -> list[str]:
    rows = read("layers")
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
    rows = read("loop")
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

# On a GPU: rivals of the graphed step in tf32, and the ways to compute a layer.
GPU_RIVALS = {
    "graphed_cuda_tf32": '`backend="cuda"`',
    "fused_tf32": "`cf.fuse`, eager",
    "naive_tf32": "two-pass eager",
    "naive": "without TF32",
    "naive_tf32_graph": "as CUDA graph",
    "naive_bf16_graph": "bf16, as CUDA graph",
    "compile": "torch.compile",
    "compile_max": "max-autotune",
    "auto_lirpa": "auto_LiRPA",
}
GPU_LAYERS = {
    "kernels_tf32": "our kernels, tf32",
    "kernels_bf16": "bf16",
    "kernels_float32": "float32",
    "fused": "our op, float32",
    "naive_tf32": "two-pass, tf32",
    "naive_bf16": "bf16",
    "naive": "float32",
}


def gpu() -> list[str]:
    steps = [row for name in ("step", "cuda", "compile") for row in read_all(f"gpu_{name}_*")]
    numerics, trainings = read_all("gpu_numerics"), read_all("gpu_training")
    layers = read_all("gpu_layers_*")
    every = [*steps, *numerics, *trainings, *layers]
    if not every:
        return ["Not measured yet: no GPU was at hand. `python bench/gpu.py` measures it."]
    if any(row["gpu"] == "interpreter" for row in every):
        sys.exit("bench/results: gpu_*.csv from the interpreter are no measurements")
    where = every[0]
    for key in ("gpu", "driver", "cuda", "torch", "triton"):
        found = sorted({row[key] for row in every})
        if len(found) > 1:
            sys.exit(f"bench/results: gpu_*.csv must be of one {key}, not of {' and '.join(found)}")
    lines = []
    if numerics:
        passed = sum(not row["note"] for row in numerics)
        skipped = sum(row["note"].startswith("not measured") for row in numerics)
        text = f"{passed} of {len(numerics)} checks of the kernels against float64 passed"
        lines += [f"{text}, {skipped} were not made." if skipped else f"{text}.", ""]
    lines += gpu_steps(steps) + gpu_trainings(trainings) + gpu_layers(layers)
    return [
        *lines,
        f"{where['gpu']}, driver {where['driver']}, CUDA {where['cuda']}, torch {where['torch']}, "
        f"Triton {where['triton']}, {where['date']}: `python bench/gpu.py`. All figures are in "
        "`bench/results/gpu_*.csv`; what is not in the tables was not measured.",
    ]


def read_all(pattern: str) -> list[dict[str, str]]:
    return [row for path in sorted(RESULTS.glob(f"{pattern}.csv")) for row in read(path.stem)]


def gpu_steps(rows: list[dict[str, str]]) -> list[str]:
    if not rows:
        return []
    networks: dict[str, Results] = {}
    for row in rows:
        own = networks.setdefault(f"{row['model']} {row['dataset']} {row['batch']}", {})
        best = own.get(row["contender"])
        if best is None or float(row["ms"] or "inf") < float(best["ms"] or "inf"):
            own[row["contender"]] = row

    def cell(row: dict[str, str] | None, key: str, form: Callable[[float], str]) -> str:
        return "not measured" if row is None or not row[key] else form(float(row[key]))

    lines = [
        "A training step as one CUDA graph, from bytes of images to new parameters, in tf32 (and "
        "bf16, float32); its shares of the speed of a matrix product and of a copy; and how many "
        "times as long it takes with CUDA C++ kernels, and the others with Adam, in the better "
        "memory format, which find their batch ready:",
        "",
        f"| network, data, batch | us | shares | {' | '.join(GPU_RIVALS.values())} "
        "| saved of the naive float32's, bf16 | peak MiB, naive's |",
        f"|{'---|' * (len(GPU_RIVALS) + 5)}",
    ]
    for name, own in networks.items():
        tf32, bf16, float32, naive = (
            own.get(each) for each in ("graphed_tf32", "graphed_bf16", "graphed", "naive")
        )
        times = [cell(each, "ms", lambda ms: f"{1e3 * ms:.3g}") for each in (tf32, bf16, float32)]
        shares = [
            cell(tf32, f"{each}_share", lambda share: f"{100 * share:.0f} %")
            for each in ("matrix", "copy")
        ]
        ratios = [cell(own.get(each), "fused_ratio", "{:.2f}".format) for each in GPU_RIVALS]
        whole = float(naive["saved_bytes"] or "nan") if naive else math.nan
        saved, peaks = (
            [cell(each, key, form) for each in pair]
            for key, form, pair in (
                ("saved_bytes", lambda size, whole=whole: f"{size / whole:.2f}", (tf32, bf16)),
                ("peak_bytes", lambda size: f"{size / 2**20:.0f}", (tf32, own.get("naive_tf32"))),
            )
        )
        cells = [name, f"{times[0]} ({', '.join(times[1:])})", ", ".join(shares), *ratios]
        lines.append(f"| {' | '.join([*cells, ', '.join(saved), ', '.join(peaks)])} |")
    notes = sorted({f"`{row['contender']}`: {row['note']}" for row in rows if row["note"]})
    return [*lines, "", *(f"Not timed: {note}.\n" for note in notes)]


def gpu_trainings(rows: list[dict[str, str]]) -> list[str]:
    if not rows:
        return []
    lines = [
        f"Epochs of `cibp-fast train` in {rows[0]['precision']}, without evaluation; and examples "
        "a second of the evaluation after an epoch and of one start of PGD (without CUDA graphs):",
        "",
        "| preset | images | an epoch | the first one | all, extrapolated | evaluation | PGD |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"`{row['preset']}`", row["images"], f"not timed: {row['note']}", "", ""]
        if not row["note"]:
            whole = f"{float(row['all_epochs']):.0f}: {float(row['all_s']):.1f} s"
            epochs = [f"{float(row[key]):.3g} s" for key in ("epoch_s", "first_epoch_s")]
            cells = [*cells[:2], *epochs, whole]
        for name in ("evaluation", "pgd"):
            both = [row[f"{name}_per_s"], row[f"{name}_eager_per_s"]]
            if all(both):
                cells.append("{:,.0f} ({:,.0f})".format(*map(float, both)))
            else:
                cells.append("not measured")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def gpu_layers(rows: list[dict[str, str]]) -> list[str]:
    from common import layer_count

    if not rows:
        return []
    counts: dict[str, int] = {}  # a table that was not finished lacks layers
    networks: dict[str, dict[str, dict[str, float]]] = {}  # contender, layer: us
    for row in rows:
        if row["pass"] == "training":
            name = f"{row['model']} {row['dataset']} {row['batch']}"
            if name not in counts:
                counts[name] = layer_count(row["model"], row["dataset"])
            own = networks.setdefault(name, {}).setdefault(row["contender"], {})
            time = 1e3 * float(row["ms"] or "inf")
            own[row["layer"]] = min(own.get(row["layer"], math.inf), time)
    lines = [
        "Microseconds of a network's layers together, each alone, forward and backward, as a CUDA "
        "graph on a cold cache, in the better memory format:",
        "",
        f"| network, data, batch | {' | '.join(GPU_LAYERS.values())} |",
        f"|{'---|' * (len(GPU_LAYERS) + 1)}",
    ]
    for name, found in networks.items():
        times = [found.get(each, {}) for each in GPU_LAYERS]
        sums = [sum(own.values()) if len(own) == counts[name] else math.inf for own in times]
        cells = [three_digits(each) if each < math.inf else "not measured" for each in sums]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return [*lines, ""]


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "quickstart": quickstart,
    "runs": full_runs,
    "performance": performance,
    "batches": batches,
    "channels": channels,
    "precisions": precisions,
    "layers": layers,
    "loop": loop,
    "gpu": gpu,
}

# By picture: what draws it, and the tables it shows.
CHARTS: dict[str, tuple[Callable[[Any], None], tuple[str, ...]]] = {
    "step": (draw_step, STEP_TABLES),
    "precisions": (draw_precisions, ("precisions",)),
}


def digest(name: str) -> str:
    """Of the figures; their chart carries it, so that an old chart is seen."""
    paths = [RESULTS / f"{table}.csv" for table in CHARTS[name][1]]
    content = b"".join(path.read_bytes() for path in paths if path.exists())
    return hashlib.sha256(content).hexdigest()


def draw(name: str) -> None:
    """Draws a chart beside its table."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from cibp_fast.training.plotting import STYLE

    with rc_context(STYLE):
        figure = Figure(layout="constrained")
        CHARTS[name][0](figure)
        chart = RESULTS / f"{name}.png"
        figure.savefig(chart, dpi=130, metadata={"Comment": digest(name)})


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
    for name in CHARTS:
        chart = RESULTS / f"{name}.png"
        if not options.check:
            draw(name)
        elif not chart.exists() or digest(name).encode() not in chart.read_bytes():
            sys.exit(f"{chart.name} is out of date: python bench/update_readme.py")
    if not options.check:
        path.write_text(new)


if __name__ == "__main__":
    main()
