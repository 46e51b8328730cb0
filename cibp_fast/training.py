"""The training loop: data, model, schedules, loss, steps, evaluation."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cibp_fast import __version__, _backend, data, losses, runs
from cibp_fast.attacks import pgd
from cibp_fast.bounds import bounds
from cibp_fast.certificates import Certificate, certify, evaluation, predict
from cibp_fast.config import Config
from cibp_fast.interval import Interval


def train(
    config: Config, run_dir: str | Path | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Trains and evaluates one network, fills the run folder, and returns its result.json.

    run_dir: `default_run_dir(config)` where None. The same config and number of threads give the
    same numbers bitwise on the same machine; torch's global random state is left as it was. Raises
    ValueError where the config does not fit the data, FileExistsError where the folder holds a run
    and not overwrite, OSError where it cannot be written (all before training starts), and
    FloatingPointError where the loss is no longer finite (the metrics are kept) or the attack
    breaks an example that the bounds verify (the result is kept).
    """
    run_dir = default_run_dir(config) if run_dir is None else Path(run_dir)
    dataset = data.load(config.dataset)
    epoch_steps = len(dataset.train) // config.batch_size
    if not epoch_steps:
        raise ValueError(
            f"batch_size must be at most the {len(dataset.train)} training examples, "
            f"not {config.batch_size}"
        )
    for split in (dataset.train, dataset.test):
        Interval.ball(split.pixels(), 0.0, config.clip)  # raises where x is outside clip
    environment = {"versions": versions(), "hardware": hardware()}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = runs.build_model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    eps, kappa, lr = config.eps_schedule(), config.kappa_schedule(), config.lr_schedule()

    runs.create(run_dir, config, overwrite)  # last: what fails before leaves nothing behind
    started = time.perf_counter()
    records: list[dict[str, Any]] = []
    epochs = math.ceil(config.steps / epoch_steps)
    with _Progress(config, epochs) as progress:
        for epoch in range(1, epochs + 1):
            first = (epoch - 1) * epoch_steps
            shuffled = data.batches(dataset.train, config.batch_size, seed=config.seed, epoch=epoch)
            totals = torch.zeros((), dtype=torch.float64)
            for step, (x, y) in enumerate(islice(shuffled, config.steps - first), start=first):
                optimizer.param_groups[0]["lr"] = lr(step)
                loss, logged = _loss(model, x, y, eps(step), kappa(step), config)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                totals = totals + logged
                progress.advance()

            means = [value / (step + 1 - first) for value in totals.tolist()]
            record: dict[str, Any] = {
                "epoch": epoch,
                "step": step + 1,
                "eps": eps(step),
                "kappa": kappa(step),
                "lr": lr(step),
                **dict(
                    zip(("loss", "nominal", "robust", "width", "train_error"), means, strict=False)
                ),
                "widths": means[5:],
                "test_error": None,
                "verified_error": None,
            }
            if epoch % config.eval_every == 0 or epoch == epochs:
                record |= _bounds_errors(model, dataset.test, config)
            record["seconds"] = round(time.perf_counter() - started, 3)
            records.append(_finite_or_none(record))
            runs.write_metrics(run_dir, records)
            progress.report(records[-1])
            if not math.isfinite(means[0]):
                raise FloatingPointError(
                    f"training diverged: the loss of epoch {epoch} is {means[0]}, see {run_dir}"
                )
    train_seconds = time.perf_counter() - started
    runs.write_model(run_dir, model)

    errors = evaluate(model, dataset.test, config)
    result = {
        "dataset": config.dataset,
        "model": config.net,
        "method": config.method,
        "seed": config.seed,
        **errors,
        "eps": config.eps,
        "eps_space": "pixel",
        "eps_pixel": config.eps,
        "clip": None if config.clip is None else list(config.clip),
        "precision": "float32",
        "sound": False,
        "semantics": None,
        "seconds": round(time.perf_counter() - started, 3),
        "train_seconds": round(train_seconds, 3),
        **environment,
    }
    runs.write_result(run_dir, result)
    if result["contradictions"]:
        raise FloatingPointError(
            f"the bounds verify {result['contradictions']} of {result['examples']} examples that "
            f"the attack breaks, so they are wrong: see {run_dir / 'result.json'}"
        )
    return result


def default_run_dir(config: Config) -> Path:
    """`runs/{dataset}-{net}-{eps}-{method}-seed{seed}`."""
    return Path("runs") / f"{config.name}-seed{config.seed}"


