"""Writes the generated blocks of README.md, bench/README.md and docs/results.md from the results.

A block stands between `<!-- NAME: ... -->` and `<!-- end NAME -->`, in any of the three.
"quickstart" and "runs" are made from the runs in results, the others from the tables in
bench/results, where the chart step.png is drawn too; "gpu" takes what there is of gpu_*.csv.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timing
from precision import Comparison

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FILES = ("README.md", "bench/README.md", "docs/results.md")

QUICKSTART = {"IBP": "mnist5k-small-0.1-ibp", "constrained IBP": "mnist5k-small-0.1-cibp"}
# Runs in results/, and what the paper's Table 2 prints for them: test, PGD and verified error in %.
RUNS = {
    "mnist-small-0.4-ibp-seed0": "2.62 / 14.14 / 20.74",
    "mnist-small-0.4-cibp-seed0": "7.24 / 17.24 / 21.31",
    "mnist-small-0.4-cibp-seed1": "7.24 / 17.24 / 21.31",
    "mnist-small-0.4-cibp-decay-seed0": "7.24 / 17.24 / 21.31",
    "fashion_mnist-small-0.1-cibp-seed0": "",
    "cifar10-small-8of255-cibp-normalized-seed0": "47.22 / 56.14 / 60.12, after 350 epochs",
}
STEP_TABLES = ("step", "step_avx512")  # each measured on another processor
OURS = {"fused": "`cf.fuse`", "fast": '`precision="fast"`', "layers": "`cf.bounds`"}
BASELINES = {
    "naive": "two-pass eager",
    "four": "four products",
    "compile": "torch.compile",
    "auto_lirpa": "auto_LiRPA",
    "naive_bf16": "two-pass, bf16 autocast",
}
CONTENDERS = OURS | BASELINES
HEADLINE = ("fast", "naive", "compile", "auto_lirpa", "naive_bf16")

Row = Mapping[str, str]
Results = dict[str, dict[str, Row]]  # by network and by contender, in its better memory format


# Reading and writing


def read(pattern: str) -> list[Row]:
    """Returns the rows of all tables in bench/results whose names match; "" where a cell lacks."""
    rows: list[Row] = []
    for path in sorted(RESULTS.glob(f"{pattern}.csv")):
        with path.open() as file:
            rows += [defaultdict(str, row) for row in csv.DictReader(file)]
    return rows


def better(rows: Iterable[Row]) -> Results:
    """Leaves of each contender the row of its better memory format, on a CPU without optimizer."""
    found: Results = {}
    for row in rows:
        if row["optimizer"] == "adam" and not row["gpu"]:  # of older tables
            continue
        own = found.setdefault(network(row), {})
        best = own.get(row["contender"])
        if best is None or float(row["ms"] or "inf") < float(best["ms"] or "inf"):
            own[row["contender"]] = row
    return found


def network(row: Row) -> str:
    return f"{row['model']} {row['dataset']} {row['batch']}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def block(
    about: str, head: Sequence[str], body: Iterable[Sequence[str]], rows: Sequence[Row], file: str
) -> list[str]:
    """Returns what a table is about, the table, and where its rows were measured."""
    rounds = f"Medians of {rows[0]['rounds']} rounds. " if rows[0]["rounds"] else ""
    return [about, "", *table(head, body), f"{rounds}{conditions(rows)}: `{file}`."]


def cell(row: Row | None, key: str, form: str = "{:.2f}", scale: float = 1) -> str:
    if row is None or row[key] == "":
        return "not timed" if row is None or row["note"] else "-"
    return form.format(scale * float(row[key]))


def digits(value: float) -> str:
    """Returns at least three of them, without an exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def time(row: Row | None) -> str:
    return "not timed" if row is None or not row["ms"] else digits(float(row["ms"]))


def mebibytes(row: Row, key: str) -> str:
    return cell(row, key, "{:.1f}", 1 / 2**20)


def conditions(rows: Sequence[Row]) -> str:
    where = rows[0]
    threads = sorted({row["threads"] for row in rows}, reverse=True)
    return (
        f"{where['cpu']}, {where['isa']} kernels, threads: {' and '.join(threads)}, "
        f"torch {where['torch']}, {where['date']}"
    )


