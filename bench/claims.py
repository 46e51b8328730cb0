"""What the paper claims, beside what the runs in results/ say: a table for docs/reproduction.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from cibp_fast.training.paper import NETS, cells_of
from cibp_fast.training.reproduction import Run, look_all

NORMALIZED = "-8of255-{}-normalized"
METHODS = ("ibp", "cibp")


@dataclass(frozen=True)
class Finding:
    """Holds what was measured of a claim for one network; `holds` None: not run."""

    net: str
    text: str = ""
    holds: bool | None = None


class Runs:
    """Reads the finished runs of the paper's cells, by preset."""

    def __init__(self, results: Path) -> None:
        found = look_all(cells_of("all"), 0, results)
        self.of: dict[str, list[Run]] = {
            cell.preset: [run for run in members if run.result] for cell, members in found.items()
        }

    def pair(self, name: str, key: str, epoch: int | None = None) -> tuple[float, float] | None:
        """Returns a number of IBP and of constrained IBP, means over seeds; None if one is not run.

        name: of the preset, with {} for the method. key: of a record of metrics.jsonl, or of
        result.json where epoch is None; errors are in %.
        """
        means = []
        for method in METHODS:
            members = self.of[name.format(method)]
            if not members:
                return None
            records = [
                (run.result or {}) if epoch is None else run.records[epoch - 1] for run in members
            ]
            scale = 100 if key.endswith("error") else 1
            means.append(fmean(scale * record[key] for record in records))
        return means[0], means[1]


def lower(
    runs: Runs, net: str, name: str, key: str, epoch: int | None, least: float, most: float = 100
) -> Finding:
    """Says by how many points constrained IBP's error is below IBP's: `least` to `most` hold."""
    pair = runs.pair(name, key, epoch)
    if pair is None:
        return Finding(net)
    ibp, cibp = pair
    text = f"{cibp:.2f} % against {ibp:.2f} %, {abs(ibp - cibp):.2f} points"
    return Finding(
        net, f"{text} {'lower' if cibp < ibp else 'higher'}", least <= ibp - cibp <= most
    )


def narrower(runs: Runs, net: str, name: str, epoch: int, least: float) -> Finding:
    """Says how many times as wide IBP's bounds are: `least` times holds."""
    pair = runs.pair(name, "width", epoch)
    if pair is None:
        return Finding(net)
    ibp, cibp = pair
    text = f"{short(cibp)} against {short(ibp)}, by a factor of {ibp / cibp:,.0f}"
    return Finding(net, text, ibp >= least * cibp)


def stuck(runs: Runs, net: str, name: str, epoch: int) -> Finding:
    """Says whether IBP verifies nothing at an epoch where constrained IBP does."""
    pair = runs.pair(name, "verified_error", epoch)
    if pair is None:
        return Finding(net)
    ibp, cibp = pair
    return Finding(net, f"{ibp:.2f} % against {cibp:.2f} %", ibp > 99.5 > cibp)


def converges(runs: Runs, net: str, name: str) -> Finding:
    """Says whether constrained IBP ends below half the examples, and IBP above."""
    pair = runs.pair(name, "verified_error")
    if pair is None:
        return Finding(net)
    ibp, cibp = pair
    return Finding(net, f"IBP {ibp:.2f} %, constrained IBP {cibp:.2f} %", ibp > 50 > cibp)


def settles(runs: Runs, net: str, name: str, first: int, last: int) -> Finding:
    """Says whether IBP's bounds still grow between two epochs, where constrained IBP's do not."""
    begin, end = (runs.pair(name, "width", epoch) for epoch in (first, last))
    if begin is None or end is None:
        return Finding(net)
    texts = [f"{short(one)} to {short(two)}" for one, two in zip(begin, end, strict=True)]
    holds = end[0] > begin[0] and end[1] <= begin[1]
    return Finding(net, f"IBP {texts[0]}, constrained IBP {texts[1]}", holds)


def claims(results: Path) -> list[list[str]]:
    """Returns a row for each claim: what is claimed, what was measured, and the verdict."""
    runs = Runs(results)
    fast, four = "mnist-small-0.4-{}-fast-ramp", "cifar10-large-4of255-{}-normalized"

    def nets(dataset: str, *options: float | str | None) -> list[Finding]:
        return [
            lower(runs, net, f"{dataset}-{net}{NORMALIZED}", *options)  # type: ignore[arg-type]
            for net in NETS
        ]

    def mnist(net: str) -> Finding:
        return lower(runs, net, f"mnist-{net}-0.4-{{}}", "verified_error", None, -3, 3)

    found: dict[str, list[Finding]] = {
        "It converges faster: on CIFAR-10 its verified error after 100 epochs is over 20 points "
        "lower (Figure 3).": nets("cifar10", "verified_error", 100, 20),
        "There its test error is close (taken as 5 points).": nets(
            "cifar10", "test_error", 100, -5, 5
        ),
        "On SVHN its verified error after 50 epochs is 20 points lower (Figure 3).": nets(
            "svhn", "verified_error", 50, 20
        ),
        "At 4/255 IBP is stuck at 100 % verified error for 100 epochs, and it is not (Figure 4).": [
            stuck(runs, "large", four, 100)
        ],
        "It is stable under fast ramps: on MNIST IBP does not converge, and it does (Figure 5; "
        "taken as a final verified error above and below 50 %).": [converges(runs, "small", fast)],
        "Its hidden bounds are smaller: on CIFAR-10 their width after 100 epochs is by a few "
        "orders of magnitude (Figure 6; taken as 100 times).": [
            narrower(runs, net, f"cifar10-{net}{NORMALIZED}", 100, 100) for net in NETS
        ],
        "So it is on SVHN (Figure 6).": [
            narrower(runs, net, f"svhn-{net}{NORMALIZED}", 100, 100) for net in NETS
        ],
        "Under the fast ramp the width of IBP does not settle (Figure 7; taken as growing from "
        "epoch 10 to 50, where its own does not).": [settles(runs, "small", fast, 10, 50)],
        "Its final verified error is lower on CIFAR-10 8/255 (Table 2).": nets(
            "cifar10", "verified_error", None, 0
        ),
        "On MNIST both are comparable (taken as 3 points of verified error).": [
            mnist(net) for net in NETS
        ],
    }
    return [[claim, measured(findings), verdict(findings)] for claim, findings in found.items()]


def short(width: float) -> str:
    return f"{width:.3g}" if width < 100 else f"{width:,.0f}"


def measured(findings: list[Finding]) -> str:
    return "; ".join(f"{each.net}: {each.text}" for each in findings if each.text) or "-"


def verdict(findings: list[Finding]) -> str:
    """Returns confirmed, not confirmed, or not run; and of which networks where these differ."""
    words = {True: "confirmed", False: "not confirmed", None: "not run"}
    texts = []
    for holds, word in words.items():
        own = [each.net for each in findings if each.holds is holds]
        if own:
            texts.append(f"{word} ({', '.join(own)})" if len(own) < len(findings) else word)
    return ", ".join(texts)
