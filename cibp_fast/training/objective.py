"""The loss of a batch, and what is logged of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cibp_fast import losses
from cibp_fast.certificates import predict
from cibp_fast.fusion import FusedNetwork, fuse
from cibp_fast.interval import Interval
from cibp_fast.layerwise import bounds
from cibp_fast.training.config import Config

LOGGED = ("loss", "nominal", "robust", "width", "train_error")  # then come the K widths


class Objective(nn.Module):
    """The config's loss of a batch, as one module, which DistributedDataParallel can wrap."""

    fused: FusedNetwork | None

    def __init__(self, model: nn.Module, config: Config, backend: str = "auto") -> None:
        super().__init__()
        self.model, self.config = model, config
        # as one op where it can be; not a submodule, since its parameters are the model's
        fused = config.width == "post" and config.method != "nominal"
        net = fuse(model, config.precision, backend) if fused else None
        object.__setattr__(self, "fused", net)

    def forward(self, x: Tensor, y: Tensor, eps: float, kappa: float) -> tuple[Tensor, Tensor]:
        """Returns the loss, 0-dim, of x [B, C, H, W], y [B], and what is logged, float64 [5 + K].

        That is `LOGGED` and the K widths (mean or sum, as configured); for the nominal method
        robust and width are NaN and there are no widths, since it computes no bounds.
        """
        config = self.config
        if config.method == "nominal":
            logits = self.model(x)
            loss = losses.nominal_loss(logits, y)
            nothing = loss.new_full((), math.nan)
            parts, widths = losses.Terms(loss, nothing, nothing), loss.new_empty(0)
        else:
            # pixels are in the clip (`loop._check`): to look would be to wait for a GPU
            box = Interval.ball(x, eps, config.clip, validate=False)
            if self.fused is not None:
                out = self.fused.bounds(x, box, reduction=config.width_reduction)
            else:
                out = bounds(self.model, x, box, config.width, config.width_reduction)
            parts = losses.terms(out, y, elide=config.elide)
            loss = parts.total(kappa, config.width_weight)
            logits, widths = out.logits, out.widths
        with torch.no_grad():
            error = (predict(logits) != y).mean(dtype=loss.dtype)
            logged = torch.cat([torch.stack([loss, *parts, error]), widths])
        return loss, logged.double()
