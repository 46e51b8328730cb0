"""Writes the generated blocks of README.md, bench/README.md and docs from the results.

A block stands between `<!-- NAME: ... -->` and `<!-- end NAME -->`, in any of these files.
Those of run_blocks.py are made from the runs in results and the presets, the others from the tables
in bench/results; "gpu" takes what there is of gpu_*.csv.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timing
from run_blocks import claims, quickstart, recipe_runs, recipes, runs, table2
from tables import table

from cibp_fast.training.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FILES = (
    *("README.md", "bench/README.md"),
    *("docs/recipes.md", "docs/reproduction.md", "docs/soundness.md"),
)

STEP_TABLES = ("step", "step_avx512")  # each measured on another processor
CONTENDERS = {
    "fused": "`cf.fuse`",
    "fast": '`precision="fast"`',
    "bf16": '`precision="bf16"`',
    "layers": "`cf.bounds`",
    "naive": "two-pass eager",
    "four": "four products",
    "compile": "torch.compile",
    "auto_lirpa": "auto_LiRPA",
    "naive_bf16": "two-pass, bf16 autocast",
}
TRAINING = {
    "train_step": "float32",
    "train_step_fast": '`precision="fast"`',
    "train_step_bf16": '`precision="bf16"`',
    **{
        name: CONTENDERS[name] for name in ("fused", "naive", "compile", "auto_lirpa", "naive_bf16")
    },
}
HEADLINE = ("fast", "bf16", "naive", "compile", "auto_lirpa", "naive_bf16")

TEST_EXAMPLES = 10_000  # of MNIST and CIFAR-10
NETWORK = ("model", "dataset", "batch")
IN_MIB = 'MiB, `"fast"`, two-pass'  # of `mebibytes`
Row = Mapping[str, str]


# Reading and writing


def read(pattern: str) -> list[Row]:
    """Returns the rows of all tables in bench/results whose names match; "" where a cell lacks.

    Raises ValueError where a table that is named in full is missing.
    """
    rows: list[Row] = []
    for path in sorted(RESULTS.glob(f"{pattern}.csv")):
        with path.open() as file:
            rows += [defaultdict(str, row) for row in csv.DictReader(file)]
    if not rows and "*" not in pattern:
        raise ValueError(f"there are no rows of {RESULTS / pattern}.csv")
    return rows


def by(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], dict[str, Row]]:
    """Returns the rows by network and these columns, and then by contender.

    Of the memory formats of a contender it takes the faster one.
    """
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = " ".join(row[name] for name in NETWORK), *(row[name] for name in names)
        own = found.setdefault(key, {})
        before = own.setdefault(row["contender"], row)
        own[row["contender"]] = min(before, row, key=lambda each: float(each["ms"] or "inf"))
    return found


def block(
    about: str, head: Sequence[str], body: Iterable[Sequence[str]], rows: Sequence[Row], file: str
) -> list[str]:
    """Returns what a table is about, the table, and where its rows were measured."""
    rounds = f"Medians of {rows[0]['rounds']} rounds. " if rows[0]["rounds"] else ""
    return [about, "", *table(head, body), f"{rounds}{conditions(rows)}: `{file}.csv`."]


def conditions(rows: Sequence[Row]) -> str:
    where = rows[0]
    threads = sorted({row["threads"] for row in rows}, reverse=True)
    return (
        f"{where['cpu']}, {where['isa']} kernels, threads: {' and '.join(threads)}, "
        f"torch {where['torch']}, {where['date']}"
    )


def cell(row: Row, key: str, form: Callable[[float], str] = "{:.2f}".format) -> str:
    if row[key] == "":
        return "not timed" if row["note"] else "-"
    return form(float(row[key]))


def digits(value: float) -> str:
    """Returns at least three of them, without an exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def mib(size: float) -> str:
    return f"{size / 2**20:.1f}"


def listed(
    own: Mapping[str, Row], names: Iterable[str], key: str, form: Callable[[float], str]
) -> str:
    return ", ".join(cell(own[each], key, form) for each in names)


