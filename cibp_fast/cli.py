"""The command line `cibp-fast` (also `python -m cibp_fast`)."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NoReturn, get_type_hints

import torch
from torch import Tensor, nn

from cibp_fast import environment
from cibp_fast._graphs import reuse_graphs
from cibp_fast.ops import backends
from cibp_fast.training import datasets, loop, plotting, runs
from cibp_fast.training.config import PRESET_GRAMMAR, Config, parse, preset
from cibp_fast.training.distributed import available, is_first
from cibp_fast.training.evaluation import broken, certificate, inputs
from cibp_fast.training.progress import bar

DEFAULT_PRESET = "mnist5k-small-0.1-cibp"

MOST_THREADS = 1024  # beyond it the system may refuse to start them, which ends the process

# What a user can cause: each message names the thing. Anything else is a bug, with a traceback.
USER_ERRORS = (
    *(ValueError, OSError, ImportError, NotImplementedError, FloatingPointError),
    torch.OutOfMemoryError,  # of a GPU
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0, or 2 for bad input (with one line on stderr), or 130 for Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    options.words = sys.argv[1:] if arguments is None else list(arguments)  # to be repeated
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        if options.threads is not None:
            if not 1 <= options.threads <= MOST_THREADS:
                raise ValueError(f"threads must be from 1 to {MOST_THREADS}, not {options.threads}")
            torch.set_num_threads(options.threads)
        options.command(options)
    except KeyboardInterrupt as interrupt:
        if is_first():
            print(f"\ncibp-fast: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if is_first():  # an error in any of torchrun's processes is raised in all
            print(f"cibp-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, like an error; a torchrun's processes all have the same to say."""
    if is_first():
        print(f"cibp-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _info(options: argparse.Namespace) -> None:
    facts = [*environment.versions().items(), *backends.describe()]
    indent = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        print(f"{name:<{indent}}" + value.replace("\n", "\n" + " " * indent))


def _train(options: argparse.Namespace) -> None:
    given = {option.name: getattr(options, option.name) for option in fields(Config)}
    overrides = {
        name: parse(name, value) if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }
    config = preset(options.preset, **overrides)
    if options.seeds < 1:
        raise ValueError(f"seeds must be 1 or more, not {options.seeds}")
    configs = [replace(config, seed=config.seed + index) for index in range(options.seeds)]
    run_dirs = [loop.default_run_dir(config) for config in configs]
    if options.run_dir is not None:
        parts = [f"seed{config.seed}" for config in configs] if options.seeds > 1 else [""]
        run_dirs = [options.run_dir / part for part in parts]
    results = {}
    for config, run_dir in zip(configs, run_dirs, strict=True):
        results[f"{config.name} seed {config.seed}"] = loop.train(
            config,
            run_dir,
            data_root=options.data_root,
            verify_data=not options.unverified_data,
            device=options.device,
            backend=options.backend,
            overwrite=options.overwrite,
        )
    if not is_first():
        return
    print(f"\n{_table(results)}\n")
    if len(results) > 1:
        print(f"{_spread(list(results.values()))}\n")
    print("\n".join(f"The run is in {run_dir}" for run_dir in run_dirs))


def _certify(options: argparse.Namespace) -> None:
    config, model, split = _trained(options)
    with reuse_graphs():
        verified = torch.cat(
            [
                certificate(model, inputs(config, part), part.labels, config).verified
                for _, part in _parts(split, config, "certifying")
            ]
        )
    print(_share("verified error", ~verified, config))
    print("sound: false (these bounds are computed in rounded arithmetic and are not yet a proof)")


def _attack(options: argparse.Namespace) -> None:
    config, model, split = _trained(options)
    step_size = parse("pgd_step_size", options.step_size)
    config = replace(config, pgd_steps=options.steps, pgd_step_size=step_size, seed=options.seed)
    with reuse_graphs():
        found = torch.cat(
            [
                broken(model, inputs(config, part), part.labels, config, options.restarts, first)
                for first, part in _parts(split, config, "attacking")
            ]
        )
    name = f"PGD error ({options.steps} steps, {options.restarts} restarts)"
    print(_share(name, found, config))


def _plot(options: argparse.Namespace) -> None:
    if bool(options.run_dirs) == (options.preset is not None):
        raise ValueError("plot takes either run folders or --preset NAME")
    if options.preset is None:
        plotting.plot(options.run_dirs, options.output)
    else:
        config = preset(options.preset)
        epoch_steps = datasets.SIZES[config.dataset][0] // config.batch_size
        plotting.plot_schedules(config, options.output, epoch_steps)
    print(f"wrote {options.output}")


def _quickstart(options: argparse.Namespace) -> None:
    plotting.require_matplotlib()  # now, not after the training
    results, run_dirs = {}, []
    for method in ("ibp", "cibp"):
        config = preset(f"mnist5k-small-0.1-{method}", seed=options.seed)
        label = plotting.METHOD_LABELS[method]
        print(f"Training the small network with {label}, {config.steps} steps:", flush=True)
        run_dirs.append(options.output / config.name)
        results[label] = loop.train(config, run_dirs[-1], overwrite=True)
    picture = options.output / "quickstart.png"
    plotting.plot(run_dirs, picture)
    print(f"\n{_table(results)}")
    print(
        f"\nErrors on the 1,000 held-out digits, pixels changed by at most eps = {config.eps:g}. "
        "PGD: the share that an\nattack breaks. Verified: the share that the bounds cannot prove "
        "unbreakable. Lower is better.\n"
        f"The curves are in {picture}, the runs beside it."
    )


def _trained(options: argparse.Namespace) -> tuple[Config, nn.Module, datasets.Split]:
    """A run's config (with --eps and --eval-batch-size), its network, and its first --examples
    held-out examples, both on --device.
    """
    device = available(options.device)
    config = runs.read_config(options.run_dir)
    if options.eps is not None:
        config = replace(config, eps=options.eps)
    if options.eval_batch_size is not None:
        config = replace(config, eval_batch_size=options.eval_batch_size)
    model = runs.read_model(options.run_dir)
    verify = not options.unverified_data
    split = datasets.load(config.dataset, options.data_root, verify=verify).test
    count = len(split) if options.examples is None else options.examples
    if not 1 <= count <= len(split):
        raise ValueError(
            f"examples must be from 1 to the {len(split)} of the test set, not {count}"
        )
    return config, model.to(device), split[:count].to(device)


def _parts(
    split: datasets.Split, config: Config, description: str
) -> Iterable[tuple[int, datasets.Split]]:
    """The split in the config's evaluation batches, each with the number of its first example."""
    for first in bar(range(0, len(split), config.eval_batch_size), description, "batch"):
        yield first, split[first : first + config.eval_batch_size]


def _share(name: str, chosen: Tensor, config: Config) -> str:
    count, total = int(chosen.sum()), len(chosen)
    percent = 100 * count / total
    space = " (normalised)" if config.eps_space == "normalized" else ""
    share = f"{percent:.2f} % ({count} of {total} held-out examples)"
    return f"{name} at eps {config.eps:.4g}{space}: {share}"


def _table(results: Mapping[str, dict[str, Any]]) -> str:
    """Test, PGD and verified error of each result, a row each, aligned."""
    first = next(iter(results.values()))
    indent = max(len(name) for name in results)
    attack = f"PGD ({first['pgd_steps']} steps)"
    rows = [f"{'':{indent}}  {'test error':>12}  {attack:>16}  {'verified':>10}  {'time':>8}"]
    for name, result in results.items():
        test, attacked, verified = (
            100 * result[f"{kind}_error"] for kind in ("test", "pgd", "verified")
        )
        rows.append(
            f"{name:{indent}}  {test:10.1f} %  {attacked:14.1f} %  {verified:8.1f} %  "
            f"{result['seconds']:6.0f} s"
        )
    return "\n".join(rows)


def _spread(results: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation (of the sample) of the errors over the seeds."""
    texts = []
    for kind in ("test", "pgd", "verified"):
        errors = [100 * result[f"{kind}_error"] for result in results]
        texts.append(f"{kind} {fmean(errors):.2f} +- {stdev(errors):.2f} %")
    return f"mean and standard deviation of {len(results)} seeds: {', '.join(texts)}"


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other error of the command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"cibp-fast: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cibp-fast",
        description="Train and certify provably robust networks with interval bounds.",
        epilog="examples:\n"
        "  cibp-fast quickstart                    two networks on 5,000 digits, a few minutes\n"
        f"  cibp-fast train --preset {DEFAULT_PRESET} --run-dir runs/first\n"
        "  cibp-fast certify runs/first --eps 0.05\n"
        "  cibp-fast attack runs/first --steps 200 --restarts 10\n"
        "  cibp-fast plot runs/first -o curves.png\n"
        "  cibp-fast info                          what is installed, which kernel runs and why",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Any, help: str, epilog: str = "", among: Any = commands
    ) -> argparse.ArgumentParser:
        added = among.add_parser(
            name,
            help=help,
            description=help,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=run)
        added.add_argument(
            "--threads", type=int, metavar="N", help="processor threads (default: torch's choice)"
        )
        return added

    command("info", _info, "Show versions, the processor, and which kernel runs where and why.")

    quickstart = command(
        "quickstart",
        _quickstart,
        "Train the small network on 5,000 digits with IBP and with constrained IBP, and compare.",
        "Needs the extra demo. Runs of an earlier quickstart in the same folder are replaced.",
    )
    quickstart.add_argument(
        "--output", type=Path, default=Path("quickstart"), metavar="DIR", help="default: quickstart"
    )
    quickstart.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")

    train = command(
        "train",
        _train,
        "Train and evaluate one network, and write a run folder.",
        f"{PRESET_GRAMMAR}\n\nexamples:\n"
        f"  cibp-fast train --preset {DEFAULT_PRESET} --run-dir runs/first\n"
        "  cibp-fast train --preset mnist5k-medium-0.2-ibp --seed 1\n"
        "  cibp-fast train --steps 400 --lr-decay-at none --eps-ramp 0,150 --kappa-ramp 30,400",
    )
    train.add_argument(
        "--preset",
        default=DEFAULT_PRESET,
        metavar="NAME",
        help=f"recipe (default: {DEFAULT_PRESET})",
    )
    train.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="run folder (default: runs/NAME-seedN, NAME from the recipe)",
    )
    train.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run that the folder holds, finished or not",
    )
    train.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="N runs, of --seed and the seeds after it, each in its own folder (default: 1)",
    )
    train.add_argument(
        "--backend",
        default="auto",
        choices=backends.BACKENDS,
        help="of the bounds: the device's kernels where they can run (auto, default), those of the "
        "CPU (cpu), Triton's (triton), those with CUDA C++ kernels where there are any (cuda), or "
        "none (torch)",
    )
    recipe = train.add_argument_group(
        "recipe", f"Each replaces what the preset says: in brackets, what {DEFAULT_PRESET} does."
    )
    shown, hints = preset(DEFAULT_PRESET), get_type_hints(Config)
    for option in fields(Config):
        flag, text = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        value = getattr(shown, option.name)
        text += f" [{','.join(map(str, value)) if isinstance(value, tuple) else value}]"
        if hints[option.name] is bool:
            recipe.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            choices = option.metadata["choices"]
            recipe.add_argument(flag, metavar="|".join(choices) if choices else "VALUE", help=text)

    certify_run = command(
        "certify", _certify, "Bound a trained network on its held-out examples: the verified error."
    )
    attack = command(
        "attack",
        _attack,
        "Attack a trained network on its held-out examples with PGD.",
        "example:\n  cibp-fast attack runs/first --steps 200 --restarts 10 --examples 100",
    )
    for trained in (certify_run, attack):
        trained.add_argument(
            "run_dir", type=Path, metavar="RUN_DIR", help="folder that `cibp-fast train` wrote"
        )
        trained.add_argument(
            "--eps", type=float, metavar="EPS", help="radius of the box (default: the run's)"
        )
        trained.add_argument(
            "--examples", type=int, metavar="N", help="only the first N (default: all)"
        )
        trained.add_argument(
            "--eval-batch-size",
            type=int,
            metavar="N",
            help="examples at a time (default: the run's)",
        )
    for reader in (train, certify_run, attack):
        reader.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
        reader.add_argument(
            "--data-root",
            type=Path,
            metavar="DIR",
            help="folder of the data sets (default: $CIBP_FAST_DATA, or data)",
        )
        reader.add_argument(
            "--unverified-data",
            action="store_true",
            help="only warn of data files that are not the official ones",
        )
    attack.add_argument("--steps", type=int, default=200, metavar="N", help="default: 200")
    attack.add_argument(
        "--restarts", type=int, default=10, metavar="N", help="random starts (default: 10)"
    )
    attack.add_argument(
        "--step-size", default="0.01", metavar="S", help="or none: 2.5 eps / steps (default: 0.01)"
    )
    attack.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random starts (default: 0)"
    )

    plot = command(
        "plot",
        _plot,
        "Draw the errors and bound widths of one or several runs, or a preset's schedules.",
        "Runs of one config that differ in their seed become one curve, their mean, in a band\n"
        "from the least to the greatest. Runs that cannot be compared, since their data set,\n"
        "radius or clipping differs, have axes of their own; so have other networks' widths.\n\n"
        "examples:\n"
        "  cibp-fast plot runs/ibp runs/cibp -o curves.png\n"
        "  cibp-fast plot --preset cifar10-large-8of255-cibp-normalized -o schedules.png",
    )
    plot.add_argument(
        "run_dirs",
        type=Path,
        nargs="*",
        metavar="RUN_DIR",
        help="folder that `cibp-fast train` wrote",
    )
    plot.add_argument("--preset", metavar="NAME", help="draw this recipe's eps, kappa and lr")
    plot.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=".png, .pdf or .svg"
    )
    return parser
