"""What a person sees of a long run: a bar on a terminal, fixed-format lines elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from cibp_fast.training.config import Config

Item = TypeVar("Item")


def bar(items: Iterable[Item], description: str, unit: str, shown: bool = True) -> Iterable[Item]:
    """The items, counted by a tqdm bar that vanishes at the end, on a terminal."""
    made = _tqdm(items, desc=description, unit=unit, leave=False) if shown else None
    return items if made is None else made


def describe(config: Config, epoch_steps: int) -> str:
    """A line about the run that is about to start, with eps in pixels."""
    pixels = config.eps_pixel if isinstance(config.eps_pixel, tuple) else (config.eps_pixel,)
    of_255 = ", ".join(f"{255 * eps:.3g}" for eps in pixels)
    space = "" if config.eps_space == "pixel" else " in normalised pixels"
    clip = "not clipped" if config.clip is None else f"clipped to {list(config.clip)}"
    return (
        f"{config.name}, seed {config.seed}: {config.steps} steps of {config.batch_size} examples, "
        f"{epoch_steps} an epoch; eps {config.eps:.4g}{space} ({of_255} of 255), {clip}"
    )


@dataclass
class Progress:
    """Of the training: a tqdm bar on a terminal (with tqdm installed), else one line an epoch."""

    config: Config
    epoch_steps: int
    step: int  # that it starts from
    shown: bool = True  # false in all processes but one
    bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown:
            print(describe(self.config, self.epoch_steps), flush=True)
            if self.step:
                print(f"Going on after step {self.step}.", flush=True)
            self.bar = _tqdm(
                total=self.config.steps, initial=self.step, desc=self.config.name, unit="step"
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
        """Another step is done."""
        if self.bar is not None:
            self.bar.update()

    def report(self, record: dict[str, Any]) -> None:
        """An epoch is done; record is its line of metrics.jsonl."""
        if not self.shown:
            return
        errors = "  ".join(
            f"{name} {_percent(record[f'{name}_error'])}" for name in ("train", "test", "verified")
        )
        if self.bar is not None:
            self.bar.set_postfix_str(errors)
            return
        loss, width = (
            math.nan if record[key] is None else record[key] for key in ("loss", "width")
        )
        epochs = math.ceil(self.config.steps / self.epoch_steps)
        print(
            f"epoch {record['epoch']:4d}/{epochs}  step {record['step']:6d}  "
            f"eps {record['eps']:.4f}  kappa {record['kappa']:.3f}  lr {record['lr']:<7.2g}  "
            f"loss {loss:8.4f}  width {width:8.2e}  {errors}  {record['seconds']:7.1f} s",
            flush=True,
        )


def _percent(error: float | None) -> str:
    return "    - %" if error is None else f"{100 * error:5.1f} %"


def _tqdm(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """A tqdm bar, None where stderr is no terminal or tqdm is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(items, dynamic_ncols=True, **options)