def mebibytes(own: Mapping[str, Row], key: str) -> str:
    return listed(own, ("fused", "fast", "naive"), key, mib)


def speed(row: Row) -> str:
    """Returns the effective GFLOP/s, and in brackets their share of the peak."""
    share = cell(row, "effective_to_peak", "({:.2f})".format)
    return f"{cell(row, 'effective_gflops', '{:.0f}'.format)} {share}"


def processor(row: Row) -> str:
    """Names our kernels, and says whether the processor multiplies bfloat16 numbers.

    Older tables do not record it; kernels for AVX2 ran where the processor had no AVX-512 at all.
    """
    recorded = row["avx512_bf16"] or ("unknown" if row["isa"] == "avx512" else "False")
    known = {"True": "with AVX512_BF16", "False": "without AVX512_BF16"}
    return f"{row['isa']} kernels, {known.get(recorded, 'AVX512_BF16 unknown')}"


# Blocks of tables


def step_table(name: str) -> tuple[list[Row], dict[str, dict[str, Row]]]:
    """Returns a table's rows, also by network; raises ValueError where a contender lacks."""
    rows = read(name)
    results = {which: own for (which,), own in by(rows).items()}
    for which, own in results.items():
        own.setdefault("bf16", dict.fromkeys(own["fused"], ""))  # older tables have none
        if missing := sorted(CONTENDERS.keys() - own):
            raise ValueError(f"{name}.csv: {which} lacks {', '.join(missing)}")
    return rows, results


def performance() -> list[str]:
    tables = [step_table(name) for name in STEP_TABLES]
    body = []
    for name, first in tables[0][1].items():
        each = [results[name] for _, results in tables if name in results]
        cells = [name, " / ".join(cell(own["fused"], "ms", digits) for own in each)]
        for other in HEADLINE:
            cells.append(" / ".join(cell(own[other], "fused_ratio") for own in each))
        body.append([*cells, mebibytes(first, "saved_bytes")])
    names = [CONTENDERS[each] for each in HEADLINE]
    return [
        "A training step: nominal and interval pass, constrained IBP loss, backward pass. The ms "
        "column is the time of `cf.fuse`; the others are factors of it (below 1 is faster), each "
        "in its faster memory layout. Before and after the slash are two processors: "
        f"{' / '.join(processor(rows[0]) for rows, _ in tables)}.",
        "",
        *table(["network, data, batch", "ms", *names, f"saved {IN_MIB}"], body),
        "Saved is what autograd keeps for the backward pass. "
        + "; ".join(conditions(rows) for rows, _ in tables)
        + ". All contenders, memory, batch sizes, layers and what was measured how: "
        "[bench/README.md](bench/README.md).",
    ]


def steps() -> list[str]:
    others = [each for each in CONTENDERS if each != "fused"]
    names = [CONTENDERS[each] for each in others]
    head = ["network, data, batch", "ms", "effective GFLOP/s (to peak)", *names]
    head += [f"saved {IN_MIB}", f"peak {IN_MIB}"]
    lines = []
    for file in STEP_TABLES:
        rows, results = step_table(file)
        body = []
        for which, own in results.items():
            ours, ratios = own["fused"], (cell(own[each], "fused_ratio") for each in others)
            memory = (mebibytes(own, key) for key in ("saved_bytes", "peak_bytes"))
            body.append([which, cell(ours, "ms", digits), speed(ours), *ratios, *memory])
        notes = sorted({f"`{row['contender']}`: {row['note']}" for row in rows if row["note"]})
        *made, last = block(f"**{rows[0]['cpu']}, {processor(rows[0])}.**", head, body, rows, file)
        peak = f"Peak {float(rows[0]['peak_gflops']):.0f} GFLOP/s. "
        lines += [*made, "".join(f"Not timed: {note}. " for note in notes) + peak + last, ""]
    return lines[:-1]


