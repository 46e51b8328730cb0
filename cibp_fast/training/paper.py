"""What the paper's Table 2 and Figures 3 to 7 consist of, as plain data.

A cell is a row of the table or a curve of a figure, named by the preset that trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Errors = tuple[float, float, float]  # test, PGD and verified error in %

# Table 2: data set, eps, network, method; test, PGD and verified error in %.
PRINTED: list[tuple[str, str, str, str, Errors]] = [
    ("cifar10", "8of255", "small", "nominal", (20.06, 95.76, 100)),
    ("cifar10", "8of255", "small", "ibp", (39.33, 52.22, 63.58)),
    ("cifar10", "8of255", "small", "cibp", (47.22, 56.14, 60.12)),
    ("cifar10", "8of255", "medium", "nominal", (13.97, 89.59, 100)),
    ("cifar10", "8of255", "medium", "ibp", (18.88, 48.32, 100)),
    ("cifar10", "8of255", "medium", "cibp", (49.29, 57.69, 61.81)),
    ("cifar10", "8of255", "large", "nominal", (12.95, 50.24, 100)),
    ("cifar10", "8of255", "large", "ibp", (40.55, 56.65, 65.89)),
    ("cifar10", "8of255", "large", "cibp", (52.04, 59.89, 63.89)),
    ("mnist", "0.4", "small", "nominal", (0.65, 99.63, 100)),
    ("mnist", "0.4", "small", "ibp", (2.62, 14.14, 20.74)),
    ("mnist", "0.4", "small", "cibp", (7.24, 17.24, 21.31)),
    ("mnist", "0.4", "medium", "nominal", (1.06, 99.64, 100)),
    ("mnist", "0.4", "medium", "ibp", (1.66, 12.16, 17.5)),
    ("mnist", "0.4", "medium", "cibp", (1.91, 9.7, 16.53)),
    ("mnist", "0.4", "large", "nominal", (0.65, 99.64, 100)),
    ("mnist", "0.4", "large", "ibp", (1.66, 10.34, 15.01)),
    ("mnist", "0.4", "large", "cibp", (1.62, 8.32, 15.58)),
    ("svhn", "8of255", "small", "nominal", (9.05, 82.05, 100)),
    ("svhn", "8of255", "small", "ibp", (26.60, 48.50, 60.87)),
    ("svhn", "8of255", "small", "cibp", (36.10, 49.31, 53.97)),
    ("svhn", "8of255", "medium", "nominal", (5.84, 65.60, 100)),
    ("svhn", "8of255", "medium", "ibp", (36.58, 48.79, 55.95)),
    ("svhn", "8of255", "medium", "cibp", (21.55, 39.23, 54.32)),
    ("svhn", "8of255", "large", "nominal", (5.78, 77.25, 100)),
    ("svhn", "8of255", "large", "ibp", (20.00, 37.06, 52.37)),
    ("svhn", "8of255", "large", "cibp", (42.62, 53.90, 59.16)),
]
NETS = ("small", "medium", "large")
TITLES = {"cifar10": "CIFAR-10", "mnist": "MNIST", "svhn": "SVHN"}


@dataclass(frozen=True)
class Cell:
    """Names a row of Table 2 or a curve of a figure.

    Attributes:
        eps: as in a preset's name.
        variant: what the preset's name has after the method: -normalized, -fast-ramp or nothing.
        printed: what Table 2 prints, None where it does not have the row.
    """

    dataset: str
    eps: str
    net: str
    method: str
    variant: str = ""
    printed: Errors | None = None

    @property
    def preset(self) -> str:
        """Names the recipe, and its runs' folders before `-seed<k>`."""
        return f"{self.dataset}-{self.net}-{self.eps}-{self.method}{self.variant}"


def _table() -> list[Cell]:
    """Returns the rows of Table 2.

    Its eps is of normalised pixels where there are such, and each of these rows has one beside it
    whose eps is of plain pixels, for which the paper prints nothing.
    """
    cells = []
    for dataset, eps, net, method, printed in PRINTED:
        if dataset == "mnist":
            cells.append(Cell(dataset, eps, net, method, printed=printed))
        else:
            cells.append(Cell(dataset, eps, net, method, "-normalized", printed))
            cells.append(Cell(dataset, eps, net, method))
    return cells


TABLE = _table()


@dataclass(frozen=True)
class Figure:
    """Describes a figure: panels of one size, row by row, with the curves of two methods.

    Attributes:
        epochs: the axis' end.
        widths: it shows the widths of the bounds, on a logarithmic axis; else errors, 0 to 100 %.
        columns: panels in a row.
        panels: their titles, and the cells of their curves.
    """

    title: str
    epochs: int
    widths: bool
    columns: int
    panels: dict[str, list[Cell]]


def _panels(
    datasets: Sequence[str], nets: Sequence[str], eps: str, variant: str
) -> dict[str, list[Cell]]:
    """Returns a panel of each data set and network: IBP and constrained IBP."""
    table = {cell.preset: cell for cell in TABLE}
    panels = {}
    for dataset in datasets:
        for net in nets:
            cells = [Cell(dataset, eps, net, method, variant) for method in ("ibp", "cibp")]
            panels[f"{TITLES[dataset]}, {net}"] = [table.get(cell.preset, cell) for cell in cells]
    return panels


_OF_8 = _panels(("cifar10", "svhn"), NETS, "8of255", "-normalized")
_OF_4 = _panels(("cifar10",), ("large",), "4of255", "-normalized")
_FAST = _panels(("mnist",), ("small",), "0.4", "-fast-ramp")
FIGURES = {
    "fig3": Figure("Figure 3: eps 8/255 (normalised)", 100, False, 3, _OF_8),
    "fig4": Figure("Figure 4: eps 4/255 (normalised)", 150, False, 1, _OF_4),
    "fig5": Figure("Figure 5: eps 0.4, fast ramp", 50, False, 1, _FAST),
    "fig6": Figure("Figure 6: eps 8/255 (normalised)", 100, True, 3, _OF_8),
    "fig7": Figure("Figure 7: eps 0.4, fast ramp", 50, True, 1, _FAST),
}


def cells_of(target: str) -> list[Cell]:
    """Returns the cells of "table2", of a figure, or of "all" of these; each once."""
    cells = list(TABLE) if target in ("table2", "all") else []
    for name, figure in FIGURES.items():
        if target in (name, "all"):
            cells += [cell for panel in figure.panels.values() for cell in panel]
    return list(dict.fromkeys(cells))