def bf16_units(row: Row) -> str:
    """Says whether the processor multiplies bfloat16 numbers.

    Older tables do not record it; kernels for AVX2 ran where the processor had no AVX-512 at all.
    """
    recorded = row["avx512_bf16"] or ("unknown" if row["isa"] == "avx512" else "False")
    texts = {"True": "with AVX512_BF16", "False": "without AVX512_BF16"}
    return texts.get(recorded, "AVX512_BF16 unknown")


def percent(value: float | None, places: int) -> str:
    return "" if value is None else f"{100 * value:.{places}f} %"


def json_of(path: Path) -> dict[str, Any]:
    return json.loads(
        path.read_text().splitlines()[-1] if path.suffix == ".jsonl" else path.read_text()
    )


# Blocks of runs


def quickstart() -> list[str]:
    folder = ROOT / "results" / "quickstart"
    results = {name: json_of(folder / run / "result.json") for name, run in QUICKSTART.items()}
    first = results["IBP"]
    machine, pgd = first["hardware"], first["pgd_steps"]
    errors = ("test_error", "pgd_error", "verified_error")
    return [
        "`make quickstart` trains the paper's small network on 4,000 digits and evaluates it on",
        f"1,000 others, at radius eps {first['eps']:g} (seed {first['seed']}):",
        "",
        *table(
            ["method", "test error", f"PGD error ({pgd} steps)", "verified error", "time"],
            (
                [name, *(percent(found[each], 1) for each in errors), f"{found['seconds']:.0f} s"]
                for name, found in results.items()
            ),
        ),
        "![Errors and bound widths by epoch](results/quickstart/quickstart.png)",
        "",
        f"Measured on {machine['threads']} threads of an {machine['cpu']} ({machine['kernels']}), "
        f"torch {first['versions']['torch']}; runs in `results/quickstart`.",
    ]


def runs() -> list[str]:
    rows, result = [], {}
    for name, paper in RUNS.items():
        folder = ROOT / "results" / name
        last = json_of(folder / "metrics.jsonl")
        result = json_of(folder / "result.json")
        errors = (percent(result[f"{kind}_error"], 2) for kind in ("test", "pgd", "verified"))
        steps = f"{last['step']:,} ({last['epoch']})"
        minutes = f"{result['train_seconds'] / 60:.0f} min"
        rows.append([f"`{name}`", steps, *errors, paper, minutes])
    machine = result["hardware"]
    head = ["run", "steps (epochs)", "test", "PGD", "verified error", "the paper's", "training"]
    return [
        *table(head, rows),
        f"All {result['examples']:,} test examples; PGD with {result['pgd_steps']} steps and "
        f"{result['pgd_restarts']} restarts. Each on {machine['threads']} thread of an "
        f"{machine['cpu']} ({machine['kernels']}), torch {result['versions']['torch']}.",
    ]


# Blocks of tables


def step_tables() -> dict[str, tuple[list[Row], Results]]:
    """Returns rows and results of each processor. Raises ValueError where a contender lacks."""
    found = {name: (read(name), better(read(name))) for name in STEP_TABLES}
    found = {name: each for name, each in found.items() if each[0]}
    for name, (_, results) in found.items():
        for which, own in results.items():
            if missing := sorted(set(CONTENDERS) - set(own)):
                raise ValueError(f"{name}.csv: {which} lacks {', '.join(missing)}")
    return found


def performance() -> list[str]:
    tables = list(step_tables().values())
    processors = [f"{rows[0]['isa']} kernels, {bf16_units(rows[0])}" for rows, _ in tables]
    rows = []
    for name, own in tables[0][1].items():
        each = [results[name] for _, results in tables if name in results]
        cells = [name, " / ".join(time(results["fused"]) for results in each)]
        for other in HEADLINE:
            cells.append(" / ".join(cell(results[other], "fused_ratio") for results in each))
        saved = (mebibytes(own[each], "saved_bytes") for each in ("fused", "fast", "naive"))
        rows.append([*cells, ", ".join(saved)])
    names = [CONTENDERS[each] for each in HEADLINE]
    return [
        "A training step of `cf.fuse` (nominal and interval pass, constrained IBP loss, backward "
        "pass) in milliseconds, and how many times as long the others take (below 1: less long), "
        "each in the better of NCHW and channels_last. "
        + (f"On two processors: {' / '.join(processors)}." if len(tables) > 1 else processors[0]),
        "",
        *table(["network, data, batch", "ms", *names, 'saved MiB, `"fast"`, two-pass'], rows),
        "Saved is what autograd keeps for the backward pass. "
        + "; ".join(conditions(rows) for rows, _ in tables)
        + ". All contenders, memory, batch sizes, layers and what was measured how: "
        "[bench/README.md](bench/README.md).",
    ]