def training() -> list[str]:
    rows = read("training")
    body = []
    for (name,), own in by(rows).items():
        ours = own["train_step"]
        ratios = (cell(own[each], "fused_ratio") for each in TRAINING if each != "train_step")
        compared = ("train_step", "train_step_bf16", "naive_bf16")
        errors = listed(own, compared, "gradient_error", "{:.1e}".format)
        body.append([name, cell(ours, "ms", digits), speed(ours), *ratios, errors])
    head = ["network, data, batch", "ms", "effective GFLOP/s (to peak)"]
    head += [text for name, text in TRAINING.items() if name != "train_step"]
    head.append("worst gradient's error: float32, bf16, autocast")
    about = (
        "A step with Adam. The ms column is the step of `cibp-fast train` in float32, which makes "
        "batch and boxes from bytes, too, in one call; the others are factors of it, first its own "
        "in other precisions, then steps of torch's autograd with `torch.optim.Adam(fused=True)`:"
    )
    return block(about, head, body, rows, "training")


def costs() -> list[str]:
    rows = read("costs")
    ways = ("naive", "compile")
    body = []
    for (name,), own in by(rows).items():
        ours = own["train_step"]
        ratios = [cell(own[each], "fused_ratio") for each in ways]
        memory = listed(own, ("train_step", *ways), "peak_bytes", mib)
        body.append([name, cell(ours, "ms", digits), *ratios, memory])
    head = ["network, data, batch", "ms", *(CONTENDERS[each] for each in ways)]
    head.append(f"peak MiB: ours, {', '.join(CONTENDERS[each] for each in ways)}")
    about = (
        "A step of these runs, IBP or constrained IBP, with Adam, in float32 on one thread. The ms "
        "column is ours, the others are factors of it. Peak: by how much a step raises the memory "
        "of its process:"
    )
    return block(about, head, body, rows, "costs")


def others(rows: Iterable[Row]) -> list[str]:
    """Returns the contenders that were timed beside `cf.fuse`, in the tables' order."""
    found = {row["contender"] for row in rows}
    return [name for name in CONTENDERS if name != "fused" and name in found]


def slower(name: str, *columns: str) -> str:
    """Says what was measured again while the processor gave less than for the table `name`."""
    before, rows = read(name), read(f"{name}_slow")
    parts = []
    for key, own in by(rows, *columns).items():
        ratios = [
            f"{CONTENDERS[each]} {cell(own[each], 'fused_ratio')}"
            for each in ("fast", "bf16", "auto_lirpa")
        ]
        parts.append(f"{', '.join((*key[1:], key[0]))}: {', '.join(ratios)}")
    peaks = [
        f"{max(float(row['peak_gflops'] or 0) for row in each):.0f}" for each in (rows, before)
    ]
    return (
        f"Measured again when the processor gave {peaks[0]} GFLOP/s at most, not {peaks[1]}: "
        f"{'; '.join(parts)}. {conditions(rows)}: `{name}_slow.csv`."
    )


def norms() -> list[str]:
    rows = read("norms")
    ways = others(rows)
    body = []
    for (name,), own in by(rows).items():
        ours, every = own["fused"], ("fused", *ways)
        errors = listed(own, every, "gradient_error", "{:.1e}".format)
        ratios = [cell(own[each], "fused_ratio") for each in ways]
        saved = listed(own, every, "saved_bytes", mib)
        body.append([name, cell(ours, "ms", digits), speed(ours), *ratios, saved, errors])
    names = ", ".join(CONTENDERS[each] for each in ways)
    head = ["network, data, batch", "ms", "effective GFLOP/s (to peak)"]
    head += [CONTENDERS[each] for each in ways]
    head += [f"saved MiB: `cf.fuse`, {names}", "worst gradient's error, in this order"]
    about = (
        "A step with batch norm in training mode, without Adam: CNN7 of width 64, and a residual "
        "network of as many layers. The ms column is `cf.fuse` in float32, the others are factors "
        "of it:"
    )
    return [*block(about, head, body, rows, "norms"), "", slower("norms")]


