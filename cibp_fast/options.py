"""What the options of `cibp-fast` are made of, and what several commands have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from cibp_fast.training import missing
from cibp_fast.training.config import Config, as_text, choices, parse, preset

try:
    import tyro
    from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg, subcommand
    from tyro.constructors import PrimitiveConstructorSpec
except ImportError as error:
    raise missing(error) from None

# what is imported here is tyro's too, so that only this module must say that it is missing
__all__ = [
    "DEFAULT_PRESET",
    "DIR",
    "MOST_THREADS",
    "Changes",
    "Command",
    "FlagCreatePairsOff",
    "Model",
    "N",
    "OnData",
    "Positional",
    "Radius",
    "Recipe",
    "arg",
    "subcommand",
    "tyro",
    "word",
]

DEFAULT_PRESET = "mnist5k-small-0.1-cibp"
MOST_THREADS = 1024  # beyond it the system may refuse to start them, which ends the process


def word(metavar: str, read: Callable[[str], Any]) -> PrimitiveConstructorSpec[Any]:
    """Returns what makes an option of one word; tyro's own of `int | None` takes the word None."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


N, DIR = word("N", int), word("DIR", Path)
Model = Annotated[
    str | None, word("MODULE:FACTORY", str), arg(metavar="MODULE:FACTORY", help_behavior_hint="")
]


def _changes(hints: Mapping[str, str]) -> Any:
    """Returns the type of options that change these fields of the Config, a dict of those given.

    hints: what the help says of each field's default.
    """
    options: dict[str, Any] = {}
    for name, hint in hints.items():
        option = Config.model_fields[name]
        about = arg(help=option.description, help_behavior_hint=hint)
        form = word("|".join(choices(name)) or "VALUE", partial(parse, name))
        options[name] = (
            Annotated[bool, about] if option.annotation is bool else Annotated[Any, form, about]
        )
    return OmitArgPrefixes[TypedDict("Changes", options, total=False)]  # type: ignore


if TYPE_CHECKING:
    Recipe = dict[str, Any]
    Changes = dict[str, Any]
    Radius = dict[str, Any]
else:
    Recipe = _changes({name: f"[{as_text(value)}]" for name, value in preset(DEFAULT_PRESET)})
    Changes = _changes(dict.fromkeys(("eps", "eval_batch_size"), "(default: the run's)"))
    Radius = _changes({"eps": "(default: the run's)"})


@dataclass(kw_only=True)
class Command:
    """Holds what all commands take.

    Attributes:
        threads: processor threads
    """

    threads: Annotated[int | None, N, arg(help_behavior_hint="(default: torch's choice)")] = None

    def run(self) -> None:
        raise NotImplementedError


@dataclass(kw_only=True)
class OnData(Command):
    """Holds what the commands take that read a data set.

    Attributes:
        data_root: folder of the data sets; mnist5k needs none, and warns of one
        unverified_data: only warn of data files that are not the official ones
    """

    data_root: Annotated[
        Path | None, DIR, arg(help_behavior_hint="(default: $CIBP_FAST_DATA, or data)")
    ] = None
    unverified_data: FlagCreatePairsOff[bool] = False