def steps() -> list[str]:
    lines = []
    memory = {"saved_bytes": "saved", "peak_bytes": "peak"}
    for name, (rows, results) in step_tables().items():
        body = []
        for which, own in results.items():
            fused = own["fused"]
            share = cell(fused, "effective_to_peak", "({:.2f})")
            cells = [which, time(fused), f"{cell(fused, 'effective_gflops', '{:.0f}')} {share}"]
            cells += [cell(own[each], "fused_ratio") for each in CONTENDERS if each != "fused"]
            for key in memory:
                each = (mebibytes(own[of], key) for of in ("fused", "fast", "naive"))
                cells.append(", ".join(each))
            body.append(cells)
        head = ["network, data, batch", "ms", "effective GFLOP/s (to peak)"]
        head += [text for each, text in CONTENDERS.items() if each != "fused"]
        head += [f'{text} MiB, `"fast"`, two-pass' for text in memory.values()]
        notes = sorted({f"`{row['contender']}`: {row['note']}" for row in rows if row["note"]})
        lines += [
            f"**{rows[0]['cpu']}, {rows[0]['isa']} kernels, {bf16_units(rows[0])}.**",
            "",
            *table(head, body),
            "".join(f"Not timed: {note}. " for note in notes)
            + f"Peak {float(rows[0]['peak_gflops']):.0f} GFLOP/s. Medians of {rows[0]['rounds']} "
            f"rounds. {conditions(rows)}: `{name}.csv`.",
            "",
        ]
    return [*lines, "![Speed against the two-pass eager step](results/step.png)"]


def batches() -> list[str]:
    rows = [row for row in read("batch") if row["optimizer"] == "none"]
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        own = found.setdefault(f"{row['model']} {row['dataset']}", {})
        own[int(row["batch"])] = cell(row, "ms_per_gflop", "{:.1f}")
    sizes = sorted({size for own in found.values() for size in own})
    body = ([name, *(own.get(size, "") for size in sizes)] for name, own in found.items())
    about = "Milliseconds a GFLOP (of direct products) of the step of `cf.fuse`, by batch size:"
    return block(about, ["network", *(f"{size:,}" for size in sizes)], body, rows, "batch.csv")


def channels() -> list[str]:
    rows = [row for row in read("channels") if row["optimizer"] == "none"]
    best: dict[tuple[str, int], float] = {}  # ms a GFLOP in the better memory format
    for row in rows:
        key = row["contender"], int(row["dataset"].partition("x")[0])
        best[key] = min(best.get(key, math.inf), float(row["ms_per_gflop"]))
    counts = sorted({count for _, count in best})
    body = (
        [CONTENDERS[name], *(digits(best[name, count]) for count in counts)]
        for name in ("fused", "fast", "naive")
    )
    about = (
        "Milliseconds a GFLOP (of direct products), by channel count: two 3x3 convolutions of as "
        f"many channels as the images have, and a linear layer, on {rows[0]['batch']} images of "
        f"{rows[0]['dataset'].partition('x')[2]}:"
    )
    return block(about, ["channels", *map(str, counts)], body, rows, "channels.csv")


def load() -> list[str]:
    rows = [row for row in read("load") if row["format"] in ("", "nchw")]
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = network(row), row["load"], row["threads"]
        found.setdefault(key, {})[row["contender"]] = row
    body = []
    for key, own in found.items():
        times = (f"{time(own[each])} ({spread(own[each])})" for each in ("fused", "naive"))
        body.append([*key, *times, cell(own["fused"], "ratio")])
    head = ["network, data, batch", "busy processes a core", "threads"]
    about = (
        "Milliseconds of a step beside processes that never wait (with quartiles), and how many "
        "times as long the two-pass step takes on as many threads, round by round:"
    )
    head += ["`cf.fuse`", "two-pass eager", "ratio"]
    return block(about, head, body, rows, "load.csv")


def spread(row: Row) -> str:
    return " to ".join(digits(float(row[key])) for key in ("ms_q1", "ms_q3"))