def recipe_steps() -> list[str]:
    rows = read("recipe_steps")
    ways = others(rows)
    body = []
    for (name, recipe), own in by(rows, "recipe").items():
        errors = listed(own, ("fused", *ways), "gradient_error", "{:.1e}".format)
        ratios = [cell(own[each], "fused_ratio") for each in ways]
        body.append([f"{recipe}: {name}", cell(own["fused"], "ms", digits), *ratios, errors])
    head = ["recipe: network, data, batch", "ms", *(CONTENDERS[each] for each in ways)]
    head.append("worst gradient's error, in this order")
    about = (
        "A whole step of CNN7 of width 64 by the recipes of later papers, with Adam: Shi et al.'s "
        "IBP with its regularizer, and MTL-IBP with one step of attack. The ms column is "
        "`cibp-fast train` in float32, the others are factors of it:"
    )
    return [*block(about, head, body, rows, "recipe_steps"), "", slower("recipe_steps", "recipe")]


def batches() -> list[str]:
    rows = read("batch_*threads")
    sizes = sorted({int(row["batch"]) for row in rows})
    found: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        key = f"{row['model']} {row['dataset']}", CONTENDERS[row["contender"]], row["threads"]
        own = found.setdefault(key, {})
        own[int(row["batch"])] = cell(row, "ms_per_gflop", "{:.1f}".format)
    body = ([*key, *(own.get(size, "") for size in sizes)] for key, own in found.items())
    about = (
        "Milliseconds a GFLOP (of direct products) of a step of torch's autograd, by batch size, "
        "on one thread and on as many as there are:"
    )
    head = ["network", "step", "threads", *(f"{size:,}" for size in sizes)]
    return block(about, head, body, rows, "batch_*threads")


def channels() -> list[str]:
    rows = read("channels")
    found = sorted(by(rows, "dataset").items(), key=lambda item: int(item[0][1].split("x")[0]))
    body = (
        [CONTENDERS[name], *(cell(own[name], "ms_per_gflop", digits) for _, own in found)]
        for name in ("fused", "fast", "bf16", "naive")
    )
    about = (
        "Milliseconds a GFLOP (of direct products), by channel count: two 3x3 convolutions of as "
        f"many channels as the images have, and a linear layer, on {rows[0]['batch']} images of "
        f"{rows[0]['dataset'].partition('x')[2]}:"
    )
    head = ["channels", *(shape.split("x")[0] for (_, shape), _ in found)]
    return block(about, head, body, rows, "channels")


def load() -> list[str]:
    rows = read("load")

    def spread(row: Row) -> str:
        low, high = (cell(row, f"ms_{quartile}", digits) for quartile in ("q1", "q3"))
        return f"{cell(row, 'ms', digits)} ({low} to {high})"

    body = (
        [*key, spread(own["fused"]), spread(own["naive"]), cell(own["naive"], "fused_ratio")]
        for key, own in by(rows, "load", "threads").items()
    )
    about = (
        "Milliseconds of a step beside processes that never wait (with quartiles), and how many "
        "times as long the two-pass step takes on as many threads, round by round:"
    )
    head = ["network, data, batch", "busy processes a core", "threads", "`cf.fuse`"]
    return block(about, [*head, "two-pass eager", "ratio"], body, rows, "load")


def layers() -> list[str]:
    rows = read("layers")
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}  # ms of two passes, and of ours
    for (name, kind, _), own in by(rows, "pass", "layer").items():
        pair = float(own["naive"]["ms"]), float(own["fused"]["ms"])
        found.setdefault(name, {}).setdefault(kind, []).append(pair)

    def text(pairs: list[tuple[float, float]]) -> str:
        naive, fused = map(sum, zip(*pairs, strict=True))
        ratios = [theirs / ours for theirs, ours in pairs]
        return f"{naive / fused:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    body = ([name, text(own["forward"]), text(own["training"])] for name, own in found.items())
    about = (
        "Time of the two-pass layer over that of our op, each in the better of NCHW and "
        "channels_last: a network's layers together, and in brackets the range of the layers:"
    )
    head = ["network, data, batch", "forward", "forward + backward"]
    return block(about, head, body, rows, "layers")


