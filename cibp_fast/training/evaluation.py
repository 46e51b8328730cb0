"""Test, PGD and verified error of a trained network on a whole split."""

from __future__ import annotations

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
from cibp_fast.soundness import chain
from cibp_fast.training import datasets, runs
from cibp_fast.training.config import Config
from cibp_fast.training.distributed import ALONE, World
from cibp_fast.training.progress import bar


def evaluate(
    model: nn.Module,
    split: datasets.Split,
    config: Config,
    processes: World = ALONE,
    *,
    attack: bool = True,
    semantics: str | None = None,
) -> dict[str, Any]:
    """Returns test, PGD and verified error in [0, 1], PGD's settings, and how many examples.

    NaN is never right and never verified. PGD attacks every example, those that are verified with
    `pgd_verified_restarts` instead of `pgd_restarts`. `contradictions` counts the examples that are
    verified and yet broken: more than 0 shows that the bounds are wrong. The batches are shared
    among the processes; the numbers do not depend on how. Without `attack` what concerns PGD is
    left out, and only one pass of bounds is made. semantics: of sound certificates, "real" or
    "float32", which take longer and raise ValueError for a layer without a sound rule; None: the
    verified error is that of ordinary bounds. On a GPU batches are replays of CUDA graphs, made
    anew for each evaluation. Raises RuntimeError inside a capture, and torch.OutOfMemoryError where
    a GPU's memory is too small.
    """
    if split.images.is_cuda and capturing():
        raise RuntimeError(
            "evaluate cannot be captured, since it counts on the host; it makes CUDA graphs of its "
            "own: call it outside of torch.cuda.graph"
        )
    starts = range(0, len(split), config.eval_batch_size)[processes.rank :: processes.size]
    counts = torch.zeros(4, dtype=torch.int64, device=split.images.device)
    description = "evaluating" if attack else "evaluating the epoch"
    doing = f"evaluation with eval_batch_size={config.eval_batch_size}"
    prepare = runs.to_input(config).to(split.images.device)
    with evaluation(model), reuse_graphs(), enough_memory(doing, "take a smaller one"):
        # traced once for all batches
        model = of_torch_alone(model, prepare(split[:1].pixels())) or model
        for first in bar(starts, description, "batch", shown=processes.first):
            part = split[first : first + config.eval_batch_size]
            x, y = prepare(part.pixels()), part.labels
            size = config.eval_batch_size
            sound: dict[str, Any] = {"sound": False}
            if semantics is not None:
                sound = {"semantics": semantics}
            found = certify(model, x, y, config.eps, config.clip, batch_size=size, **sound)
            if attack:
                with own_arithmetic(x.device):  # as PGD and the certificate
                    (predicted,) = graphed(_predicted, model)(x)
                wrong = predicted != y
                attacked = wrong.clone()
                for group, restarts in (
                    (~found.verified, config.pgd_restarts),
                    (found.verified, config.pgd_verified_restarts),
                ):
                    chosen = group.nonzero().flatten()
                    attacked[chosen] |= pgd(
                        model,
                        x[chosen],
                        y[chosen],
                        config.eps,
                        steps=config.pgd_steps,
                        restarts=restarts,
                        step_size=config.pgd_step_size,
                        clip=config.clip,
                        # the batch's own, so that it does not matter which process attacks it
                        seed=int(np.random.SeedSequence((config.seed, first)).generate_state(1)[0]),
                        batch_size=size,
                    ).found
            else:
                wrong = attacked = found.predicted != y
            counted = (wrong, attacked, ~found.verified, attacked & found.verified)
            counts += torch.stack([each.sum() for each in counted])
    test, pgd_count, unverified, contradictions = processes.sum(counts).tolist()
    errors = {"test_error": test / len(split), "verified_error": unverified / len(split)}
    if not attack:
        return errors
    settings = ("pgd_steps", "pgd_restarts", "pgd_verified_restarts", "pgd_step_size")
    return errors | {
        "pgd_error": pgd_count / len(split),
        **{name: getattr(config, name) for name in settings},
        "examples": len(split),
        "contradictions": contradictions,
    }


def provable(model: nn.Module) -> str | None:
    """Returns the semantics of sound certificates that a final evaluation gives; None: a layer, or
    a weight, has no sound rule.
    """
    try:
        with evaluation(model):
            chain(model, float32=False)
    except ValueError:
        return None
    return "real"


def _predicted(model: nn.Module, x: Tensor) -> tuple[Tensor]:
    return (predict(model(x)),)
