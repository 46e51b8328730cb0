"""The figure of one or several runs: what it shows, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from cibp_fast.training import plotting, runs
from cibp_fast.training.config import preset

pytest.importorskip("matplotlib")
from matplotlib.collections import LineCollection
from matplotlib.colors import rgb_to_hsv, to_rgb
from matplotlib.text import Text


def _run(
    folder,
    method="cibp",
    epochs=4,
    finished=True,
    layers=4,
    scale=1.0,
    recipe="mnist5k-small-0.1-{}",
    changes=None,
    **overrides,
):
    """Makes a run folder, in which each error and width is `scale` times its default.

    changes replace values in all of its records, None is left out.
    """
    config = preset(recipe.format(method), **overrides)
    runs.make_folder(folder)
    runs.write_atomic(folder / "config.json", config.to_json().encode())
    bounded = method != "nominal"
    records = [
        {
            "epoch": epoch,
            "step": 40 * epoch,
            "width": scale * 0.5 / epoch if bounded else None,
            "widths": [scale * 10.0**layer / epoch for layer in range(layers)] if bounded else [],
            "test_error": None if epoch == 2 else scale * 0.2 / epoch,
            "verified_error": None if epoch == 2 else scale * 0.5 / epoch,
        }
        | (changes or {})
        for epoch in range(1, epochs + 1)
    ]
    runs.write_metrics(folder, records)
    if finished:
        final = {"test_error": 0.05, "pgd_error": 0.07, "verified_error": 0.25}
        rest = {"examples": 40, "contradictions": 0, "pgd_steps": 2, "seconds": 9.5}
        runs.write_result(folder, {name: scale * value for name, value in final.items()} | rest)
    return folder


@pytest.fixture
def figure_of(monkeypatch, tmp_path):
    """Gives the Figure that `plot` or `plot_schedules` would write."""
    saved = []
    monkeypatch.setattr(plotting, "_save", lambda figure, output: saved.append(figure))

    def draw(subject, function=plotting.plot, **options):
        function(subject, tmp_path / "unwritten.png", **options)
        return saved[-1]

    return draw


def _panel(figure, title):
    (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
    return axes


def _final_text(scale) -> str:
    finals = {"verified": 0.25, "PGD": 0.07, "test": 0.05}
    return ", ".join(f"{error} {100 * (scale * value):.1f} %" for error, value in finals.items())


def _legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def _texts(figure) -> set[str]:
    """Returns everything that is written in the figure."""
    return {text.get_text() for text in figure.findobj(Text)}


def schedules(config, output):
    plotting.plot_schedules(config, output, 40)


ERRORS = "Errors on held-out examples"
WIDTH = "Width of the bounds on training batches"


@pytest.mark.parametrize(
    ("function", "suffix", "magic"),
    [
        (plotting.plot, "png", b"\x89PNG"),
        (plotting.plot, "pdf", b"%PDF"),
        (plotting.plot, "svg", b"<?xml"),
        (schedules, "png", b"\x89PNG"),
    ],
)
def test_writes_the_format_that_the_ending_names(tmp_path, function, suffix, magic):
    (tmp_path / "new").mkdir()
    output, run_dir = tmp_path / "new" / f"curves.{suffix}", _run(tmp_path / "a", "nominal")
    function([run_dir] if function is plotting.plot else runs.read_config(run_dir), output)
    assert output.read_bytes().startswith(magic)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_names_methods_axes_and_final_errors(tmp_path, figure_of):
    texts = _texts(figure_of([_run(tmp_path / "a"), _run(tmp_path / "b", "ibp")]))
    finals = {f"{label}: {_final_text(1)}" for label in ("constrained IBP", "IBP")}
    assert finals | {"epoch", "verified error", "PGD error", "test error"} <= texts
    assert "Training provably robust networks: mnist5k, small network, eps = 0.1" in texts


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("x-0.1-seed0", "x-0.1-seed10"), "x-0.1 (2 seeds)"),
        (("x-0.1-Seed1", "x-0.1-Seed10"), "x-0.1 (2 seeds)"),
        (("x0/seed0", "x0/seed10"), "x0 (2 seeds)"),
        (("x/0", "x/10"), "x (2 seeds)"),
        (("seed0", "seed10"), "seed0, seed10 (2 seeds)"),
        (("a", "b"), "a, b (2 seeds)"),
    ],
)
def test_a_group_of_seeds_has_the_name_without_the_seed(tmp_path, names, label):
    seeds = [_run(tmp_path / name, seed=10 * i, epochs=1) for i, name in enumerate(names)]
    group, _ = plotting._load([*seeds, _run(tmp_path / "other" / "x", lr=0.1, epochs=1)])
    assert group.label == label


def test_labels_are_as_short_as_they_can_be(tmp_path):
    """Checks that they say which runs have not finished; a folder named twice is drawn once."""

    def labels(*run_dirs):
        return [group.label for group in plotting._load(run_dirs)]

    a, b, far = (
        _run(tmp_path / name, **more)
        for name, more in (("a", {}), ("b", {"net": "medium"}), ("far/a", {}))
    )
    assert labels(a, b) == ["a", "b"] and labels(a, far) == ["a", "far/a"]
    ibp = _run(tmp_path / "ibp", "ibp", finished=False)
    assert labels(a, ibp, tmp_path / "." / "a") == ["constrained IBP", "IBP (unfinished)"]
    other = _run(tmp_path / "1", seed=1, finished=False)
    assert labels(a, other, ibp) == ["constrained IBP (2 seeds, 1 unfinished)", "IBP (unfinished)"]


@pytest.mark.parametrize(
    ("recipe", "other", "differ"),
    [
        ("mnist-small-0.4-{}", "fashion_mnist-small-0.4-cibp", "dataset differ"),
        ("mnist-small-0.4-{}", "mnist-small-0.3-cibp", r"eps differ \(0.4 and 0.3\)"),
        ("svhn-small-0.1-{}", "svhn-small-0.1-cibp-normalized", "eps_space differ"),
        ("mnist-small-0.4-{}", "mnist-small-0.4-cibp-gowal", "clip differ"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, figure_of, recipe, other, differ):
    own, strange = _run(tmp_path / "own", recipe=recipe), _run(tmp_path / "other", recipe=other)
    with pytest.raises(
        ValueError, match=f"own and .*other cannot be compared, since their {differ}"
    ):
        figure_of([own, strange])


@pytest.mark.parametrize(
    "override",
    [{"net": "medium"}, {"width": "all"}, {"width_reduction": "sum"}, {"eps_train_ratio": 1.1}],
)
def test_sums_of_widths_of_another_kind_are_left_out(tmp_path, figure_of, override):
    figure = figure_of([_run(tmp_path / "a"), _run(tmp_path / "b", **override)])
    assert [axes.get_title() for axes in figure.axes] == [ERRORS, "a", "b"]
    _, *below = figure.axes
    assert not below[0].get_shared_y_axes().joined(*below)


def test_runs_of_a_method_on_the_same_axes_are_shades_of_its_colour(tmp_path, figure_of):
    run_dirs = [_run(tmp_path / f"run {i}", lr=0.1**i, epochs=1) for i in range(1, 4)]
    colours = [line.get_color() for line in _panel(figure_of(run_dirs), WIDTH).lines]
    assert colours[0] == plotting.METHOD_COLOURS["cibp"].lower() and len(set(colours)) == 3
    hues = [rgb_to_hsv(to_rgb(colour))[0] for colour in colours]
    assert hues == pytest.approx([hues[0]] * 3, abs=0.01)


@pytest.mark.parametrize(
    ("recipe", "eps"),
    [
        ("cifar10-small-8of255-{}", "eps = 8/255"),
        ("cifar10-small-8of255-{}-normalized", "eps = 8/255 (normalized)"),
        ("mnist-small-0.4-{}", "eps = 0.4"),
        ("mnist-small-0.031-{}", "eps = 0.031"),
    ],
)
def test_eps_in_the_title_reads_as_in_the_presets(tmp_path, figure_of, recipe, eps):
    (title,) = (t for t in _texts(figure_of([_run(tmp_path / "a", recipe=recipe)])) if "eps" in t)
    assert title.endswith(eps)


def test_error_curves_are_joined_over_epochs_without_evaluation(tmp_path, figure_of):
    errors = _panel(figure_of([_run(tmp_path / "a")]), ERRORS)
    curves = [line for line in errors.lines if len(line.get_xdata()) > 1]
    for line, first in zip(curves, (50, 20), strict=True):  # verified, test
        assert line.get_xdata().tolist() == [1, 3, 4]
        assert line.get_ydata() == pytest.approx([first, first / 3, first / 4])


def test_errors_above_ten_percent_are_on_a_linear_scale(tmp_path, figure_of):
    assert _panel(figure_of([_run(tmp_path / "a")]), ERRORS).get_yscale() == "log"
    high = _run(tmp_path / "b", scale=2.0, epochs=1)
    assert _panel(figure_of([high]), ERRORS).get_yscale() == "linear"


def test_every_layer_has_its_labelled_line_in_its_run_s_panel(tmp_path, figure_of):
    figure = figure_of([_run(tmp_path / "a"), _run(tmp_path / "b", "ibp", layers=7)])
    ibp, constrained = _panel(figure, "IBP"), _panel(figure, "constrained IBP")
    assert [len(axes.lines) for axes in (constrained, ibp)] == [4, 7]
    assert constrained.lines[2].get_xydata()[1].tolist() == [2, 50]
    assert _legend(constrained) == ["layer 1", "layer 2", "layer 3", "logits"]
    assert constrained.get_ylim() == ibp.get_ylim()
    sums = [sum(to_rgb(line.get_color())) for line in ibp.lines]
    assert sums == sorted(sums, reverse=True) and len(set(sums)) == 7  # light to dark


def test_layers_are_named_by_the_widths_that_were_trained_with(tmp_path, figure_of):
    run_dir = _run(tmp_path / "a", layers=5, width="all")
    words = ["layer 1 pre", "layer 1 post", "layer 2 pre", "layer 2 post", "logits"]
    assert _legend(_panel(figure_of([run_dir]), "constrained IBP")) == words


@pytest.mark.parametrize("missing", [None, math.nan, 0.0])
def test_widths_that_cannot_be_shown_leave_a_gap(tmp_path, figure_of, missing):
    run_dir = _run(tmp_path / "a")
    lines = [json.dumps(record) for record in runs.read_metrics(run_dir)]
    lines[2] = json.dumps(json.loads(lines[2]) | {"widths": [1.0, missing, 1.0, missing]})
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))
    drawn = _panel(figure_of([run_dir]), "constrained IBP").lines[1].get_ydata()
    assert np.isnan(drawn).tolist() == [False, False, True, False]


def test_runs_without_widths_have_no_panel_of_them(tmp_path, figure_of):
    nominal = _run(tmp_path / "a", "nominal")
    assert [axes.get_title() for axes in figure_of([nominal]).axes] == [ERRORS]
    old = _run(tmp_path / "b", "ibp", changes={"widths": None})
    assert [axes.get_title() for axes in figure_of([nominal, old]).axes] == [ERRORS]


def test_seeds_of_a_config_are_drawn_as_one(tmp_path, figure_of):
    seeds = [_run(tmp_path / f"{seed}", seed=seed, scale=2**seed / 2) for seed in range(3)]
    figure = figure_of([*seeds, _run(tmp_path / "ibp", "ibp")])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [ERRORS, WIDTH, "constrained IBP (3 seeds)", "IBP"]
    width = _panel(figure, WIDTH)
    colours = [plotting.METHOD_COLOURS[method].lower() for method in ("cibp", "ibp")]
    assert [line.get_color() for line in width.lines] == colours
    mean = (0.5 + 1 + 2) / 3
    expected = [mean * each for each in (0.5, 0.25, 0.5 / 3, 0.125)]
    assert width.lines[0].get_ydata() == pytest.approx(expected)
    (band,) = width.collections
    corners = band.get_paths()[0].vertices
    assert [corners[corners[:, 0] == 4, 1].min(), corners[:, 1].max()] == [0.0625, 1.0]
    errors = _panel(figure, ERRORS)
    assert f"constrained IBP (3 seeds): {_final_text(mean)}" in _legend(errors)
    assert errors.lines[0].get_ydata()[-1] == pytest.approx(mean * 12.5)
    ranges = [c for c in errors.collections if isinstance(c, LineCollection)]
    assert ranges[0].get_segments()[0][:, 1].tolist() == pytest.approx([12.5, 50.0])


def test_seeds_of_different_epochs_are_lines_of_one_colour(tmp_path, figure_of):
    seeds = [
        _run(tmp_path / "0"),
        _run(tmp_path / "1", seed=1, epochs=2, finished=False),
    ]
    figure = figure_of(seeds)
    width = _panel(figure, WIDTH)
    assert [len(line.get_xdata()) for line in width.lines] == [4, 2]
    assert {line.get_color() for line in width.lines} == {plotting.METHOD_COLOURS["cibp"].lower()}
    assert not width.collections
    label = f"constrained IBP (2 seeds, 1 unfinished): {_final_text(1)} (1 of 2)"
    assert label in _legend(_panel(figure, ERRORS))


def test_seeds_with_the_same_errors_are_drawn(tmp_path, figure_of):
    """Draws them, though their mean may be beside them by rounding."""
    seeds = [_run(tmp_path / f"{seed}", seed=seed, epochs=1, scale=0.5) for seed in range(5)]
    assert f"constrained IBP (5 seeds): {_final_text(0.5)}" in _texts(figure_of(seeds))


def test_the_same_seed_twice_is_two_runs(tmp_path, figure_of):
    run_dirs = [_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert len(_panel(figure_of(run_dirs), WIDTH).lines) == 3


@pytest.mark.parametrize("eps_ramp", [(7, 7), (0, 0), (5, 30), (3000, 3000)])
def test_schedules_are_drawn_as_they_are(figure_of, eps_ramp):
    config = preset("mnist5k-small-0.1-cibp", eps_ramp=eps_ramp)
    figure = figure_of(config, plotting.plot_schedules, epoch_steps=40)
    names = ("training eps", "kappa", "learning rate")
    assert [axes.get_ylabel() for axes in figure.axes] == list(names)
    schedules = (config.eps_schedule(), config.kappa_schedule(), config.lr_schedule())
    every = range(config.steps + 1)
    for axes, schedule in zip(figure.axes, schedules, strict=True):
        (line,) = axes.lines
        heights = np.interp(every, *line.get_data())  # a jump is drawn within one step
        np.testing.assert_allclose(heights, [schedule(step) for step in every], rtol=1e-9)
        assert line.get_color() == plotting.METHOD_COLOURS["cibp"]
    figure.draw_without_rendering()
    (epochs,) = figure.axes[0].child_axes
    assert epochs.get_xlim() == (0, 75)


def test_a_smoothed_growth_is_drawn_as_it_is(figure_of):
    config = preset("mnist5k-cnn7-0.1-mtl")
    figure = figure_of(config, plotting.plot_schedules, epoch_steps=40)
    (line,) = figure.axes[0].lines
    every = range(config.steps + 1)
    expected = [config.eps_schedule()(step) for step in every]
    np.testing.assert_allclose(np.interp(every, *line.get_data()), expected, atol=1e-5)
    assert max(np.diff(expected)) > 1.2 * 0.1 / 840  # no straight line would do


@pytest.mark.parametrize(
    ("overrides", "scale"),
    [
        ({}, "log"),
        ({"lr": 0.0, "eps": 0.0}, "linear"),
        ({"lr_decay_at": ()}, "linear"),
        ({"lr_decay_factor": 0.0}, "linear"),
        ({"steps": 1, "lr_decay_at": (), "eps_ramp": (0, 1), "kappa_ramp": (0, 0)}, "linear"),
    ],
)
def test_schedules_have_scales_that_show_them(figure_of, recwarn, overrides, scale):
    config = preset("mnist5k-small-0.1-cibp", **overrides)
    figure = figure_of(config, plotting.plot_schedules, epoch_steps=40)
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear", scale]
    for axes in figure.axes:
        low, high = axes.get_ylim()
        heights = axes.lines[0].get_ydata()
        assert low <= min(heights) <= max(heights) < high
    assert not recwarn.list  # matplotlib warns of limits that show nothing


def test_an_unfinished_run_a_nominal_one_and_zero_errors_are_drawn(tmp_path):
    nominal = _run(tmp_path / "a", "nominal", finished=False)
    nothing = {"width": 0.0, "test_error": 0.0, "verified_error": 0.0}
    zero = _run(tmp_path / "b", "ibp", epochs=1, changes=nothing)
    plotting.plot([nominal], tmp_path / "a.png")
    plotting.plot([nominal, zero], tmp_path / "b.png")
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()


def test_many_runs_with_long_names_leave_the_layout_whole(tmp_path, figure_of, recwarn):
    zero = {"width": 0.0, "widths": [0.0], "test_error": 0.0, "verified_error": 0.0}
    names = [f"{'name ' * 30}{i}" for i in range(12)]
    run_dirs = [
        _run(tmp_path / name, lr=0.1 / (1 + i), epochs=1, changes=zero if i == 1 else {})
        for i, name in enumerate(names)
    ]
    figure = figure_of(run_dirs)
    figure.draw_without_rendering()
    assert not recwarn.list  # matplotlib warns where it gives the layout up
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    first = figure.axes[2].get_title()
    assert first.startswith("...") and first.endswith("name 0")
    assert len(figure.axes) == 2 + 12


def test_bad_input(tmp_path):
    run_dir = _run(tmp_path / "a")
    with pytest.raises(ValueError, match="name at least one run folder"):
        plotting.plot([], tmp_path / "curves.png")
    with pytest.raises(FileNotFoundError, match="nowhere is not a run folder"):
        plotting.plot([run_dir, tmp_path / "nowhere"], tmp_path / "curves.png")
    for function, subject in ((plotting.plot, [run_dir]), (schedules, runs.read_config(run_dir))):
        with pytest.raises(ValueError, match=r"must end in .png, .pdf or .svg, not 'curves.bmp'"):
            function(subject, tmp_path / "curves.bmp")
        for folder in (run_dir / "config.json", tmp_path / "new"):
            with pytest.raises(FileNotFoundError, match=f"^{folder} is not a folder: make it, or"):
                function(subject, folder / "curves.png")
    runs.write_metrics(run_dir, [])
    with pytest.raises(ValueError, match="a has no finished epoch to plot"):
        plotting.plot([run_dir], tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


BAD_WIDTHS = (
    '{"epoch": 1, "step": 9, "width": 1, "test_error": 1, "verified_error": 1, "widths": %s}'
)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", '{"epoch": 1}'),
        ("metrics.jsonl", "5"),
        ("metrics.jsonl", BAD_WIDTHS % '"wide"'),
        ("metrics.jsonl", BAD_WIDTHS % '[1, "wide"]'),
        ("result.json", "{}"),
    ],
)
def test_a_damaged_run_is_named(tmp_path, file, content):
    run_dir = _run(tmp_path / "a")
    (run_dir / file).write_text(content)
    with pytest.raises(ValueError, match=f"a/{file}"):
        plotting.plot([run_dir], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
