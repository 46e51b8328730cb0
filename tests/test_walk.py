"""How many files of the package a call walks through: what small networks pay besides kernels."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compilers import ROOT

import cibp_fast as cf
from cibp_fast import Interval

PACKAGE = Path(cf.__file__).parent


class Files:
    """Notes the package's files whose functions are entered between `begin` and `end`."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def begin(self) -> None:
        sys.setprofile(self._note)

    def end(self) -> None:
        sys.setprofile(None)

    def _note(self, frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            self.names.add(path.relative_to(PACKAGE).as_posix())


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_bounds_of_a_fused_network(clip: Any) -> None:
    net, x, files = cf.fuse(cf.models.small((1, 28, 28))), torch.rand(4, 1, 28, 28), Files()
    for _ in range(2):  # the first call makes what the others use
        box = Interval.ball(x, 0.1, clip)
        files.begin()
        net.bounds(x, box)
        files.end()
        first, files.names = files.names, set()
    assert 0 < len(first) <= 5, sorted(first)


@pytest.mark.parametrize(
    ("by_kernels", "most", "begin", "count"),
    [
        (True, 5, "A step of `cibp-fast train` on the CPU", 2),
        (False, 10, "From a batch's pixels to its loss that way", 7),
    ],
)
def test_a_batch_of_training(
    by_kernels: bool,
    most: int,
    begin: str,
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("mlxtend")
    from cibp_fast.training import loop, step
    from cibp_fast.training.config import preset

    kind: Any = step.KernelStep if by_kernels else step.Step
    files, calls, take = Files(), [], kind.__call__

    def stepped(self: Any) -> None:
        take(self)
        calls.append(1)
        if len(calls) == 3:  # from the end of a batch to that of the next
            files.begin()
        elif len(calls) == 4:
            files.end()

    monkeypatch.setattr(kind, "__call__", stepped)
    if not by_kernels:
        monkeypatch.setattr(loop, "fastest", lambda each, done: each)
    options = {"steps": 5, "pgd_steps": 1, "pgd_restarts": 0, "pgd_step_size": None}
    loop.train(preset("mnist5k-small-0.1-cibp", **options), tmp_path)
    files.names -= {"training/loop.py", "training/progress.py"}
    assert len(calls) == 5 and len(files.names) <= most, " ".join(sorted(files.names))
    text = (ROOT / "README.md").read_text().partition(begin)[2].partition("\n\n")[0]
    named = {name.removeprefix("cibp_fast/") for name in re.findall(r"`([\w/]+\.py)`", text)}
    assert len(named) == count and named <= files.names
