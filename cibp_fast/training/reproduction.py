"""Trains what the paper's Table 2 and Figures 3 to 7 need, and makes them of the runs.

The runs of a cell are the folders `<preset>-seed<k>` below one folder, which `cibp-fast train`
writes: nothing here computes an error of its own, and `manifest.json` beside the runs has the
SHA-256 of each file behind the numbers. What needs torch imports it where it is called.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from cibp_fast.training import plotting, runs
from cibp_fast.training.children import Task, run_tasks
from cibp_fast.training.config import Config, counted, epoch_steps, preset
from cibp_fast.training.files import make_folder, naming, write_atomic, write_json
from cibp_fast.training.paper import FIGURES, TABLE, TITLES, Cell, cells_of

ERRORS = ("test", "pgd", "verified")
TRAIN = (sys.executable, "-m", "cibp_fast", "train")
TIMED = 8  # steps of a kind of network, at most


# What is there


@dataclass(frozen=True)
class Run:
    """Holds what the folder of a cell's run says.

    Attributes:
        state: "finished"; "begun", with a result still to come; "missing"; or "unusable": another
            config, or damaged.
        config: of the folder, or where there is none, of the preset.
        records: those of metrics.jsonl.
        why: it is unusable.
    """

    cell: Cell
    seed: int
    folder: Path
    state: str
    config: Config
    records: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    why: str = ""

    @property
    def epochs(self) -> tuple[int, int]:
        """Gives how many epochs it has, and will have."""
        done = self.records[-1]["epoch"] if self.records else 0
        return done, math.ceil(self.config.steps / epoch_steps(dict(self.config)))

    @property
    def steps_left(self) -> int:
        done = self.records[-1]["step"] if self.records else 0
        return 0 if self.state == "finished" else self.config.steps - done


def look(cell: Cell, seed: int, results: Path) -> Run:
    """Reads a cell's run, whatever there is of it.

    Its config must be the preset's, but for the precision: that says how the recipe is computed.
    """
    folder = results / f"{cell.preset}-seed{seed}"
    config = preset(cell.preset, seed=seed)
    if not any((folder / name).exists() for name in runs.FILES):
        return Run(cell, seed, folder, "missing", config)
    try:
        there = runs.read_config(folder)
        other = there.differences(config.replace(precision=there.precision))
        if other:
            texts = [f"{name} {getattr(there, name)}" for name in other]
            recipe = ", ".join(f"{name} {getattr(config, name)}" for name in other)
            raise ValueError(f"it is of another config: {', '.join(texts)}; the preset: {recipe}")
        result = runs.read_result(folder)
        records = runs.read_metrics(folder) if result else runs.read_epochs(folder)
    except (OSError, ValueError) as error:
        return Run(cell, seed, folder, "unusable", config, why=str(error))
    return Run(cell, seed, folder, "finished" if result else "begun", there, records, result)


def look_all(cells: Iterable[Cell], seeds: int, results: Path) -> dict[Cell, list[Run]]:
    """Reads the runs of the cells: of so many seeds, from 0, and of others that are there."""
    found = {}
    for cell in cells:
        folders = results.glob(f"{cell.preset}-seed*")
        numbers = [path.name.removeprefix(f"{cell.preset}-seed") for path in folders]
        there = {int(number) for number in numbers if re.fullmatch(r"0|[1-9]\d{0,17}", number)}
        found[cell] = [look(cell, seed, results) for seed in sorted({*range(seeds), *there})]
    return found


def problems_of(run: Run) -> list[str]:
    """Returns what is wrong with a run, a line each."""
    if run.state == "unusable":
        return [f"{run.folder} is left out: {run.why}"]
    if run.result is None:
        return []
    found = []
    test, pgd, verified = (run.result[f"{error}_error"] for error in ERRORS)
    if not test <= pgd <= verified:
        found.append(
            f"{run.folder}: test <= PGD <= verified error does not hold: "
            f"{100 * test:.2f}, {100 * pgd:.2f}, {100 * verified:.2f} %"
        )
    if run.result["contradictions"]:
        found.append(
            f"{run.folder}: the attack breaks {run.result['contradictions']} examples that the "
            "bounds verify"
        )
    return found


# The plan


def plan_lines(
    chosen: Sequence[Run],
    absent: dict[str, Path],
    seconds: Callable[[Config], float],
    jobs: int,
    threads: int,
) -> list[str]:
    """Returns a line for each run, and their sums.

    absent: of each data set that is not there the first file that is missing. seconds: measures a
    training step.
    """
    lines, total, count = [], 0.0, 0
    indent = max(len(run.folder.name) for run in chosen)
    for run in chosen:
        done, epochs = run.epochs
        text = {
            "finished": "finished",
            "begun": f"begun, epoch {done} of {epochs}",
            "missing": "missing",
            "unusable": f"skipped: {run.why}",
        }[run.state]
        if run.state in ("begun", "missing") and run.cell.dataset in absent:
            text += f": impossible, data not present ({absent[run.cell.dataset]})"
        elif run.state in ("begun", "missing"):
            left = run.steps_left * seconds(run.config)
            text += f", {_duration(left)} to go"
            total, count = total + left, count + 1
        lines.append(f"  {run.folder.name:{indent}}  {text}")
    if count:
        shared = f"; {jobs} at a time: {_duration(total / jobs)}" if jobs > 1 else ""
        lines.append(
            f"To train: {counted(count, 'run')}, {_duration(total)} of steps at "
            f"{counted(threads, 'thread')}{shared}. Evaluations and attacks come on top."
        )
    else:
        lines.append("To train: nothing.")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


class Timer:
    """Measures a training step of each kind of network once, on random images.

    device: cpu or cuda. threads: of the processor.
    """

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        self.known: dict[tuple[Any, ...], float] = {}

    def __call__(self, config: Config) -> float:
        """Returns the seconds of a step, but for what the space of eps and the methods of IBP add.

        Raises ValueError for a device that is not there.
        """
        from cibp_fast.training.datasets import INPUT_SHAPES

        shape = INPUT_SHAPES[config.dataset]
        images = shape, config.batch_size, config.augmentation
        network = config.net, config.padding, config.precision, config.method == "nominal"
        kind = images + network
        if kind not in self.known:
            self.known[kind] = self._measured(config, shape)
        return self.known[kind]

    def _measured(self, config: Config, shape: tuple[int, ...]) -> float:
        """Returns the median of a few steps, after one that does not count."""
        import torch

        from cibp_fast.training.datasets import Split
        from cibp_fast.training.distributed import world
        from cibp_fast.training.step import Step, fastest

        processes = world(self.device)
        random = torch.Generator().manual_seed(0)
        size = (TIMED * config.batch_size, *shape)
        images = torch.randint(0, 256, size, dtype=torch.uint8, generator=random)
        examples = Split(images, torch.arange(len(images)) % 10).to(processes.device)
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            step = Step(config, examples, processes, "auto")
            taken = fastest(step, 0)
            taken.load(1, 0)
            times: list[float] = []
            while len(times) < TIMED and (len(times) < 3 or sum(times) < 0.3):
                begin = time.perf_counter()
                taken()
                step.totals.sum().item()  # waits for a GPU
                times.append(time.perf_counter() - begin)
        finally:
            torch.set_num_threads(threads)
        return median(times[1:])


# Training


def train_tasks(
    todo: Iterable[Run], words: dict[str, Any], verify_data: bool, *, logged: bool
) -> list[Task]:
    """Returns the commands that train these runs, or go on with them.

    words: options of all. logged: their output goes to train.log in their folders.
    """
    tasks = []
    for run in todo:
        folder = run.folder.absolute()
        options = {
            "--preset": run.cell.preset,
            "--seed": run.seed,
            "--precision": run.config.precision,
            "--run-dir": folder,
            **words,
        }
        command = [*TRAIN, *(str(word) for pair in options.items() for word in pair)]
        command += [] if verify_data else ["--unverified-data"]
        log = folder / "train.log" if logged else None
        tasks.append(Task(run.folder.name, command, log))
    return tasks


# The table


def table_rows(found: dict[Cell, list[Run]], absent: Collection[str] = ()) -> list[dict[str, Any]]:
    """Returns a record for each row of Table 2, in its order; errors in %.

    found: the runs of its cells. absent: data sets that are not there.
    """
    rows = []
    for cell in TABLE:
        finished = [run for run in found[cell] if run.result is not None]
        results: list[dict[str, Any]] = [run.result or {} for run in finished]
        printed = dict(zip(ERRORS, cell.printed, strict=True)) if cell.printed else None
        row: dict[str, Any] = {
            "preset": cell.preset,
            "dataset": cell.dataset,
            "eps": cell.eps.replace("of", "/"),
            "eps_space": "normalized" if cell.variant else "pixel",
            "net": cell.net,
            "method": cell.method,
            "paper": printed,
            "seeds": len(finished),
            "runs": [run.folder.name for run in finished],
            "state": "finished" if finished else state_of(found[cell], absent),
        }
        if finished:
            row |= {
                "ours": {error: mean_and_spread(results, error) for error in ERRORS},
                "examples": sorted({result["examples"] for result in results}),
                "sound": all(result.get("sound") is True for result in results),
                "precision": sorted({run.config.precision for run in finished}),
            }
            if printed:
                means = {error: row["ours"][error]["mean"] for error in ERRORS}
                row["difference"] = {error: means[error] - printed[error] for error in ERRORS}
        rows.append(row)
    return rows


def mean_and_spread(results: Sequence[dict[str, Any]], error: str) -> dict[str, Any]:
    """Returns an error of runs, in %: the mean, the standard deviation of the sample (None of one
    run), and each run's.

    error: of ERRORS.
    """
    values = [100 * result[f"{error}_error"] for result in results]
    spread = stdev(values) if len(values) > 1 else None
    return {"mean": fmean(values), "spread": spread, "values": values}


def state_of(members: Sequence[Run], absent: Collection[str]) -> str:
    """Says why a cell has no finished run. absent: data sets that are not there."""
    begun = [run.epochs for run in members if run.state == "begun"]
    if begun:
        done, epochs = max(begun)
        return f"{done} of {epochs} epochs"
    if any(run.state == "unusable" for run in members):
        return "not used: another config, or damaged"
    missing = any(run.cell.dataset in absent for run in members)
    return "not run: data not present" if missing else "not run"


def table_markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the lines of the table, and what its marks mean."""
    head = ["data set, eps", "network", "method", "the paper's", "ours", "difference"]
    head += ["seeds", "examples", "runs"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        space = " normalised" if row["eps_space"] == "normalized" else ""
        task = f"{TITLES[row['dataset']]}, {row['eps']}{space}"
        cells = [task, row["net"], plotting.METHOD_LABELS[row["method"]]]
        paper = row["paper"]
        cells.append(" / ".join(f"{paper[error]:.2f}" for error in ERRORS) if paper else "-")
        if row["runs"]:
            difference = row.get("difference")
            texts = (f"{difference[error]:+.2f}" for error in ERRORS) if difference else "-"
            other = ", ".join(each for each in row["precision"] if each != "float32")
            ours = " / ".join(as_text(row["ours"][error]) for error in ERRORS)
            cells += [
                ours + ("" if row["sound"] else " †"),
                " / ".join(texts),
                str(row["seeds"]),
                ", ".join(f"{count:,}" for count in row["examples"]),
                ", ".join(f"`{name}`" for name in row["runs"]) + (other and f" (in {other})"),
            ]
        else:
            cells += [row["state"], "-", "-", "-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    about = (
        "Errors in %: test / PGD / verified; of several seeds their mean +- the standard deviation "
        "of the sample. Difference: ours less the paper's."
    )
    if not all(row.get("sound", True) for row in rows):
        about += (
            ' †: the verified error is of bounds in rounded arithmetic, no proof (`"sound": false` '
            "in `result.json`)."
        )
    return [*lines, "", about]


def as_text(error: dict[str, Any]) -> str:
    """Returns what `mean_and_spread` found as the tables write it."""
    spread = "" if error["spread"] is None else f" +- {error['spread']:.2f}"
    return f"{error['mean']:.2f}{spread}"


# The figures


def draw(
    name: str, found: dict[Cell, list[Run]], output: Path, absent: Collection[str] = ()
) -> None:
    """Draws a figure of the paper from the runs, to a file as `plotting.plot`.

    What is not there is said in its panel. absent: data sets that are not there.
    """
    figure, panels = FIGURES[name], []
    for title, cells in figure.panels.items():
        folders, remarks = {}, []
        for cell in cells:
            label = plotting.METHOD_LABELS[cell.method]
            members = [run for run in found[cell] if run.records]
            folders[cell.method] = [run.folder for run in members]
            if not members:
                remarks.append(f"{label}: {state_of(found[cell], absent)}")
            for run in members:
                if run.state == "begun":
                    seed = f", seed {run.seed}" if len(members) > 1 else ""
                    remarks.append(f"{label}{seed}: {state_of([run], absent)}")
        panels.append(plotting.Panel(title, folders, remarks))
    plotting.plot_panels(
        panels,
        output,
        figure.title,
        columns=figure.columns,
        epochs=figure.epochs,
        widths=figure.widths,
    )


# The manifest


def read_manifest(results: Path) -> dict[str, dict[str, str]]:
    """Returns the SHA-256 of the files of each run in manifest.json, {} where there is none.

    Raises ValueError where it is damaged, OSError where it cannot be read.
    """
    path = results / "manifest.json"
    if not path.exists():
        return {}
    with naming("read", path):
        content = path.read_bytes()
    try:
        return {run: dict(files) for run, files in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to have it made anew") from None


def changed_files(results: Path) -> list[str]:
    """Returns a line for each file that is not as manifest.json has it. Raises as its reader."""
    lines = []
    for run, files in read_manifest(results).items():
        now = _hashes(results / run)
        for file in files:
            if now.get(file) != files[file]:
                what = "has changed" if file in now else "is gone"
                lines.append(
                    f"{results / run / file} {what} since {results / 'manifest.json'} was "
                    "written: put it back, or remove the run from there"
                )
    return lines


def add_to_manifest(results: Path, finished: Iterable[Run]) -> None:
    """Adds these runs, and new files of them, to manifest.json; what it has already stays."""
    old = read_manifest(results)
    new = dict(old)
    for run in finished:
        files = _hashes(run.folder) | old.get(run.folder.name, {})
        new[run.folder.name] = dict(sorted(files.items()))
    if new != old:
        write_json(results / "manifest.json", dict(sorted(new.items())))


def _hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of the folder's files, but for hidden ones and logs."""
    paths = [path for path in folder.glob("[!.]*") if path.is_file() and path.suffix != ".log"]
    found = {}
    for path in paths:
        with naming("read", path):
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# The whole


def reproduce(
    target: str,
    *,
    results: Path,
    output: Path,
    only: str | None = None,
    seeds: int = 1,
    plan: bool = False,
    report: bool = False,
    budget: float | None = None,
    jobs: int = 1,
    device: str = "cpu",
    data_root: str | Path | None = None,
    verify_data: bool = True,
    threads: int = 1,
) -> list[str]:
    """Trains what lacks of the paper's table and figures, and makes them; returns what went wrong.

    It prints the plan, trains by child processes, adds what has finished to manifest.json, and
    writes table2.md, table2.json and the figures of the target. A finished run is never touched,
    one that was stopped goes on, and a folder of another config is left alone.

    Args:
        target: "table2", "fig3" to "fig7", or "all".
        results: folder of the runs.
        output: folder of the table and the figures.
        only: train only runs whose preset has this in its name; * stands for anything.
        seeds: of each run, from 0. The table takes all finished ones that are there.
        plan: print the plan and stop.
        report: train nothing.
        budget: seconds after which what trains saves its state and stops.
        jobs: runs at a time.
        device, data_root, verify_data: as in `loop.train`.
        threads: of the processor, shared by the jobs.

    Raises:
        ValueError: only is in no name; manifest.json is damaged.
        ImportError: matplotlib is missing.
        KeyboardInterrupt: a signal stopped it, with all states saved.
        OSError: a file cannot be written.
    """
    cells = cells_of(target)
    wanted = [cell for cell in cells if only is None or fnmatchcase(cell.preset, f"*{only}*")]
    if not wanted:
        raise ValueError(
            f"only must be in the name of a preset of {target}, as {cells[0].preset}, not {only!r}"
        )
    read_manifest(results)  # what is wrong with these is said now, not after the training
    if not plan:
        make_folder(output)
        if target != "table2":
            plotting.require_matplotlib()
    from cibp_fast.training import datasets

    root = datasets.data_root(data_root)
    files = {cell.dataset: datasets.missing_file(cell.dataset, root) for cell in cells}
    absent = {name: path for name, path in files.items() if path is not None}
    failures: list[str] = []
    if not report:
        there = look_all(wanted, seeds, results)
        chosen = [run for members in there.values() for run in members if run.seed < seeds]
        share = max(1, threads // jobs)
        _print_plan(chosen, absent, Timer(device, share), jobs, share)
        todo = [
            run
            for run in chosen
            if run.state in ("begun", "missing") and run.cell.dataset not in absent
        ]
        if todo and not plan:
            make_folder(results)
            words = {"--threads": share, "--device": device, "--data-root": root.absolute()}
            tasks = train_tasks(todo, words, verify_data, logged=jobs > 1)
            # in a folder that has no tree of this package, which python -m would import
            outcome = run_tasks(tasks, jobs, cwd=results, seconds=budget)
            failures = [f"{name}: {line}" for name, line in outcome.failures.items()]
            if outcome.stopped == "signal":
                raise KeyboardInterrupt("stopped, with what was trained saved")
            if outcome.stopped:
                print("The budget is used up, what was trained is saved: the same command goes on.")
    found = look_all(cells, seeds, results)
    problems = changed_files(results)
    problems += [line for members in found.values() for run in members for line in problems_of(run)]
    if not plan:
        everything = look_all(cells_of("all"), 0, results)
        members = [run for each in everything.values() for run in each]
        add_to_manifest(results, [run for run in members if run.state == "finished"])
        _write(target, found, absent, problems, output)
    return failures + problems


def _print_plan(
    chosen: Sequence[Run],
    absent: dict[str, Path],
    seconds: Callable[[Config], float],
    jobs: int,
    threads: int,
) -> None:
    finished = sum(run.state == "finished" for run in chosen)
    print(f"{counted(len(chosen), 'run')}, {finished} finished; timing steps of the rest ...")
    print("\n".join(plan_lines(chosen, absent, seconds, jobs, threads)), flush=True)


def _write(
    target: str,
    found: dict[Cell, list[Run]],
    absent: Collection[str],
    problems: Sequence[str],
    output: Path,
) -> None:
    """Writes the table and the figures of the target."""
    made = []
    if target in ("table2", "all"):
        rows = table_rows(found, absent)
        write_json(output / "table2.json", {"rows": rows, "problems": problems})
        lines = [*table_markdown(rows), *(f"\nProblem: {line}" for line in problems)]
        write_atomic(output / "table2.md", ("\n".join(lines) + "\n").encode())
        made += ["table2.md", "table2.json"]
    for name in FIGURES:
        if target in (name, "all"):
            draw(name, found, output / f"{name}.png", absent)
            made.append(f"{name}.png")
    print(f"wrote {', '.join(made)} in {output}", flush=True)