def precisions() -> list[str]:
    rows = read("precisions")
    curves = [row for row in rows if row["schedule"] == "curve"]
    last = curves[-1]["epoch"]
    shown = ("1", "3", "5", "7", last)

    def spread(precision: str, epoch: str, key: str, form: str, scale: float = 1.0) -> str:
        found = [
            scale * float(row[key])
            for row in curves
            if (row["precision"], row["epoch"]) == (precision, epoch)
        ]
        return f"{statistics.mean(found):{form}} ({statistics.stdev(found):{form}})"

    body = []
    for precision in dict.fromkeys(row["precision"] for row in curves):
        losses = (spread(precision, epoch, "loss", ".3f") for epoch in shown)
        verified = spread(precision, last, "verified_error", ".1f", 100)
        ends = [row for row in rows if (row["schedule"], row["precision"]) == ("decay", precision)]
        end = f"{100 * float(ends[-1]['verified_error']):.1f} %" if ends else "-"
        body.append([f"`{precision}`", *losses, f"{verified} %", end])
    head = ["precision", *(f"epoch {epoch}" for epoch in shown)]
    head += [f"verified error, epoch {last}", "a whole run, decayed rate"]
    seeds = len({row["seed"] for row in curves})
    about = (
        f"Training loss of mnist-small-0.4-cibp, {curves[-1]['step']} steps, schedules shortened: "
        f"mean over {seeds} seeds and, in brackets, standard deviation; the verified error then; "
        "and that of one run of the whole recipe with `--lr-decay-at 15000,25000`:"
    )
    return block(about, head, body, rows, "precisions")


def loop() -> list[str]:
    rows = read("epochs")
    body = []
    for row in rows:
        epoch, examples = float(row["epoch_s"]), TEST_EXAMPLES
        evaluation = float(row["evaluation_ms_per_example"]) * examples / 1e3
        step, data, writing = (float(row[part]) for part in ("step", "data", "writing"))
        shares = (data, writing, 1 - step - data - writing, 1 - step, evaluation / epoch)
        speed = f"{float(row['examples_per_s']):.0f}"
        body.append([f"`{row['preset']}`", speed, *(f"{100 * share:.2f} %" for share in shares)])
    head = ["preset", "examples a second", "data, augmentation", "writing", "rest", "together"]
    head.append("evaluation, over the epoch")
    about = (
        "What the training loop of `cibp-fast train` costs beside the step itself (with its batch, "
        f"where it makes that), as shares of its time; {rows[0]['epochs']} epochs without their "
        f"evaluation. The last column is that of {TEST_EXAMPLES:,} test examples over an epoch:"
    )
    return block(about, head, body, rows, "epochs")


def certificates() -> list[str]:
    rows = read("certificates")
    body = []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = {row["contender"]: row for row in rows if row["network"] == network}
        if not own.keys() - {""}:
            continue  # whose data were not there
        real, float32 = own["real"], own["float32"]
        count, trained = own["ordinary"]["examples"], own["ordinary"]["trained"] == "True"
        verified = [f"{int(own[kind]['verified']):,}" if trained else "-" for kind in own]
        name = f"`{network}`" if trained else f"{network}, fresh weights"
        times = [cell(own["ordinary"], "ms", digits)]
        ratios = [cell(row, "fused_ratio") for row in (real, float32)]
        body.append([name, f"{int(count):,}", *times, *ratios, *verified])
    head = ["network", "examples", "ms", "`real`", "`float32`", "verified, ordinary"]
    head += ["verified, `real`", "verified, `float32`"]
    about = (
        "`cf.certify` of a whole test set: the time of ordinary bounds (`sound=False`), the times "
        "of sound ones over it, and how many examples each verifies:"
    )
    return block(about, head, body, rows, "certificates")


def widths() -> list[str]:
    rows = [row for row in read("widths") if not row["note"]]
    by_network: dict[str, list[Row]] = {}
    for row in rows:
        by_network.setdefault(row["network"], []).append(row)
    most = max(map(len, by_network.values()))
    body = []
    for network, own in by_network.items():
        products = ", ".join(row["products"] for row in own)
        texts = [
            f"{cell(row, 'real', '{:.1e}'.format)}, {cell(row, 'float32', '{:.1e}'.format)}"
            for row in own
        ]
        body.append([f"`{network}`", products, *texts, *["-"] * (most - len(own))])
    head = ["network", "products of a sum", *(f"ReLU {place + 1}" for place in range(most))]
    about = (
        "By how much sound boxes (`real`, `float32`) are wider than those of float64 behind each "
        f"ReLU, in the mean of {rows[0]['examples']} examples; it grows with the products of a sum:"
    )
    return block(about, head, body, rows, "widths")