def _loss(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, kappa: float, config: Config
) -> tuple[Tensor, Tensor]:
    """The loss of a batch x [B, C, H, W], y [B], and what is logged of it.

    That is float64 [5 + K]: loss, nominal, robust, width, error, and the K widths (mean or sum, as
    configured); for the nominal method robust and width are NaN and there are no widths, since it
    computes no bounds.
    """
    if config.method == "nominal":
        logits = model(x)
        loss = losses.nominal_loss(logits, y)
        nothing = loss.new_full((), math.nan)
        parts, widths = losses.Terms(loss, nothing, nothing), loss.new_empty(0)
    else:
        box = Interval.ball(x, eps, config.clip)
        out = bounds(model, x, box, width=config.width, reduction=config.width_reduction)
        parts = losses.terms(out, y, elide=config.elide)
        loss = parts.total(kappa, config.width_weight)
        logits, widths = out.logits, out.widths
    with torch.no_grad():
        error = (predict(logits) != y).mean(dtype=loss.dtype)
        logged = torch.cat([torch.stack([loss, *parts, error]), widths])
    return loss, logged.double()


def evaluate(model: nn.Module, split: data.Split, config: Config) -> dict[str, Any]:
    """Test, PGD and verified error, each in [0, 1], with PGD's settings and the number of examples.

    NaN is never right and never verified. `contradictions` counts the examples that are verified
    and yet broken: more than 0 shows that the bounds are wrong.
    """
    x, y = split.pixels(), split.labels
    with evaluation(model), torch.no_grad():
        predicted = torch.cat([predict(model(part)) for part in x.split(config.eval_batch_size)])
    wrong = predicted != y
    verified = certificate(model, x, y, config).verified
    attack = pgd(
        model,
        x,
        y,
        config.eps,
        steps=config.pgd_steps,
        restarts=config.pgd_restarts,
        step_size=config.pgd_step_size,
        clip=config.clip,
        seed=config.seed,
        batch_size=config.eval_batch_size,
    )
    broken = attack.found | wrong
    return {
        "test_error": _share(wrong),
        "pgd_error": _share(broken),
        "pgd_steps": config.pgd_steps,
        "pgd_restarts": config.pgd_restarts,
        "pgd_step_size": config.pgd_step_size,
        "verified_error": _share(~verified),
        "examples": len(split),
        "contradictions": int((broken & verified).sum()),
    }


def certificate(model: nn.Module, x: Tensor, y: Tensor, config: Config) -> Certificate:
    """The ordinary bounds of examples x [N, C, H, W], y [N] in the config's box."""
    return certify(
        model, x, y, config.eps, config.clip, sound=False, batch_size=config.eval_batch_size
    )


def _bounds_errors(model: nn.Module, split: data.Split, config: Config) -> dict[str, float]:
    """Test and verified error of one pass of bounds, for the curves."""
    x, y = split.pixels(), split.labels
    found = certificate(model, x, y, config)
    return {
        "test_error": _share(found.predicted != y),
        "verified_error": _share(~found.verified),
    }


def _share(chosen: Tensor) -> float:
    """How many of chosen [N] bool are true, in [0, 1]."""
    return int(chosen.sum()) / len(chosen)


def _finite_or_none(value: Any) -> Any:
    """NaN and infinity as None, which JSON can say, inside dicts and lists."""
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class _Progress:
    """A tqdm bar on a terminal (with tqdm installed), else one fixed-format line an epoch."""

    config: Config
    epochs: int
    bar: Any = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return self
            self.bar = tqdm(
                total=self.config.steps, desc=self.config.name, unit="step", dynamic_ncols=True
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def report(self, record: dict[str, Any]) -> None:
        errors = "  ".join(
            f"{name} {_percent(record[f'{name}_error'])}" for name in ("train", "test", "verified")
        )
        if self.bar is not None:
            self.bar.set_postfix_str(errors)
            return
        loss, width = (
            math.nan if record[key] is None else record[key] for key in ("loss", "width")
        )
        print(
            f"epoch {record['epoch']:4d}/{self.epochs}  step {record['step']:6d}  "
            f"eps {record['eps']:.4f}  kappa {record['kappa']:.3f}  lr {record['lr']:.0e}  "
            f"loss {loss:8.4f}  width {width:8.2e}  {errors}  {record['seconds']:7.1f} s",
            flush=True,
        )


def _percent(error: float | None) -> str:
    return "    - %" if error is None else f"{100 * error:5.1f} %"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cibp_fast": __version__,
    }


def hardware() -> dict[str, Any]:
    """The processor, its cores and torch's threads; nothing that names the machine."""
    kernels, _ = _backend.in_use(torch.device("cpu"), torch.float32)
    return {
        "cpu": _backend.processor(),
        "kernels": kernels,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
