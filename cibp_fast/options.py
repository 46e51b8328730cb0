"""What the options of `cibp-fast` are made of, and what several commands have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass
from functools import partial
from inspect import get_annotations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, TypeVar

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
    "DEVICE",
    "DIR",
    "MOST_THREADS",
    "Changes",
    "Command",
    "Flag",
    "Model",
    "N",
    "OnData",
    "Positional",
    "Radius",
    "Recipe",
    "arg",
    "own_first",
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


N, DIR, DEVICE = word("N", int), word("DIR", Path), word("cpu|cuda", str)
Flag = Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")]
Model = Annotated[
    str | None, word("MODULE:FACTORY", str), arg(metavar="MODULE:FACTORY", help_behavior_hint="")
]


FORMS = {"clip": "LOW,HIGH", "lr_decay_at": "A,B,...", "eps_ramp": "A,B", "kappa_ramp": "A,B"}


def _form(name: str) -> str:
    """Returns what the help shows in place of a value of this field of the Config."""
    number = "N" if Config.model_fields[name].annotation is int else "X"
    return "|".join(choices(name)) or FORMS.get(name, number)


def _changes(hints: Mapping[str, str]) -> Any:
    """Returns the type of options that change these fields of the Config, a dict of those given.

    hints: what the help says of each field's default.
    """
    options: dict[str, Any] = {}
    for name, hint in hints.items():
        option = Config.model_fields[name]
        # in one line: tyro keeps some line breaks
        about = arg(help=" ".join((option.description or "").split()), help_behavior_hint=hint)
        form = word(_form(name), partial(parse, name))
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
        threads: number of processor threads
    """

    threads: Annotated[int | None, N, arg(help_behavior_hint="(default: torch's choice)")] = None

    def run(self) -> None:
        raise NotImplementedError


@dataclass(kw_only=True)
class OnData(Command):
    """Holds what the commands take that read a data set.

    Attributes:
        data_root: folder of the data sets; mnist5k is in a package and needs none
        unverified_data: only warn of data files that are not the official ones
    """

    data_root: Annotated[
        Path | None, DIR, arg(help_behavior_hint="(default: $CIBP_FAST_DATA, or data)")
    ] = None
    unverified_data: Flag = False


CommandT = TypeVar("CommandT", bound=type[Command])


def own_first(kind: CommandT) -> CommandT:
    """Orders a command's options for its help: its own come before those that others have too."""
    fields: dict[str, Field[Any]] = kind.__dataclass_fields__
    names = [name for each in kind.__mro__ for name in get_annotations(each)]
    kind.__dataclass_fields__ = {name: fields[name] for name in names if name in fields}
    return kind
