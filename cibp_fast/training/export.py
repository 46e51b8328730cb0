"""A trained network and its properties for other verifiers: ONNX, VNN-LIB 1.0, instances.csv.

Each property asks for a point of an example's box that is not classified as its label: `unsat`
verifies the example.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from functools import cache
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

from cibp_fast import exact
from cibp_fast.certificates import CLIP, check_examples, evaluation
from cibp_fast.interval import Interval
from cibp_fast.layerwise import check_labels
from cibp_fast.training import runs
from cibp_fast.training.datasets import Split
from cibp_fast.training.files import make_folder, naming, write_atomic

OPSET = 18  # of torch's exporter, which converts nothing for it
NETWORK, INSTANCES = "network.onnx", "instances.csv"
DIGITS = 20  # of a bound; reading 17 already gives the same float64


def require_onnx() -> None:
    """Raises ImportError where a package of the extra `export` is missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        raise ImportError(
            f"an export needs the package {package}, which is not installed: "
            "pip install 'cibp-fast[export]'"
        ) from error


def export(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    folder: str | Path,
    *,
    clip: Sequence[float] | None = CLIP,
    timeout: int = 100,
    overwrite: bool = False,
) -> None:
    """Writes network.onnx, example-<index>.vnnlib for each example, and instances.csv.

    The network takes `input` [N, ...] float32, for any N, and gives `logits` [N, classes]. The
    boxes are those of `certify(model, x, y, eps, clip)`; a bound is a decimal number that is on or
    outside of the exact one, by less than two units in the last place of a float64, and so is the
    float64 nearest to it. Each property asks for a point of the box that is classified otherwise (a
    tie counts): `unsat` verifies the example. instances.csv comes last: a folder without it is not
    whole. It needs the extra `export`.

    Args:
        model: from [N, ...] to logits [N, classes]; it is exported in evaluation mode.
        x: [N, ...] float32, the examples.
        y: [N] int64, their labels.
        eps: the radius, at least 0: one number.
        folder: is made where it is not there.
        clip: (least, greatest) value of the data, or None.
        timeout: seconds for an example, in instances.csv.
        overwrite: replace what an earlier export wrote into the folder.

    Raises:
        TypeError: x or y is no tensor of the kind above.
        ValueError: shapes or labels do not fit, eps is negative or not finite, clip is no pair in
            order, or timeout is below 1.
        FileExistsError: the folder holds an export and not overwrite, or other files.
        ImportError: onnx or onnxscript is missing.
        OSError: the folder cannot be written.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
        >>> x, y = torch.rand(2, 1, 3, 3), torch.tensor([0, 1])
        >>> cf.export(model, x, y, 0.1, "exported")
        >>> print(open("exported/instances.csv").readline().strip())
        network.onnx,example-0.vnnlib,100
    """
    check_examples(x, y, 1)
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32, as ONNX has it, not {x.dtype}")
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps must be one number, not {type(eps).__name__}")
    ends = None if clip is None else tuple(float(end) for end in clip)
    Interval.ball(x, float(eps), ends)  # says what is wrong with eps or clip
    if x.device.type != "cpu":
        model, x, y = copy.deepcopy(model).cpu(), x.cpu(), y.cpu()
    _write(Path(folder), model, x, y, float(eps), ends, "x", timeout, overwrite)


def export_run(
    folder: Path,
    network: runs.Network,
    split: Split,
    *,
    timeout: int = 100,
    overwrite: bool = False,
) -> None:
    """Exports a trained network, on the CPU, and the boxes of its config around the examples.

    Raises:
        ValueError, FileExistsError, ImportError, OSError: as `export`.
    """
    config = network.config
    x = runs.to_input(config)(split.pixels())
    space = "; X is normalised by channel" if config.eps_space == "normalized" else ""
    about = f"{config.dataset}'s test set; network: {network.name}{space}"
    eps, clip = config.eps, config.clip
    _write(folder, network.model, x, split.labels, eps, clip, about, timeout, overwrite)


