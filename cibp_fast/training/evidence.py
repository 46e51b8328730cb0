"""Judges the examples that are both certified and broken: is the certificate wrong, or rounding?

What shows that a certificate is wrong is saved before anything else happens.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from cibp_fast import exact
from cibp_fast.certificates import boxes
from cibp_fast.layerwise import predict
from cibp_fast.ops.arithmetic import own_arithmetic
from cibp_fast.training import Contradiction
from cibp_fast.training.files import make_folder, write_atomic


@dataclass(frozen=True)
class Claim:
    """Holds what a sound certificate says of an example, and an attack's point against it.

    Attributes:
        index: of the example, in its split.
        x: [1, ...], its values.
        y: its label.
        margins: [classes], the lower bounds of z_y - z_j over its box.
        semantics: "real" or "float32", as in `cf.certify`.
        eps, clip: the box, as in `cf.certify`.
        point: [1, ...], where an evaluation in float32 gave another class than y.
    """

    index: int
    x: Tensor
    y: int
    margins: Tensor
    semantics: str
    eps: float
    clip: tuple[float, ...] | None
    point: Tensor


def check(
    network: nn.Module,
    forward: Callable[[Tensor], Tensor],
    claim: Claim,
    folder: str | Path,
) -> None:
    """Raises Contradiction if the attack's point refutes the claim, and not rounding alone does.

    A point outside of the exact box is moved into it. Under "real" the logits there are computed in
    exact arithmetic; where that cannot be (exact.Undecidable), the claim counts as refuted. Under
    "float32" the evaluation that the attack saw counts, or one at the moved point.

    Args:
        network: in evaluation mode; its stored weights are what the claim is about.
        forward: an evaluation of it in float32, [N, ...] -> [N, classes].
        claim: that an attack contradicts.
        folder: where `evidence-<index>.npz` is written if the claim is refuted.

    Raises:
        Contradiction: the claim is refuted; after the evidence has been written.
        OSError: it cannot be written.
    """
    found = _refuted(network, forward, claim)
    if found is None:
        return
    evidence, what = found
    content = io.BytesIO()
    np.savez(content, **evidence)
    path = Path(folder) / f"evidence-{claim.index}.npz"
    make_folder(path.parent)
    write_atomic(path, content.getvalue())
    raise Contradiction(
        f"the bounds verify example {claim.index}, with label {claim.y} and the semantics "
        f"{claim.semantics}, but {what}: the certificate is wrong, see {path}"
    )


def _refuted(
    network: nn.Module, forward: Callable[[Tensor], Tensor], claim: Claim
) -> tuple[dict[str, Any], str] | None:
    """Returns the evidence against a claim and what it shows in words; None where there is none."""
    center = boxes(claim.x, claim.eps, claim.clip).nominal
    assert center is not None
    point = exact.point_inside(claim.point.cpu(), center.cpu(), claim.eps, claim.clip)
    if point is None:
        return None
    with torch.no_grad(), own_arithmetic(claim.x.device):
        rounded = forward(point.to(claim.x.device))
    logits: list[Fraction] = []
    if claim.semantics == "float32":
        same = torch.equal(point, claim.point.cpu())
        if not same and predict(rounded).item() == claim.y:
            return None
        what = "a float32 evaluation inside its box gives another class"
    else:
        try:
            logits = exact.logits(network, point)
            others = [(value, j) for j, value in enumerate(logits) if j != claim.y]
            best, rival = max(others)
            if logits[claim.y] > best:
                return None
            what = (
                f"at a point of its box the exact logit of class {rival} is ahead of the label's "
                f"by {float(best - logits[claim.y]):.4g}, where the label's should be ahead by "
                f"{claim.margins[rival].item():.4g} or more"
            )
        except exact.Undecidable as error:
            what = (
                "a float32 evaluation inside its box gives another class, and exact logits cannot "
                f"be had ({error})"
            )
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    return {
        "index": claim.index,
        "x": claim.x[0].cpu().numpy(),
        "y": claim.y,
        "adversarial": point[0].numpy(),
        "eps": claim.eps,
        "clip": (-np.inf, np.inf) if claim.clip is None else claim.clip,
        "semantics": claim.semantics,
        "logits": np.array([str(value) for value in logits], dtype=np.str_),
        "logits_float32": rounded[0].cpu().numpy(),
        "margins": claim.margins.cpu().numpy(),
        "weights_sha256": hashlib.sha256(safetensors.torch.save(weights)).hexdigest(),
    }, what
