"""`evaluate`: test, PGD and verified error of any model on any examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cibp_fast._graphs import enough_memory
from cibp_fast.attacks import check_options
from cibp_fast.certificates import CLIP, SEMANTICS
from cibp_fast.training import own
from cibp_fast.training.evaluation import Settings, count
from cibp_fast.training.progress import bar


@dataclass(frozen=True)
class Errors:
    """Holds the errors of a model on a number of examples, shares in [0, 1].

    Attributes:
        test_error: what it misclassifies; an output of NaN counts as an error.
        pgd_error: what the attack breaks.
        verified_error: what the bounds do not verify.
        examples: how many were evaluated.
        contradictions: verified by ordinary bounds, and yet broken: those bounds are wrong there.
            0 with sound certificates, of which a wrong one is an error at once.
        contradictions_of_rounding: verified by a right certificate and yet broken, since float32
            rounds.
        sound: whether the verified error is of sound certificates.
        semantics: of those, "real" or "float32"; "" if not sound.
        eps: the radius, where it is one number.
    """

    test_error: float
    pgd_error: float
    verified_error: float
    examples: int
    contradictions: int
    contradictions_of_rounding: int
    sound: bool
    semantics: str
    eps: float | None

    def __repr__(self) -> str:
        at = "" if self.eps is None else f" at eps {self.eps:.4g}"
        shares = ", ".join(
            f"{name} error {100 * error:.2f} %"
            for name, error in (
                ("test", self.test_error),
                ("PGD", self.pgd_error),
                ("verified", self.verified_error),
            )
        )
        means = self.semantics if self.sound else "false, ordinary bounds"
        wrong = f"; {self.contradictions} contradictions" if self.contradictions else ""
        return f"Errors({self.examples:,} examples{at}: {shares}; sound: {means}{wrong})"


def evaluate(
    model: Callable[[Any], Any],
    data: Any,
    eps: float | Sequence[float] | Tensor,
    *,
    clip: Any = CLIP,
    sound: bool = True,
    semantics: str = "real",
    steps: int = 200,
    restarts: int = 10,
    verified_restarts: int = 0,
    step_size: float | None = None,
    step: str = "sign",
    loss: str = "auto",
    seed: int = 0,
    batch_size: int = 500,
    progress: bool = True,
    evidence: str | Path = ".",
) -> Errors:
    """Finds the three errors of a model: what it misclassifies, what PGD breaks, what is unproven.

    The model is evaluated in evaluation mode, on the device of its parameters, where the batches
    are moved; its modes are left as they were.

    Args:
        model: module or function from [N, ...] to logits [N, classes] that takes an Interval too.
        data: images and labels, a pair of tensors x [N, ...] and y [N] int64; a map-style torch
            Dataset of pairs; a part of a data set of ours, `cf.data.load("mnist").test`; or a
            DataLoader, whose batches (x, y) are taken as they are. uint8 images are divided by 255.
            All else is in the space that the model takes, and that eps measures.
        eps: radius of the boxes, a number, or with sound=False also one for each channel, as in
            `cf.Interval.ball`.
        clip: range of the data that boxes are cut to, as in `cf.Interval.ball`; None: none.
        sound: False takes the ordinary bounds, which are no proof, for models that have layers
            without a sound rule (see `cf.certify`).
        semantics: of sound certificates, as in `cf.certify`.
        steps, restarts, step_size, step, loss, seed: of the attack, as in `cf.attacks.pgd`.
        verified_restarts: random starts for examples that the bounds verify, where the attack can
            only prove the bounds wrong.
        batch_size: examples at a time; a DataLoader has its own.
        progress: show a bar, on a terminal.
        evidence: folder where `evidence-<index>.npz` is written, should a certificate be wrong.

    Raises:
        TypeError: data is none of the above, or has no length, or eps is none for all examples.
        ValueError: shapes or labels do not fit, data is empty, a layer has no sound rule, or an
            argument is none of the allowed.
        Contradiction: a sound certificate is refuted.
        torch.OutOfMemoryError: a GPU's memory is too small.

    Examples:
        >>> model = nn.Linear(2, 2)  # of logits (x_0, x_1)
        >>> _ = model.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
        >>> data = torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 0])
        >>> cf.evaluate(model, data, eps=0.2, steps=10).pgd_error
        0.5
    """
    if semantics not in SEMANTICS:
        raise ValueError(f"semantics must be one of {', '.join(SEMANTICS)}, not {semantics!r}")
    if not sound and semantics != "real":
        raise ValueError(
            f"semantics={semantics!r} is a promise of sound bounds: it needs sound=True"
        )
    if not isinstance(eps, (Real, Sequence, Tensor)):
        raise TypeError(
            f"eps must be a number, or one for each channel, not a {type(eps).__name__}; boxes of "
            "each example are for cf.certify and cf.attacks.pgd"
        )
    options = {"step": step, "loss": loss, "step_size": step_size}
    check_options(
        **options, seed=seed, steps=steps, restarts=restarts, verified_restarts=verified_restarts
    )
    ends: tuple[Any, ...] = ()
    with suppress(TypeError):  # no pair: refused as a box is made of it
        ends = () if clip is None else tuple(clip)
    for name, value in (("eps", eps), *(("clip", end) for end in ends)):
        if isinstance(value, Tensor) and value.dim() > 1 and len(value) > 1:
            raise ValueError(
                f"{name} must be the same for all examples, not of shape {list(value.shape)}"
            )
    if sound and not all(isinstance(each, Real) for each in (eps, *ends)):
        raise ValueError(
            "eps and the ends of clip must be numbers with sound=True, where a broken certificate "
            "is judged in exact arithmetic; sound=False takes one for each channel"
        )
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number, 1 or more, not {batch_size!r}")
    tensors = []
    if isinstance(model, nn.Module):
        tensors = list(chain(model.parameters(), model.buffers()))
    device = tensors[0].device if tensors else torch.device("cpu")
    total = 0

    def batches() -> Iterator[tuple[int, Tensor, Tensor]]:
        nonlocal total
        for x, y in _batches(data, batch_size, progress):
            first, total = total, total + len(y)
            yield first, x.to(device), y.to(device)

    settings = Settings(
        eps=eps,
        clip=clip,
        batch_size=batch_size,
        restarts=restarts,
        verified_restarts=verified_restarts,
        seed=seed,
        pgd={"steps": steps, **options},
    )
    about = semantics if sound else ""
    with enough_memory("cf.evaluate", "take smaller batches"):
        counts = count(model, batches(), settings, True, about or None, evidence)
    if not total:
        raise ValueError("data must hold one example or more, and it is empty")
    wrong, attacked, unverified, both = counts.tolist()
    return Errors(
        test_error=wrong / total,
        pgd_error=attacked / total,
        verified_error=unverified / total,
        examples=total,
        contradictions=0 if sound else both,
        contradictions_of_rounding=both if sound else 0,
        sound=sound,
        semantics=about,
        eps=float(eps) if isinstance(eps, Real) else None,
    )


def _batches(data: Any, batch_size: int, progress: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields x [B, ...] and labels y [B] of the data."""
    if not isinstance(data, DataLoader):
        examples = own.split("data", data)
        starts = range(0, len(examples), batch_size)
        for first in bar(starts, "evaluating", "batch", shown=progress):
            part = examples[first : first + batch_size]
            yield part.pixels(), part.labels
        return
    own.length("data", data)
    for batch in bar(data, "evaluating", "batch", shown=progress):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"data must give batches (x, y), not a {type(batch).__name__}")
        part = own.split("a batch of data", batch)
        yield part.pixels(), part.labels
