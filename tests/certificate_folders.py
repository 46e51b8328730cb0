"""Folders of certificates, written without the package, and networks as their files name them."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from cibp_fast import check_certificates as checker

Net = tuple[list[dict[str, Any]], dict[str, np.ndarray]]  # the layers' list and tensors


def linear(place: int, weight: Any, bias: Any = None, dtype: Any = np.float32) -> Net:
    tensors = {f"{place}.weight": np.array(weight, dtype)}
    if bias is not None:
        tensors[f"{place}.bias"] = np.array(bias, dtype)
    name = None if bias is None else f"{place}.bias"
    return [{"layer": "linear", "weight": f"{place}.weight", "bias": name}], tensors


RELU: Net = ([{"layer": "relu"}], {})


def chain(*nets: Net) -> Net:
    return [spec for net in nets for spec in net[0]], {
        k: v for net in nets for k, v in net[1].items()
    }


def write(folder: Path, net: Net, x: np.ndarray, y: Any, eps: float, clip: Any, semantics: str,
          margins: Any, content: bytes | None = None) -> Path:  # fmt: skip
    """Writes a folder of certificates; those with margins above 0 are verified."""
    content = content or save({name: torch.tensor(value) for name, value in net[1].items()})
    x, y = np.asarray(x, np.float32), np.asarray(y, np.int64)
    lines = [
        {"index": i, "label": int(y[i]), "predicted": int(y[i]), "verified": bool(margin > 0),
         "margin": float(margin).hex()}
        for i, margin in enumerate(margins)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    verified = sum(line["verified"] for line in lines)
    folder.mkdir(exist_ok=True)
    (folder / "weights.safetensors").write_bytes(content)
    np.savez_compressed(folder / "inputs.npz", x=x, y=y)
    (folder / "certificates.jsonl").write_bytes(text)
    result = {
        "format": "cibp_fast certificates 1",
        "semantics": semantics,
        "eps": str(Fraction(eps)),
        "clip": [str(Fraction(each)) for each in clip] if clip else None,
        "network": net[0],
        "weights": {"file": "weights.safetensors", "sha256": sha256(content)},
        "inputs": {
            "file": "inputs.npz", "sha256": sha256(x.tobytes() + y.tobytes()),
            "shape": list(x.shape), "dtype": "float32",
        },
        "certificates": {"file": "certificates.jsonl", "sha256": sha256(text)},
        "examples": len(x),
        "verified": verified,
        "verified_error": 1 - verified / len(x),
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    return folder


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check(folder: Path, *options: str) -> int:
    return checker.run([str(folder), "--jobs", "1", *options])
