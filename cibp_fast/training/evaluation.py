"""Test, PGD and verified error of a trained network on a whole split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cibp_fast._graphs import capturing, enough_memory, graphed, reuse_graphs
from cibp_fast.attacks import pgd
from cibp_fast.certificates import certify, evaluation
from cibp_fast.fusion import of_torch_alone
from cibp_fast.layerwise import predict
from cibp_fast.ops.arithmetic import own_arithmetic
from cibp_fast.training import datasets, runs
from cibp_fast.training.config import Config
from cibp_fast.training.distributed import ALONE, World
from cibp_fast.training.evidence import Claim, check
from cibp_fast.training.progress import bar


def evaluate(
    model: nn.Module,
    split: datasets.Split,
    config: Config,
    processes: World = ALONE,
    *,
    attack: bool = True,
    semantics: str | None = None,
    step: str = "sign",
    loss: str = "auto",
    evidence: str | Path = ".",
) -> dict[str, Any]:
    """Returns test, PGD and verified error in [0, 1], PGD's settings, and how many examples.

    NaN is never right and never verified. PGD attacks every example, those that are verified with
    `pgd_verified_restarts` instead of `pgd_restarts`. The batches are shared among the processes;
    the numbers do not depend on how. On a GPU batches are replays of CUDA graphs, made anew for
    each evaluation.

    An example that is verified and yet broken shows that the bounds are wrong, or only that float32
    rounds. With ordinary bounds such examples are counted: `contradictions`. With sound
    certificates each is judged (`evidence.check`): evaluation stops at the first certificate that
    is wrong, with the evidence saved, so that `contradictions` is 0. Where the certificate is
    right, the example is one of `contradictions_of_rounding`, and counts for the PGD error too.

    Args:
        model: network that takes what `runs.to_input` makes of pixels.
        split: the examples.
        config: radius, clip, batch size and PGD's settings.
        processes: that share the batches.
        attack: False leaves out what concerns PGD, and makes one pass of bounds only.
        semantics: of sound certificates, "real" or "float32"; None: the verified error is that of
            ordinary bounds.
        step, loss: of PGD, as in `cf.attacks.pgd`.
        evidence: folder where `evidence-<index>.npz` is written.

    Raises:
        Contradiction: a sound certificate is refuted.
        ValueError: a layer has no sound rule, or step or loss is none of the allowed.
        RuntimeError: inside a capture.
        torch.OutOfMemoryError: a GPU's memory is too small.
    """
    if split.images.is_cuda and capturing():
        raise RuntimeError(
            "evaluate cannot be captured, since it counts on the host; it makes CUDA graphs of its "
            "own: call it outside of torch.cuda.graph"
        )
    options = {"step": step, "loss": loss}

    def count() -> Tensor:
        return _counts(model, split, config, processes, attack, semantics, options, evidence)

    # where a certificate is refuted in one process, no other one waits for it
    counts = processes.together(count) if attack and semantics is not None else count()
    test, pgd_count, unverified, both = processes.sum(counts).tolist()
    errors = {"test_error": test / len(split), "verified_error": unverified / len(split)}
    if not attack:
        return errors
    settings = ("pgd_steps", "pgd_restarts", "pgd_verified_restarts", "pgd_step_size")
    contradictions = {"contradictions": both}
    if semantics is not None:
        contradictions = {"contradictions": 0, "contradictions_of_rounding": both}
    return errors | {
        "pgd_error": pgd_count / len(split),
        **{name: getattr(config, name) for name in settings},
        "examples": len(split),
        **contradictions,
    }


def _counts(
    model: nn.Module,
    split: datasets.Split,
    config: Config,
    processes: World,
    attack: bool,
    semantics: str | None,
    options: dict[str, Any],  # of pgd
    folder: str | Path,  # of evidence
) -> Tensor:  # [4] int64
    """Counts this process's examples as `count` does."""
    starts = range(0, len(split), config.eval_batch_size)[processes.rank :: processes.size]
    description = "evaluating" if attack else "evaluating the epoch"
    prepare = runs.to_input(config).to(split.images.device)

    def batches() -> Iterator[tuple[int, Tensor, Tensor]]:
        for first in bar(starts, description, "batch", shown=processes.first):
            part = split[first : first + config.eval_batch_size]
            yield first, prepare(part.pixels()), part.labels

    settings = Settings(
        eps=config.eps,
        clip=config.clip,
        batch_size=config.eval_batch_size,
        restarts=config.pgd_restarts,
        verified_restarts=config.pgd_verified_restarts,
        seed=config.seed,
        pgd={"steps": config.pgd_steps, "step_size": config.pgd_step_size, **options},
    )
    doing = f"evaluation with eval_batch_size={config.eval_batch_size}"
    with enough_memory(doing, "take a smaller one"):
        counts = count(model, batches(), settings, attack, semantics, folder)
    return counts.to(split.images.device)


