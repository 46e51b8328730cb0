"""What a person sees of a long run: a bar on a terminal, fixed-format lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

from cibp_fast.training import missing
from cibp_fast.training.config import Config, counted

try:
    from tqdm import tqdm
except ImportError as error:
    raise missing(error) from None

Item = TypeVar("Item")


def bar(items: Iterable[Item], description: str, unit: str, shown: bool = True) -> Iterable[Item]:
    """Returns the items, counted by a bar that vanishes at the end, on a terminal."""
    return tqdm(items, description, unit=unit, leave=False, **_where(shown))


def describe(config: Config, epoch_steps: int) -> str:
    """Returns a line about the run that is about to start, with eps in pixels."""
    pixels = config.eps_pixel if isinstance(config.eps_pixel, tuple) else (config.eps_pixel,)
    of_255 = ", ".join(f"{255 * eps:.3g}" for eps in pixels)
    space = "" if config.eps_space == "pixel" else " in normalised pixels"
    clip = "not clipped" if config.clip is None else f"clipped to {list(config.clip)}"
    # the units of a user's own data are the user's
    unit = "" if getattr(config, "data", ()) else f" ({of_255} of 255)"
    return (
        f"{config.name}, seed {config.seed}: {counted(config.steps, 'step')} of "
        f"{counted(config.batch_size, 'example')}, "
        f"{epoch_steps} an epoch; eps {config.eps:.4g}{space}{unit}, {clip}"
    )


class Progress(tqdm):
    """Shows a training's progress: `update` after each step, `report` after each epoch.

    It is a bar on a terminal, else one line an epoch.
    """

    def __init__(self, config: Config, epoch_steps: int, step: int, shown: bool) -> None:
        """Says what begins, or goes on after `step` steps. Not shown: in all processes but one."""
        if shown:
            print(describe(config, epoch_steps), flush=True)
            if step:
                print(f"Going on after step {step}.", flush=True)
        super().__init__(
            total=config.steps, initial=step, desc=config.name, unit="step", **_where(shown)
        )
        self.epochs, self.shown = math.ceil(config.steps / epoch_steps), shown

    def report(self, record: dict[str, Any]) -> None:
        """Shows a record of metrics.jsonl."""
        if not self.shown:
            return
        errors = "errors: " + "  ".join(
            f"{name} {_percent(record[f'{name}_error'])}" for name in ("train", "test", "verified")
        )
        if not self.disable:
            self.set_postfix_str(errors)
            return
        loss, width = (math.nan if record[k] is None else record[k] for k in ("loss", "width"))
        print(
            f"epoch {record['epoch']:4d}/{self.epochs}  step {record['step']:6d}  "
            f"eps {record['eps']:.4f}  kappa {record['kappa']:.3f}  lr {record['lr']:<7.2g}  "
            f"loss {loss:8.4f}  width {width:8.2e}  {errors}  {record['seconds']:7.1f} s",
            flush=True,
        )


def _where(shown: bool) -> dict[str, Any]:
    return {"dynamic_ncols": True, "disable": None if shown else True}  # None: only on a terminal


def _percent(error: float | None) -> str:
    return "    - %" if error is None else f"{100 * error:5.1f} %"