def precisions() -> list[str]:
    rows = read("precisions")
    found = {
        name: Comparison.of([row for row in rows if row["preset"] == name])
        for name in dict.fromkeys(row["preset"] for row in rows)
    }
    steps, curves = next(iter((made.steps, made.curves) for made in found.values()))
    body = (
        [
            f"`{name}`",
            *(f"{end.mean():.4f} +- {end.std(ddof=1):.4f}" for end in made.curves[:, :, -1]),
            f"{100 * made.same_seed:.2g} %",
        ]
        for name, made in found.items()
    )
    head = ["preset", "float32, at the end", '`"fast"`', "the same seed's curves apart, at most"]
    about = (
        f'The loss over the first {steps[-1]:,} steps of training in float32 and with `"fast"`, '
        f"{curves.shape[1]} seeds each, as means over {steps[0]} steps; at the end, mean and "
        "standard deviation over the seeds:"
    )
    return [
        *block(about, head, body, rows, "precisions.csv"),
        "",
        *(f"`{name}`: {made.verdict}.\n" for name, made in found.items()),
        "Distances are between mean curves of half of the trainings each, where they are furthest "
        "apart, in standard deviations over the seeds there (pooled over both precisions).",
    ]


def layers() -> list[str]:
    rows = read("layers")
    best: dict[str, dict[tuple[str, ...], float]] = {}  # network: pass, layer, contender: ms
    for row in rows:
        own = best.setdefault(network(row), {})
        key = row["pass"], row["layer"], row["contender"]
        own[key] = min(own.get(key, math.inf), float(row["ms"] or "inf"))
    body = []
    for name, own in best.items():
        cells = [name]
        for kind in ("forward", "training"):
            pairs = [
                (own[kind, layer, "naive"], ms)
                for (each, layer, contender), ms in own.items()
                if (each, contender) == (kind, "fused")
            ]
            whole = sum(naive for naive, _ in pairs) / sum(fused for _, fused in pairs)
            of_each = [naive / fused for naive, fused in pairs]
            cells.append(f"{whole:.2f} ({min(of_each):.2f} to {max(of_each):.2f})")
        body.append(cells)
    about = (
        "Time of the two-pass layer over that of our op, each in the better of NCHW and "
        "channels_last: a network's layers together, and in brackets the range of the layers:"
    )
    head = ["network, data, batch", "forward", "forward + backward"]
    return block(about, head, body, rows, "layers.csv")


def loop() -> list[str]:
    rows = read("epochs")

    def cells(row: Row) -> list[str]:
        step, data, writing = (float(row[part]) for part in ("step", "data", "writing"))
        shares = (data, writing, 1 - step - data - writing, 1 - step)
        speed = f"{float(row['examples_per_s']):.0f}"
        return [f"`{row['preset']}`", speed, *(percent(share, 2) for share in shares)]

    head = ["preset", "examples a second", "data, augmentation", "writing", "rest", "together"]
    about = (
        "What the training loop of `cibp-fast train` costs beside the step itself (loss, backward "
        f"pass, Adam), as shares of its time; {rows[0]['epochs']} epochs of "
        f"{rows[0]['epoch_steps']} steps without their evaluation:"
    )
    return block(about, head, map(cells, rows), rows, "epochs.csv")


def gpu() -> list[str]:
    rows = read("gpu_*")
    if not rows:
        return ["Not measured yet: no GPU was at hand. `python bench/gpu_session.py` measures it."]
    if any(row["gpu"] == "interpreter" for row in rows):
        raise ValueError("bench/results: gpu_*.csv from the interpreter are no measurements")
    for key in ("gpu", "cuda", "torch", "triton"):
        found = sorted({row[key] for row in rows})
        if len(found) > 1:
            raise ValueError(
                f"bench/results: gpu_*.csv must be of one {key}, not of {' and '.join(found)}"
            )
    lines = []
    if numerics := read("gpu_numerics"):
        passed = sum(not row["note"] for row in numerics)
        skipped = sum(row["note"].startswith("not measured") for row in numerics)
        text = f"{passed} of {len(numerics)} checks of the kernels against float64 passed"
        lines += [f"{text}, {skipped} were not made.", ""]
    steps = better(row for row in rows if row["contender"] and not row["layer"])
    columns = {
        "us": ("ms", "{:,.1f}", 1e3),
        "over `train_step_tf32`": ("fused_ratio",),
        "share of a matrix product's speed": ("effective_to_peak",),
        "of a copy's": ("copy_share",),
        "saved MiB": ("saved_bytes", "{:.1f}", 1 / 2**20),
        "peak MiB": ("peak_bytes", "{:.1f}", 1 / 2**20),
    }
    body = [
        [name, f"`{contender}`", *(cell(row, *each) for each in columns.values())]
        for name, own in steps.items()
        for contender, row in own.items()
    ]
    head = ["network, data, batch", "contender"]
    if body:
        lines += ["Training steps with Adam, in the better memory format:", ""]
        lines += table([*head, *columns], body)
    where = rows[0]
    return [
        *lines,
        f"{where['gpu']}, CUDA {where['cuda']}, torch {where['torch']}, Triton {where['triton']}, "
        f"{where['date']}. Epochs and layers are in `gpu_epochs.csv` and `gpu_layers_*.csv`.",
    ]