def _write(
    folder: Path,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: tuple[float, ...] | None,
    about: str,
    timeout: int,
    overwrite: bool,
) -> None:
    if timeout < 1:
        raise ValueError(f"timeout must be 1 second or more, not {timeout}")
    require_onnx()
    with torch.no_grad(), evaluation(model):
        logits = model(x[:1])
        network = to_onnx(model, x.shape[1:])
    check_labels(y, logits.shape[1])
    _claim(folder, overwrite)
    write_atomic(folder / NETWORK, network)
    rows = []
    for index, (point, label) in enumerate(zip(x, y.tolist(), strict=True)):
        name = f"example-{index}.vnnlib"
        content = vnnlib(point, label, logits.shape[1], eps, clip, f"Example {index} of {about}")
        write_atomic(folder / name, content.encode())
        rows.append(f"{NETWORK},{name},{timeout}\n")
    write_atomic(folder / INSTANCES, "".join(rows).encode())


def _claim(folder: Path, overwrite: bool) -> None:
    """Makes the folder, and removes an earlier export from it where that is to be overwritten."""
    make_folder(folder)
    present = sorted(folder.glob("[!.]*"), key=lambda path: path.name != INSTANCES)
    own = [*folder.glob(NETWORK), *folder.glob(INSTANCES), *folder.glob("example-*.vnnlib")]
    for path in present:
        if path not in own:
            raise FileExistsError(
                f"{folder} holds {path.name}, which is no file of an export: choose another folder"
            )
    if present and not overwrite:
        raise FileExistsError(
            f"{folder} holds an export: replace it with --overwrite, or choose another folder"
        )
    with naming("replace the export in", folder):
        for path in present:
            path.unlink()


def to_onnx(model: nn.Module, shape: torch.Size) -> bytes:
    """Returns an ONNX file of the model, which takes [N, *shape] float32 on the CPU, for any N."""
    import onnx

    with torch.no_grad(), evaluation(model), _quiet():
        program = torch.onnx.export(
            model,
            (torch.zeros(2, *shape),),  # 1 would be taken for the only N
            dynamo=True,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    graph = proto.graph
    # where the exporter notes files of this machine
    for each in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del each.metadata_props[:]
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the exporter says about torch's own code and packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def vnnlib(
    x: Tensor, label: int, classes: int, eps: float, clip: tuple[float, ...] | None, about: str
) -> str:
    """Returns the property of an example: a point of its box where another logit is the largest.

    Args:
        x: the input that the network is given, of any shape; X_i are its values in their order.
        label: the class that the example has.
        classes: number of the logits, Y_j.
        eps, clip: of the box, max(x - eps, clip[0]) to min(x + eps, clip[1]); no clip: None.
        about: comment of one line.
    """

    @cache  # most pixels have one of 256 values
    def bounds(value: float) -> tuple[str, str]:
        lower, upper = exact.box(value, eps, clip)
        return decimal(lower, up=False), decimal(upper, up=True)

    points = x.flatten().tolist()
    cut = "not clipped" if clip is None else f"clipped to {list(clip)}"
    others = "".join(f"  (and (>= Y_{j} Y_{label}))\n" for j in range(classes) if j != label)
    return "".join(
        (
            f"; {about}\n",
            f"; Label {label}, eps {eps!r}, {cut}. unsat: no point of the box is misclassified.\n",
            "; The bounds are rounded outward, to numbers that contain the exact box, also when\n",
            "; they are read as float64. Who reads them as float32 has to round outward again.\n\n",
            *(f"(declare-const X_{i} Real)\n" for i in range(len(points))),
            *(f"(declare-const Y_{j} Real)\n" for j in range(classes)),
            "\n",
            *(
                f"(assert (>= X_{i} {lower}))\n(assert (<= X_{i} {upper}))\n"
                for i, (lower, upper) in enumerate(map(bounds, points))
            ),
            f"\n(assert (or\n{others}))\n",
        )
    )


def decimal(value: Fraction, up: bool) -> str:
    """Returns a decimal number at least (up) or at most the value, and so is the float64 nearest
    to it: that float64 is the next one to the value.
    """
    end = math.inf if up else -math.inf
    number = float(value)
    if number != value and (number < value) == up:
        number = math.nextafter(number, end)
    digits = Context(prec=DIGITS, rounding=ROUND_CEILING if up else ROUND_FLOOR)
    text = format(digits.create_decimal(Decimal(number)), "f")
    return text if "." in text else f"{text}.0"