@dataclass(frozen=True)
class Settings:
    """Holds what the counts of an evaluation depend on.

    Attributes:
        eps, clip: the boxes, as in `cf.certify`.
        batch_size: examples at a time of a batch.
        restarts: of PGD, for examples that the bounds do not verify.
        verified_restarts: the same for those that they verify.
        seed: with a batch's first example, of PGD's starts.
        pgd: the rest of its options.
    """

    eps: Any
    clip: Any
    batch_size: int
    restarts: int
    verified_restarts: int
    seed: int
    pgd: dict[str, Any]


def count(
    model: Any,
    batches: Iterable[tuple[int, Tensor, Tensor]],
    settings: Settings,
    attack: bool,
    semantics: str | None,
    folder: str | Path,
) -> Tensor:
    """Counts the examples that are wrong, attacked, not verified, and verified yet attacked.

    Args:
        model: network that takes the batches, in whatever mode: it is evaluated in evaluation mode.
        batches: the number of the first example, x [B, ...] and labels y [B], of each.
        settings: of the bounds and of PGD.
        attack, semantics, folder: as attack, semantics and evidence of `evaluate`.

    Returns:
        [4] int64.

    Raises:
        As `evaluate`.
    """
    counts: Tensor | None = None
    network, sound = model, semantics is not None
    with evaluation(model), reuse_graphs():
        for first, x, y in batches:
            if counts is None:
                counts = torch.zeros(4, dtype=torch.int64, device=x.device)
                model = of_torch_alone(network, x) or network  # traced once for all batches
            eps, clip, size = settings.eps, settings.clip, settings.batch_size
            found = certify(model, x, y, eps, clip, sound, semantics or "real", batch_size=size)
            if attack:
                with own_arithmetic(x.device):  # as PGD and the certificate
                    (predicted,) = graphed(_predicted, model)(x)
                wrong = predicted != y
                attacked, points = wrong.clone(), x.clone()
                for group, restarts in (
                    (~found.verified, settings.restarts),
                    (found.verified, settings.verified_restarts),
                ):
                    chosen = group.nonzero().flatten()
                    broken = pgd(
                        model,
                        x[chosen],
                        y[chosen],
                        eps,
                        restarts=restarts,
                        clip=clip,
                        # the batch's own, so that it does not matter which process attacks it
                        seed=int(
                            np.random.SeedSequence((settings.seed, first)).generate_state(1)[0]
                        ),
                        batch_size=size,
                        **settings.pgd,
                    )
                    attacked[chosen] |= broken.found
                    points[chosen] = broken.adversarial
            else:
                wrong = attacked = found.predicted != y
            both = attacked & found.verified
            if attack and semantics is not None:
                for row in both.nonzero().flatten().tolist():
                    claim = Claim(
                        index=first + row,
                        x=x[row : row + 1],
                        y=int(y[row]),
                        margins=found.margins[row],
                        semantics=semantics,
                        eps=eps,
                        clip=clip,
                        point=points[row : row + 1],
                    )
                    check(network, model, claim, folder)
            counted = (wrong, attacked, ~found.verified, both)
            counts += torch.stack([each.sum() for each in counted])
    return torch.zeros(4, dtype=torch.int64) if counts is None else counts


def provable(model: nn.Module, split: datasets.Split, config: Config) -> str | None:
    """Returns the semantics of sound certificates that a final evaluation gives; None: a layer, a
    weight or the forward has no sound rule, as the first example shows.
    """
    first = split[:1]
    x = runs.to_input(config).to(first.images.device)(first.pixels())
    try:
        certify(model, x, first.labels, config.eps, config.clip)
    except ValueError:
        return None
    return "real"


def _predicted(model: nn.Module, x: Tensor) -> tuple[Tensor]:
    return (predict(model(x.clone())),)  # which it may write into