BLOCKS = [quickstart, runs, performance, steps, batches, channels, load, precisions, layers, loop]
BLOCKS.append(gpu)


# The chart


def draw(path: Path) -> None:
    """Draws the speed of each contender relative to the two-pass eager step.

    A row a processor, a panel a network in it, and a bar with its value a contender: ours are in
    the shades of constrained IBP, which all of them train with, and the others are grey.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from cibp_fast.training.plotting import GREY, METHOD_COLOURS, SHADES, STYLE, shade

    tables = step_tables()
    colours = [shade(METHOD_COLOURS["cibp"], each) for each in SHADES[: len(OURS)]]
    colours += [GREY] * len(BASELINES)
    with rc_context(STYLE):
        figure = Figure(layout="constrained", figsize=(13, 0.5 + 3 * len(tables)))
        figure.suptitle("A training step with constrained IBP: speed, two-pass eager = 1")
        parts = figure.subfigures(len(tables), 1, squeeze=False).flat
        for part, (rows, results) in zip(parts, tables.values(), strict=True):
            part.suptitle(f"{rows[0]['cpu']}, {rows[0]['isa']} kernels, {bf16_units(rows[0])}")
            panels = part.subplots(1, len(results), sharey=True, squeeze=False).flat
            for axes, (name, own) in zip(panels, results.items(), strict=True):
                speeds = [float(own[each]["ratio"] or 0) for each in CONTENDERS]
                bars = axes.barh([text.replace("`", "") for text in CONTENDERS.values()], speeds)
                for bar, colour in zip(bars, colours, strict=True):
                    bar.set_color(colour)
                texts = [f"{speed:.2f}" if speed else "not timed" for speed in speeds]
                axes.bar_label(bars, texts, padding=3, fontsize=9)
                axes.axvline(1, color="lightgrey", linewidth=0.8, zorder=0)
                axes.set_xlim(0, 4)
                axes.set_title(name, fontsize=11)
            panels[0].invert_yaxis()
        figure.savefig(path, dpi=130, metadata={"Comment": digest().decode()})


def digest() -> bytes:
    """Returns the tables' hash; the chart carries it, so that an old chart is seen."""
    paths = (RESULTS / f"{each}.csv" for each in STEP_TABLES)
    content = b"".join(path.read_bytes() for path in paths if path.exists())
    return hashlib.sha256(content).hexdigest().encode()


def updated(texts: Mapping[str, str]) -> dict[str, str]:
    """Returns the files' texts with every block made anew."""
    found = dict(texts)
    for make in BLOCKS:
        name = make.__name__
        pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end {name} -->)", re.DOTALL)
        count = sum(len(pattern.findall(text)) for text in found.values())
        if count != 1:
            raise ValueError(f"{', '.join(texts)} must have one block {name}, found {count}")
        body = "\n".join(make())
        for file, text in found.items():
            found[file] = pattern.sub(lambda m, body=body: f"{m[1]}\n{body}\n\n{m[2]}", text)
    return found


def run(options: argparse.Namespace) -> None:
    chart = RESULTS / "step.png"
    texts = {file: (ROOT / file).read_text() for file in FILES}
    new = updated(texts)
    if options.check:
        old = [file for file in FILES if new[file] != texts[file]]
        if not chart.exists() or digest() not in chart.read_bytes():
            old.append(str(chart.relative_to(ROOT)))
        if old:
            raise ValueError(f"out of date: {', '.join(old)}; python bench/report.py writes them")
        return
    draw(chart)
    for file in FILES:
        timing.write_atomic(ROOT / file, new[file].encode())


script = timing.Script("report", __doc__, "--check", run)
script.option("--check", False, "only fail where a file is out of date", action="store_true")

if __name__ == "__main__":
    sys.exit(script.main())