def audits() -> list[str]:
    rows = [row for row in read("audits") if not row["note"]]
    body = [
        [
            f"`{row['network']}`",
            f"`{row['semantics']}`",
            f"{int(row['confirmed']):,}",
            row["refuted"],
            row["fractions"],
            f"{float(row['slack_median']):.1e}, {float(row['slack_greatest']):.1e}",
            f"{float(row['seconds']):.0f} s",
        ]
        for row in rows
    ]
    head = ["network", "claim", "confirmed", "refuted", "in fractions", "slack", "time"]
    about = (
        "What `cibp-fast audit` says of all certificates of the trained networks, whether they "
        "verify or not. Slack: by how much its own bound is above the margin, median and greatest:"
    )
    return block(about, head, body, rows, "audits")


def gpu() -> list[str]:
    rows = read("gpu_*")
    if not rows:
        return ["Not measured yet: no GPU was at hand. `python bench/gpu_session.py` measures it."]
    if any(row["gpu"] == "interpreter" for row in rows):
        raise ValueError("bench/results: gpu_*.csv from the interpreter are no measurements")
    for key in ("gpu", "cuda", "torch", "triton"):
        if len(found := sorted({row[key] for row in rows})) > 1:
            several = " and ".join(found)
            raise ValueError(f"bench/results: gpu_*.csv must be of one {key}, not of {several}")
    lines = []
    if checks := read("gpu_numerics*"):
        passed = sum(not row["note"] for row in checks)
        skipped = sum(row["note"].startswith("not measured") for row in checks)
        text = f"{passed} of {len(checks)} checks of the kernels against float64 passed"
        lines += [f"{text}, {skipped} were not made.", ""]
    columns: dict[str, tuple[Any, ...]] = {
        "us": ("ms", lambda ms: f"{1e3 * ms:,.1f}"),
        "over `train_step_tf32` (below 1 is faster)": ("fused_ratio",),
        "share of a matrix product's speed": ("effective_to_peak",),
        "of a copy's": ("copy_share",),
        "saved MiB": ("saved_bytes", mib),
        "peak MiB": ("peak_bytes", mib),
    }
    body = [
        [name, f"`{contender}`", *(cell(row, *each) for each in columns.values())]
        for (name,), own in by(row for row in rows if row["contender"] and not row["layer"]).items()
        for contender, row in own.items()
    ]
    if body:
        lines += ["Training steps with Adam, in the better memory format:", ""]
        lines += table(["network, data, batch", "contender", *columns], body)
    where = rows[0]
    return [
        *lines,
        f"{where['gpu']}, CUDA {where['cuda']}, torch {where['torch']}, Triton {where['triton']}, "
        f"{where['date']}. Epochs and layers are in `gpu_epochs.csv` and `gpu_layers_*.csv`.",
    ]


BLOCKS = [
    quickstart,
    table2,
    claims,
    runs,
    recipes,
    recipe_runs,
    performance,
    steps,
    training,
    precisions,
    batches,
    channels,
    load,
    layers,
    loop,
    costs,
    norms,
    recipe_steps,
    certificates,
    widths,
    audits,
    gpu,
]


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
    texts = {file: (ROOT / file).read_text() for file in FILES}
    new = updated(texts)
    old = [file for file in FILES if new[file] != texts[file]]
    if options.check and old:
        raise ValueError(f"out of date: {', '.join(old)}; python bench/report.py writes them")
    for file in old:
        write_atomic(ROOT / file, new[file].encode())


script = timing.Script("report", __doc__, "--check", run)
script.option("--check", False, "only fail where a file is out of date", action="store_true")

if __name__ == "__main__":
    sys.exit(script.main())
