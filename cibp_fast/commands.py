"""The commands of `cibp-fast`: a class each, of whose fields tyro makes the options.

What takes seconds to import is imported by the command that needs it: help is there at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cibp_fast.options import (
    DEFAULT_PRESET,
    DEVICE,
    DIR,
    MOST_THREADS,
    Changes,
    Command,
    Flag,
    Model,
    N,
    OnData,
    Positional,
    Radius,
    Recipe,
    arg,
    own_first,
    word,
)
from cibp_fast.training.config import (
    PRESET_GRAMMAR,
    Config,
    OwnConfig,
    counted,
    epoch_steps,
    parse,
    preset,
)
from cibp_fast.training.files import make_folder

if TYPE_CHECKING:
    from cibp_fast.training.datasets import Split
    from cibp_fast.training.runs import Network

MOST_SEEDS = 1000


@dataclass(kw_only=True)
class Info(Command):
    """Show versions, the processor, and which kernel runs where and why.

    example:
      cibp-fast info
    """

    def run(self) -> None:
        from cibp_fast import environment

        facts = [*environment.versions().items(), *environment.describe()]
        indent = max(len(name) for name, _ in facts) + 2
        for name, value in facts:
            print(f"{name:<{indent}}" + value.replace("\n", "\n" + " " * indent))


@dataclass(kw_only=True)
class Quickstart(Command):
    """Train the small network on 5,000 digits with IBP and with constrained IBP, and compare.

    It needs the extra demo. The same command goes on with a quickstart that was stopped. It
    replaces one that has finished, or that has another seed.

    examples:
      cibp-fast quickstart
      cibp-fast quickstart --output runs/quickstart --seed 1

    Attributes:
        output: folder of the two runs and the picture
        seed: seed of both runs
    """

    output: Annotated[Path, DIR] = Path("quickstart")
    seed: Annotated[int, N] = 0

    def run(self) -> None:
        from cibp_fast.training import loop, plotting, runs

        plotting.require_matplotlib()  # now, not after the training
        names = [f"mnist5k-small-0.1-{method}" for method in ("ibp", "cibp")]
        configs = {self.output / name: preset(name, seed=self.seed) for name in names}
        make_folder(self.output)
        there = []  # of the same config
        for run_dir, config in configs.items():
            with suppress(OSError, ValueError):  # none, or a damaged one
                if runs.read_config(run_dir) == config:
                    there.append(run_dir)
        finished = all((run_dir / "result.json").exists() for run_dir in configs)
        results = {}
        for run_dir, config in configs.items():
            label = plotting.METHOD_LABELS[config.method]
            steps = counted(config.steps, "step")
            print(f"Training the small network with {label}, {steps}:", flush=True)
            anew = run_dir not in there or (finished and len(there) == len(configs))
            results[label] = loop.train(config, run_dir, overwrite=anew)
        picture = self.output / "quickstart.png"
        plotting.plot(list(configs), picture)
        print(f"\n{_table(results)}")
        print(
            "\nErrors on the 1,000 held-out digits, pixels changed by at most eps = "
            f"{config.eps:g}. PGD: the share that an\nattack breaks. Verified: the share that the "
            "bounds cannot prove unbreakable. Lower is better.\n"
            f"The curves are in {picture}, the runs beside it."
        )


@dataclass(kw_only=True)
class Train(OnData):
    """Train and evaluate one network, and write a run folder.

    examples:
      cibp-fast train --preset mnist5k-small-0.1-cibp --run-dir runs/first
      cibp-fast train --preset mnist5k-medium-0.2-ibp --seed 1
      cibp-fast train --epochs 10 --eps 8/255 --lr-decay-at none
      cibp-fast train --steps 400 --eps-ramp 0,150 --kappa-ramp 30,400
      cibp-fast train --model package.module:factory --run-dir runs/own

    Attributes:
        run_dir: run folder
        overwrite: replace the run that the folder holds, finished or not
        device: device to train on
        seeds: train N runs, of --seed and the seeds after it, each in its own folder
        backend: kernels of the bounds: the device's where they can run (auto), those of the CPU
            alone (cpu), Triton's (triton), those with CUDA C++ where there are any (cuda), or plain
            PyTorch (torch)
        epochs: number of training epochs, in place of --steps
        model: own network in place of the preset's: a function that takes either (input_shape,
            classes) or nothing, and returns a torch.nn.Module of pixels
        recipe: Each replaces what the preset says; in brackets, what the default preset does.
    """

    preset: Annotated[str, arg(metavar="NAME", help=PRESET_GRAMMAR)] = DEFAULT_PRESET
    run_dir: Annotated[
        Path | None, DIR, arg(help_behavior_hint="(default: in runs, named by what is trained)")
    ] = None
    overwrite: Flag = False
    device: Annotated[str, DEVICE] = "cpu"
    seeds: Annotated[int, N] = 1
    backend: Literal["auto", "torch", "cpu", "triton", "cuda"] = "auto"
    epochs: Annotated[int | None, N, arg(help_behavior_hint="")] = None
    model: Model = None
    recipe: Recipe = field(default_factory=dict)

    def run(self) -> None:
        epochs = {} if self.epochs is None else {"epochs": self.epochs}
        config = preset(self.preset, **self.recipe, **epochs)
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise ValueError(f"seeds must be from 1 to {MOST_SEEDS}, not {self.seeds}")
        configs = [config.replace(seed=config.seed + index) for index in range(self.seeds)]
        from cibp_fast.training import loop, own

        factory = own_factory(self.model)
        if factory is not None and self.run_dir is None:
            raise ValueError("run_dir must be given where --model is: the folder of the run")
        if factory is not None and self.seeds > 1:
            own.require_new(factory, own.on_data_set(config, factory))
        run_dirs = [loop.default_run_dir(config) for config in configs]
        if self.run_dir is not None:
            parts = [f"seed{config.seed}" for config in configs] if self.seeds > 1 else [""]
            run_dirs = [self.run_dir / part for part in parts]
        results = {
            f"{config.name} seed {config.seed}": loop.train(
                config,
                run_dir,
                model=factory,
                data_root=self.data_root,
                verify_data=not self.unverified_data,
                device=self.device,
                backend=self.backend,
                overwrite=self.overwrite,
            )
            for config, run_dir in zip(configs, run_dirs, strict=True)
        }
        if not loop.world(self.device).first:
            return
        print(f"\n{_table(results)}\n")
        if len(results) > 1:
            print(f"{_spread(list(results.values()), 'test', 'pgd', 'verified')}\n")
        if config.validation:
            print(f"The errors are of {counted(config.validation, 'held-out training example')}.")
        print("\n".join(f"The run is in {run_dir}" for run_dir in run_dirs))


@dataclass(kw_only=True)
class Reproduce(OnData):
    """Make the paper's Table 2 and Figures 3 to 7 of runs, and train the runs that are missing.

    First it prints what has finished, what has begun, what is missing, and how long the rest takes.
    Finished runs are never touched, stopped ones go on, and a folder of another config is left
    alone. It writes table2.md, table2.json and fig3.png to fig7.png. In the folder of the runs it
    writes manifest.json, the SHA-256 of their files, by which it sees what has changed. The exit
    code is 2 where anything is wrong with a run.

    examples:
      cibp-fast reproduce all --plan
      cibp-fast reproduce table2 --only mnist-small --seeds 3 --jobs 2 --budget 8
      cibp-fast reproduce all --report

    Attributes:
        target: table2, fig3, fig4, fig5, fig6, fig7 or all
        only: train only runs whose preset has PATTERN in its name; * stands for anything
        seeds: train N runs of each preset, of seed 0 and those after it
        results: folder of the runs
        output: folder of the table and the figures
        plan: print what is to be trained, and stop
        report: train nothing: make the table and the figures of what is there
        budget: after so many hours save the state of what trains, and stop
        jobs: train N runs at a time; they share the threads, and each has its output in train.log
        device: device to train on
    """

    target: Annotated[Positional[str], arg(metavar="TARGET", help_behavior_hint="")]
    only: Annotated[str | None, word("PATTERN", str), arg(help_behavior_hint="")] = None
    seeds: Annotated[int, N] = 1
    results: Annotated[Path, DIR] = Path("results")
    output: Annotated[
        Path | None, DIR, arg(help_behavior_hint="(default: figures, in that of the runs)")
    ] = None
    plan: Flag = False
    report: Flag = False
    budget: Annotated[float | None, word("HOURS", float), arg(help_behavior_hint="")] = None
    jobs: Annotated[int, N] = 1
    device: Annotated[str, DEVICE] = "cpu"

    def run(self) -> None:
        from cibp_fast.training import reproduction

        targets = ("table2", *reproduction.FIGURES, "all")
        if self.target not in targets:
            allowed = f"{', '.join(targets[:-1])} or {targets[-1]}"
            raise ValueError(f"TARGET must be {allowed}, not {self.target!r}")
        for name, most in (("seeds", MOST_SEEDS), ("jobs", MOST_THREADS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be from 1 to {most}, not {getattr(self, name)}")
        if self.budget is not None and not 0 < self.budget < float("inf"):
            raise ValueError(f"budget must be a number of hours above 0, not {self.budget}")
        if self.plan and self.report:
            raise ValueError("reproduce takes either --plan or --report, neither trains")
        for name, given in (
            ("only", self.report and self.only is not None),
            ("jobs", self.report and self.jobs > 1),
            ("budget", (self.plan or self.report) and self.budget is not None),
        ):
            if given:
                raise ValueError(f"{name} must be left out where nothing is trained")
        import torch

        problems = reproduction.reproduce(
            self.target,
            results=self.results,
            output=self.results / "figures" if self.output is None else self.output,
            only=self.only,
            seeds=self.seeds,
            plan=self.plan,
            report=self.report,
            budget=None if self.budget is None else 3600 * self.budget,
            jobs=self.jobs,
            device=self.device,
            data_root=self.data_root,
            verify_data=not self.unverified_data,
            threads=torch.get_num_threads(),
        )
        for problem in problems:
            print(f"problem: {problem}", file=sys.stderr)
        if problems:
            raise ValueError(f"{counted(len(problems), 'problem')}, as listed above")


@dataclass(kw_only=True)
class OnNetworks(OnData):
    """Holds what the commands take that look at trained networks.

    Attributes:
        run_dir: folder that `cibp-fast train` wrote, of one run or of all runs of --seeds; or a
            file of weights, with --preset
        preset: preset of the network whose weights the file RUN_DIR holds, .safetensors, .pt, .pth
            or .ckpt; another program may have written it
        model: own network that was trained, or whose weights these are
    """

    run_dir: Annotated[Positional[Path], arg(metavar="RUN_DIR", help_behavior_hint="")]
    preset: Annotated[str | None, word("NAME", str), arg(help_behavior_hint="")] = None
    model: Model = None

    def networks(self) -> list[Network]:
        """Returns the trained networks: several of a folder of seeds."""
        from cibp_fast.training import checkpoints, own, runs

        factory = own_factory(self.model)
        if self.preset is not None:
            config = preset(self.preset)
            if factory is not None:
                config = own.on_data_set(config, factory)
            return [runs.read_weights(self.run_dir, config, factory)]
        if self.run_dir.suffix in checkpoints.SUFFIXES and self.run_dir.is_file():
            raise ValueError(
                f"{self.run_dir} is a file of weights: name its network with --preset NAME"
            )
        found = [runs.read_network(each, factory) for each in runs.of_seeds(self.run_dir)]
        if factory is not None and len(found) > 1 and isinstance(found[0].config, OwnConfig):
            own.require_new(factory, found[0].config)
        return found

    def network(self) -> Network:
        """Returns the only one. Raises ValueError of a folder of seeds."""
        found = self.networks()
        if len(found) > 1:
            raise ValueError(
                f"{self.run_dir} holds {len(found)} runs, but files are written for one: name it, "
                f"such as {self.run_dir / found[0].name}"
            )
        return found[0]

    def test_examples(self, config: Config, count: int | None, device: str) -> Split:
        """Returns the first held-out examples, or all where count is None."""
        from cibp_fast.training import datasets
        from cibp_fast.training.distributed import available

        if config.dataset not in datasets.DATASETS:
            raise ValueError(
                f"{self.run_dir} is a run of data that only Python has: take cf.load and "
                "cf.evaluate, cf.certify, cf.attacks.pgd or cf.export there"
            )
        where, verify = available(device), not self.unverified_data
        split = datasets.load(config.dataset, self.data_root, verify=verify).test
        count = len(split) if count is None else count
        if not 1 <= count <= len(split):
            raise ValueError(
                f"examples must be from 1 to the {len(split)} of the test set, not {count}"
            )
        return split[:count].to(where)


@dataclass(kw_only=True)
class Evaluation(OnNetworks):
    """Holds what the commands take that find an error of trained networks.

    Attributes:
        device: device to compute on
        examples: take the first N held-out examples only
    """

    device: Annotated[str, DEVICE] = "cpu"
    examples: Annotated[int | None, N, arg(help_behavior_hint="(default: all)")] = None
    changes: Annotated[Changes, arg(name="")] = field(default_factory=dict)

    def report(
        self,
        kind: str,
        name: str,
        networks: Sequence[Network],
        evaluate: Callable[[Network, Split], dict[str, Any]],
        **changes: Any,
    ) -> None:
        """Prints the error of each network, and the spread of several.

        evaluate: gives the errors of a network with the config of this evaluation. changes: of the
        networks' Config, besides the user's.
        """
        errors = []
        for network in networks:
            config = network.config.replace(**self.changes | changes)
            split = self.test_examples(config, self.examples, self.device)
            network.model.to(split.images.device)
            errors.append(evaluate(replace(network, config=config), split))
            error, total = errors[-1][f"{kind}_error"], len(split)
            count = f"{round(error * total)} of {total} held-out examples"
            space = " (normalised)" if config.eps_space == "normalized" else ""
            print(
                f"{network.name + ': ' if len(networks) > 1 else ''}{name} at eps {config.eps:.4g}"
                f"{space}: {100 * error:.2f} % ({count})"
            )
        if len(errors) > 1:
            print(_spread(errors, kind))


@dataclass(kw_only=True)
class Certify(Evaluation):
    """Bound a trained network on its held-out examples: the verified error.

    With --output it also writes all that another program needs to check it: the weights, the inputs
    and a line for each example. The same command goes on with a certification that was stopped.

    examples:
      cibp-fast certify runs/first --eps 0.05
      cibp-fast certify runs/first --semantics float32 --output certificates/first
      cibp-fast certify weights.pt --preset mnist-small-0.4-cibp

    Attributes:
        semantics: what is proven: the network with the stored weights in exact arithmetic (real),
            or every float32 evaluation of it (float32); none: ordinary bounds, in rounded
            arithmetic, which are no proof
        output: folder of the certificates
        overwrite: replace the certificates that the folder holds, finished or not
    """

    semantics: Literal["real", "float32", "none"] = "real"
    output: Annotated[Path | None, DIR, arg(help_behavior_hint="")] = None
    overwrite: Flag = False

    def run(self) -> None:
        if self.output is None and self.overwrite:
            raise ValueError("overwrite must come with --output, whose certificates it replaces")
        if self.output is not None and self.semantics == "none":
            raise ValueError(
                "semantics must be real or float32 to write certificates, not none: ordinary "
                "bounds are no proof"
            )
        from cibp_fast.training import certification
        from cibp_fast.training.evaluation import evaluate

        semantics = None if self.semantics == "none" else self.semantics

        def found(network: Network, split: Split) -> dict[str, Any]:
            if self.output is None:
                model, config = network.model, network.config
                return evaluate(model, split, config, attack=False, semantics=semantics)
            return certification.certify_to(
                self.output, network, split, self.semantics, overwrite=self.overwrite
            )

        networks = self.networks() if self.output is None else [self.network()]
        self.report("verified", "verified error", networks, found)
        said = {
            "real": "sound: real (proven for the stored weights in exact arithmetic)",
            "float32": "sound: float32 (proven for every evaluation in float32)",
            "none": "sound: false (these bounds are computed in rounded arithmetic: no proof)",
        }
        print(said[self.semantics])
        if self.output is not None:
            print(f"The certificates are in {self.output}")


@dataclass(kw_only=True)
class Audit(Command):
    """Check a folder of certificates with another program, which has a proof of its own.

    It computes the bounds anew, from the files alone, in a process that imports neither torch nor
    the rest of cibp_fast. That program is one file, cibp_fast/check_certificates.py, which also
    runs elsewhere.

    examples:
      cibp-fast audit certificates/first
      cibp-fast audit certificates/first --sample 0 --threads 2

    Attributes:
        folder: folder that `cibp-fast certify --output` wrote
        threads: number of processes at a time, of one thread each
        weights: safetensors file in place of the folder's; it must be the same
        inputs: npz file in place of the folder's; it must hold the same
        sample: check N examples only, drawn by the hashes of the files; 0: all
    """

    folder: Annotated[Positional[Path], arg(metavar="FOLDER", help_behavior_hint="")]
    threads: Annotated[int | None, N, arg(help_behavior_hint="(default: all processors)")] = None
    weights: Annotated[Path | None, word("FILE", Path), arg(help_behavior_hint="")] = None
    inputs: Annotated[Path | None, word("FILE", Path), arg(help_behavior_hint="")] = None
    sample: Annotated[
        int | None, N, arg(help_behavior_hint="(default: all, or 100 of a large network's)")
    ] = None

    def run(self) -> None:
        import subprocess

        if not (self.folder / "result.json").is_file():
            raise FileNotFoundError(
                f"{self.folder} is not a folder of certificates: result.json is missing"
            )
        if self.sample is not None and self.sample < 0:
            raise ValueError(f"sample must be 0 or more, not {self.sample}")
        checker = Path(__file__).with_name("check_certificates.py")
        given = (
            ("weights", self.weights),
            ("inputs", self.inputs),
            ("sample", self.sample),
            ("jobs", self.threads),
        )
        options = [f"--{name}={value}" for name, value in given if value is not None]
        command = [sys.executable, "-I", str(checker), *options, "--", str(self.folder)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)  # what it prints is shown
        if done.returncode == 1:
            raise ValueError(f"{self.folder}: certificates are refuted, as listed above")
        if done.returncode == 2:
            raise ValueError(done.stderr.strip())
        if done.returncode:
            raise RuntimeError(f"the checker of certificates broke off:\n{done.stderr}")


@dataclass(kw_only=True)
class Attack(Evaluation):
    """Attack a trained network on its held-out examples with PGD.

    examples:
      cibp-fast attack runs/first --steps 200 --restarts 10 --examples 100
      cibp-fast attack runs/first --step adam --loss margin --step-size 0.1

    Attributes:
        step: what a step does: go --step-size by the gradient's sign, the usual PGD (sign); or take
            Adam's step with --step-size as its learning rate, shorter where gradients turn (adam)
        loss: what the steps climb: differences of logits, first of all wrong classes together, then
            of the strongest, and of one class in each third start (auto); that of the strongest
            wrong class alone (margin); or the cross-entropy, usual in papers, whose gradient is 0
            in float32 where the network is very sure (cross_entropy)
        steps: number of steps of each start
        restarts: number of random starts, besides the example itself
        step_size: size of a step, in the units of eps; none: 2.5 eps / steps
        seed: seed of the random starts
    """

    step: Literal["sign", "adam"] = "sign"
    loss: Literal["auto", "cross_entropy", "margin"] = "auto"
    steps: Annotated[int, N] = 200
    restarts: Annotated[int, N] = 10
    step_size: Annotated[Any, word("S", partial(parse, "pgd_step_size"))] = 0.01
    seed: Annotated[int, N] = 0

    def run(self) -> None:
        from cibp_fast.training.evaluation import evaluate

        def found(network: Network, split: Split) -> dict[str, Any]:
            model, config = network.model, network.config
            errors = evaluate(model, split, config, step=self.step, loss=self.loss)
            if errors["contradictions"]:
                warnings.warn(
                    f"{self.run_dir}: ordinary bounds verify {errors['contradictions']} of "
                    f"{len(split)} examples that the attack breaks, so they are wrong",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return errors

        self.report(
            "pgd",
            f"PGD error ({counted(self.steps, 'step')}, {counted(self.restarts, 'restart')})",
            self.networks(),
            found,
            pgd_steps=self.steps,
            pgd_restarts=self.restarts,
            pgd_verified_restarts=self.restarts,
            pgd_step_size=self.step_size,
            seed=self.seed,
        )


@dataclass(kw_only=True)
class Export(OnNetworks):
    """Write a trained network and its properties for other verifiers: ONNX and VNN-LIB.

    It needs the extra export. Each example-<index>.vnnlib asks for a point of the example's box
    that is classified otherwise; instances.csv lists them as VNN-COMP does.

    examples:
      cibp-fast export runs/first
      cibp-fast export runs/first --eps 0.05 --examples 20 --output exported

    Attributes:
        output: folder of network.onnx, the properties and instances.csv
        overwrite: replace what an earlier export wrote there
        examples: take the first N held-out examples, whatever the network says of them
        timeout: number of seconds for an example, in instances.csv
    """

    output: Annotated[
        Path | None, DIR, arg(help_behavior_hint="(default: in export, named as the run)")
    ] = None
    overwrite: Flag = False
    examples: Annotated[int, N] = 100
    timeout: Annotated[int, N] = 100
    changes: Annotated[Radius, arg(name="")] = field(default_factory=dict)

    def run(self) -> None:
        from cibp_fast.training import export

        export.require_onnx()  # now, not after the data
        network = self.network()
        network = replace(network, config=network.config.replace(**self.changes))
        split = self.test_examples(network.config, self.examples, "cpu")
        folder = Path("export") / network.name if self.output is None else self.output
        export.export_run(folder, network, split, timeout=self.timeout, overwrite=self.overwrite)
        count = counted(len(split), "example")
        print(f"wrote {folder}: network.onnx, instances.csv and the properties of {count}")


@dataclass(kw_only=True)
class Plot(Command):
    """Draw the errors and bound widths of one or several runs, or a preset's schedules.

    Runs of one config that differ in their seed become one curve, their mean, in a band from the
    least to the greatest. Runs that cannot be compared, since their data set, radius or clipping
    differs, have axes of their own; so have other networks' widths. It needs the extra plot.

    examples:
      cibp-fast plot runs/ibp runs/cibp -o curves.png
      cibp-fast plot --preset mnist-large-0.3-cibp -o schedules.png

    Attributes:
        run_dirs: folders that `cibp-fast train` wrote, each of one run or of all runs of --seeds
        preset: draw eps, kappa and the learning rate of this preset, in place of runs
        output: file of the picture, .png, .pdf or .svg
    """

    run_dirs: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="[RUN_DIR ...]", help_behavior_hint="")
    ] = ()
    preset: Annotated[str | None, word("NAME", str), arg(help_behavior_hint="")] = None
    output: Annotated[Path, word("FILE", Path), arg(aliases=("-o",))]

    def run(self) -> None:
        if bool(self.run_dirs) == (self.preset is not None):
            raise ValueError("plot takes either run folders or --preset NAME")
        from cibp_fast.training import plotting, runs

        if self.preset is None:
            run_dirs = [each for run_dir in self.run_dirs for each in runs.of_seeds(run_dir)]
            plotting.plot(run_dirs, self.output)
        else:
            config = preset(self.preset)
            plotting.plot_schedules(config, self.output, epoch_steps(dict(config)))
        print(f"wrote {self.output}")


COMMANDS: dict[str, type[Command]] = {
    kind.__name__.lower(): kind
    for kind in map(
        own_first, (Info, Quickstart, Train, Reproduce, Certify, Audit, Attack, Export, Plot)
    )
}


def own_factory(text: str | None) -> Callable[..., Any] | None:
    """Returns what --model names, None where it was not given."""
    from cibp_fast.training import own

    return None if text is None else own.imported(text)


def _table(results: Mapping[str, dict[str, Any]]) -> str:
    """Returns test, PGD and verified error of each result, a row each, aligned."""
    first = next(iter(results.values()))
    indent = max(len(name) for name in results)
    attack = f"PGD ({counted(first['pgd_steps'], 'step')})"
    rows = [f"{'':{indent}}  {'test error':>12}  {attack:>16}  {'verified':>10}  {'time':>8}"]
    for name, result in results.items():
        errors = (result[f"{kind}_error"] for kind in ("test", "pgd", "verified"))
        cells = [f"{100 * e:{size}.1f} %" for e, size in zip(errors, (10, 14, 8), strict=True)]
        rows.append("  ".join([f"{name:{indent}}", *cells, f"{result['seconds']:6.0f} s"]))
    return "\n".join(rows)


def _spread(results: Sequence[Mapping[str, Any]], *kinds: str) -> str:
    """Returns mean and standard deviation (of the sample) of the errors over the seeds."""
    errors = {kind: [100 * result[f"{kind}_error"] for result in results] for kind in kinds}
    texts = [f"{kind} {fmean(of):.2f} +- {stdev(of):.2f} %" for kind, of in errors.items()]
    return f"mean and standard deviation of {len(results)} seeds: {', '.join(texts)}"
