"""The figure of one or several runs: what it shows, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import sys

import numpy as np
import pytest

from cibp_fast.training import plotting, runs
from cibp_fast.training.config import preset

pytest.importorskip("matplotlib")
from matplotlib.collections import LineCollection
from matplotlib.colors import rgb_to_hsv, to_hex, to_rgb
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
    """The Figure that `plot` or `plot_schedules` would write."""
    saved = []
    monkeypatch.setattr(plotting, "_save", lambda figure, output: saved.append(figure))

    def draw(subject, function=plotting.plot, **options):
        function(subject, tmp_path / "unwritten.png", **options)
        return saved[-1]

    return draw


def _panel(figure, title):
    (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
    return axes


def _final_texts(scale):
    finals = {"verified": 0.25, "PGD": 0.07, "test": 0.05}
    return {f"{error} {100 * (scale * value):.1f} %" for error, value in finals.items()}


def _texts(figure) -> set[str]:
    """Returns everything that is written in the figure."""
    return {text.get_text() for text in figure.findobj(Text)}


def _assert_apart(texts):
    """Checks that no text is written over another; its line may cross them."""
    boxes = [Text.get_window_extent(text) for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


ERRORS = "Errors on held-out examples"
WIDTH = "Width of the bounds on training batches"


@pytest.mark.parametrize(
    ("function", "suffix", "magic"),
    [
        (plotting.plot, "png", b"\x89PNG"),
        (plotting.plot, "pdf", b"%PDF"),
        (plotting.plot, "svg", b"<?xml"),
        (plotting.plot_schedules, "png", b"\x89PNG"),
    ],
)
def test_writes_the_format_that_the_ending_names(tmp_path, function, suffix, magic):
    output, run_dir = tmp_path / "new" / f"curves.{suffix}", _run(tmp_path / "a", "nominal")
    function([run_dir] if function is plotting.plot else runs.read_config(run_dir), output)
    assert output.read_bytes().startswith(magic)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_names_methods_axes_and_final_errors(tmp_path, figure_of):
    texts = _texts(figure_of([_run(tmp_path / "a"), _run(tmp_path / "b", "ibp")]))
    words = {"constrained IBP", "IBP", "epoch", "verified error", "PGD 7.0 %", "verified 25.0 %"}
    assert words <= texts
    assert "Training provably robust networks: mnist5k, small network, eps = 0.1" in texts


def test_labels_are_as_short_as_they_can_be(tmp_path, figure_of):
    a, b = _run(tmp_path / "a"), _run(tmp_path / "b", net="medium")
    assert {"a", "b"} <= _texts(figure_of([a, b]))
    assert {"a", "far/a"} <= _texts(figure_of([a, _run(tmp_path / "far" / "a")]))


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
    ((group, _),) = plotting._load([*seeds, _run(tmp_path / "other" / "x", lr=0.1, epochs=1)])
    assert group.label == label


def test_runs_that_have_not_finished_are_labelled_so(tmp_path):
    two = [_run(tmp_path / str(i), seed=i, finished=i == 0) for i in range(2)]
    ((two, one),) = plotting._load([*two, _run(tmp_path / "ibp", "ibp", finished=False)])
    assert two.label == "constrained IBP (2 seeds, 1 unfinished)"
    assert one.label == "IBP (unfinished)"


def test_a_folder_that_is_named_twice_is_drawn_once(tmp_path):
    a, b = _run(tmp_path / "a"), _run(tmp_path / "b", "ibp")
    ((first, second),) = plotting._load([a, b, tmp_path / "." / "a"])
    assert [first.label, second.label] == ["constrained IBP", "IBP"]
    assert [run.folder for run in first.runs] == [a]


@pytest.mark.parametrize(
    ("recipe", "other", "heading"),
    [
        ("mnist-small-0.4-{}", "fashion_mnist-small-0.4-cibp", "fashion_mnist, small network, "),
        ("mnist-small-0.4-{}", "mnist-small-0.3-cibp", "mnist, small network, eps = 0.3"),
        ("svhn-small-0.1-{}", "svhn-small-0.1-cibp-normalized", "eps = 0.1 (normalized)"),
        ("mnist-small-0.4-{}", "mnist-small-0.4-cibp-gowal", "eps = 0.4, clip 0,1"),
    ],
)
def test_what_cannot_be_compared_has_axes_of_its_own(tmp_path, figure_of, recipe, other, heading):
    own = [_run(tmp_path / name, name, recipe=recipe) for name in ("ibp", "cibp")]
    strange = _run(tmp_path / "strange", recipe=other, scale=2.0)
    figure = figure_of([own[0], strange, own[1]])
    errors = [axes for axes in figure.axes if axes.get_title() == ERRORS]
    assert [len(axes.lines) for axes in errors] == [2 * (3 + 3), 3 + 3]  # curves, final marks
    assert [line.get_ydata()[0] for line in errors[1].lines[1:3]] == [100.0, 50.0]
    texts = _texts(figure)
    assert "Training provably robust networks" in texts
    assert sum(heading in text for text in texts) == 1
    widths = [axes for axes in figure.axes if axes.get_title() == WIDTH]
    assert [len(axes.lines) for axes in widths] == [2, 1]


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ({"net": "medium"}, ("net small", "net medium")),
        ({"width": "all"}, ("width post", "width all")),
        ({"width_reduction": "sum"}, ("width_reduction mean", "width_reduction sum")),
        ({"eps_train_ratio": 1.1}, ("eps_train_ratio 1", "eps_train_ratio 1.1")),
    ],
)
def test_widths_of_another_kind_have_axes_of_their_own(tmp_path, figure_of, override, texts):
    run_dirs = [_run(tmp_path / "a"), _run(tmp_path / "b", **override)]
    figure = figure_of(run_dirs)
    assert len(_panel(figure, ERRORS).lines) == 2 * (3 + 3)
    for text in texts:
        assert len(_panel(figure, f"Width of the bounds,\n{text}").lines) == 1
    below = [axes for axes in figure.axes if "layer 1" in axes.get_title() or axes.texts][1:]
    assert not below[0].get_shared_y_axes().joined(*below)


def test_attacks_that_differ_are_named(tmp_path, figure_of):
    figure = figure_of([_run(tmp_path / "a"), _run(tmp_path / "b", "ibp", pgd_steps=200)])
    assert {"PGD (pgd_steps 40) 7.0 %", "PGD (pgd_steps 200) 7.0 %"} <= _texts(figure)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,)])
def test_a_method_has_its_colour(tmp_path, figure_of, order):
    methods = ("nominal", "ibp", "cibp")
    run_dirs = [_run(tmp_path / methods[i], methods[i], epochs=1) for i in order]
    lines = _panel(figure_of(run_dirs), ERRORS).lines[::6]
    expected = [plotting.METHOD_COLOURS[methods[i]].lower() for i in order]
    assert [to_hex(line.get_color()) for line in lines] == expected
    assert len({*expected}) == len(order)


def test_runs_of_a_method_on_the_same_axes_are_shades_of_its_colour(tmp_path, figure_of):
    run_dirs = [_run(tmp_path / f"run {i}", lr=0.1**i, epochs=1) for i in range(1, 4)]
    colours = [line.get_color() for line in _panel(figure_of(run_dirs), WIDTH).lines]
    assert colours[0] == plotting.METHOD_COLOURS["cibp"].lower() and len(set(colours)) == 3
    hues = [rgb_to_hsv(to_rgb(colour))[0] for colour in colours]
    assert hues == pytest.approx([hues[0]] * 3, abs=0.01)


def test_eps_in_the_title_reads_as_in_the_presets():
    assert plotting._eps_text(8 / 255, "pixel") == "8/255"
    assert plotting._eps_text(8 / 255, "normalized") == "8/255 (normalized)"
    decimals = [plotting._eps_text(eps, "pixel") for eps in (0.1, 0.4, 0.031)]
    assert decimals == ["0.1", "0.4", "0.031"]


def test_error_curves_are_joined_over_epochs_without_evaluation(tmp_path, figure_of):
    errors = _panel(figure_of([_run(tmp_path / "a")]), ERRORS)
    for line, first in zip(errors.lines, (35, 50), strict=False):  # the mean, the verified error
        assert line.get_xdata().tolist() == [1, 3, 4]
        assert line.get_ydata() == pytest.approx([first, first / 3, first / 4])
    assert errors.lines[-2].get_ydata() == pytest.approx([20, 20 / 3, 5])


def test_errors_above_ten_percent_are_on_a_linear_scale(tmp_path, figure_of):
    assert _panel(figure_of([_run(tmp_path / "a")]), ERRORS).get_yscale() == "log"
    high = _run(tmp_path / "b", scale=2.0, epochs=1)
    assert _panel(figure_of([high]), ERRORS).get_yscale() == "linear"


def test_every_layer_has_its_labelled_line_in_its_run_s_panel(tmp_path, figure_of):
    figure = figure_of([_run(tmp_path / "a"), _run(tmp_path / "b", "ibp", layers=7)])
    ibp, constrained = _panel(figure, "IBP"), _panel(figure, "constrained IBP")
    assert [len(axes.lines) for axes in (constrained, ibp)] == [4, 7]
    assert constrained.lines[2].get_xydata()[1].tolist() == [2, 50]
    words = {text.get_text() for text in constrained.texts}
    assert words == {"layer 1", "layer 2", "layer 3", "logits"}
    assert constrained.get_ylim() == ibp.get_ylim()
    sums = [sum(to_rgb(line.get_color())) for line in ibp.lines]
    assert sums == sorted(sums, reverse=True) and len(set(sums)) == 7  # light to dark


def test_layers_are_named_by_the_widths_that_were_trained_with(tmp_path, figure_of):
    run_dir = _run(tmp_path / "a", layers=5, width="all")
    words = {text.get_text() for text in _panel(figure_of([run_dir]), "constrained IBP").texts}
    assert words == {"layer 1 pre", "layer 1 post", "layer 2 pre", "layer 2 post", "logits"}


def test_no_texts_overlap_with_seven_equal_widths(tmp_path, figure_of):
    equal = {"widths": [1.0] * 7}
    run_dirs = [_run(tmp_path / method, method, changes=equal) for method in ("ibp", "cibp")]
    figure = figure_of([*run_dirs, _run(tmp_path / "nominal", "nominal")])
    plotting._arrange(figure)
    for axes in figure.axes:
        _assert_apart(axes.texts)


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
    assert [axes.get_title() for axes in figure_of([nominal, old]).axes] == [ERRORS, WIDTH]


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
    texts = {text.get_text() for text in errors.texts if text.get_color() == colours[0]}
    assert texts == _final_texts(mean)
    assert "seeds: mean, and range from least to greatest" in _texts(figure)
    assert errors.lines[0].get_ydata()[-1] == pytest.approx(mean * (12.5 + 5) / 2)
    assert errors.lines[1].get_ydata()[-1] == pytest.approx(mean * 12.5)
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
    assert "verified 25.0 % (1 of 2)" in [text.get_text() for text in _panel(figure, ERRORS).texts]


def test_seeds_with_the_same_errors_are_drawn(tmp_path, figure_of):
    """Their mean may be beside them by rounding."""
    seeds = [_run(tmp_path / f"{seed}", seed=seed, epochs=1, scale=0.5) for seed in range(5)]
    assert _final_texts(0.5) <= _texts(figure_of(seeds))


def test_the_same_seed_twice_is_two_runs(tmp_path, figure_of):
    run_dirs = [_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert len(_panel(figure_of(run_dirs), WIDTH).lines) == 3


def test_schedules_are_drawn_as_they_are(tmp_path, figure_of):
    config = preset("mnist5k-small-0.1-cibp", eps_ramp=(7, 7))
    figure = figure_of(config, plotting.plot_schedules, epoch_steps=40)
    names = ("training eps", "kappa", "learning rate")
    assert [axes.get_ylabel() for axes in figure.axes] == list(names)
    schedules = (config.eps_schedule(), config.kappa_schedule(), config.lr_schedule())
    for axes, schedule in zip(figure.axes, schedules, strict=True):
        (line,) = axes.lines
        points = [tuple(point) for point in line.get_xydata().tolist()]
        assert points == schedule.points(config.steps)
        assert line.get_drawstyle() == schedule.drawstyle
        assert line.get_color() == plotting.METHOD_COLOURS["cibp"]
    figure.draw_without_rendering()
    (epochs,) = figure.axes[0].child_axes
    assert epochs.get_xlim() == (0, 75)
    assert not figure_of(config, plotting.plot_schedules).axes[0].child_axes


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
    figure = figure_of(config, plotting.plot_schedules)
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


@pytest.mark.parametrize("count", [4, 12])
def test_many_runs_have_a_panel_each_with_all_labels_at_their_ends(tmp_path, figure_of, count):
    run_dirs = [
        _run(tmp_path / f"run {i}", lr=0.1 / i, epochs=2 if i == 1 else 4, scale=1 - i / 20)
        for i in range(1, 1 + count)
    ]
    figure = figure_of(run_dirs)
    names = [f"run {i}" for i in range(1, 1 + count)]
    assert [axes.get_title() for axes in figure.axes] == [*names, WIDTH, *names]
    blue = plotting.METHOD_COLOURS["cibp"].lower()
    plotting._arrange(figure)
    for i, axes in enumerate(figure.axes[:count], 1):
        assert {text.get_text() for text in axes.texts} == _final_texts(1 - i / 20)
        grey = [line for line in axes.lines if to_hex(line.get_color()) != blue]
        assert len(grey) == count - 1  # the others' verified errors
        (left,) = {label.xyann[0] for label in axes.texts}
        assert 0 < left - (2 if i == 1 else 4) < 0.15 * 4
    assert {text.get_text() for text in figure.axes[count].texts} == set(names)
    _assert_apart([text for axes in figure.axes for text in axes.texts])


def test_a_label_is_joined_to_the_end_of_its_curve(tmp_path, figure_of):
    figure = figure_of([_run(tmp_path / "a", epochs=2, scale=1.1), _run(tmp_path / "b", "ibp")])
    plotting._arrange(figure)
    axes = _panel(figure, ERRORS)
    ends = np.array(sorted(label.xy for label in axes.texts))
    marks = [line.get_xydata()[0] for line in axes.lines if line.get_marker() in ("o", "X", "s")]
    assert ends == pytest.approx(np.array(sorted(map(tuple, marks))))
    assert {round(x) for x, _ in ends} == {2, 4}


def test_long_labels_and_zero_errors_leave_the_layout_whole(tmp_path, figure_of, recwarn):
    zero = {"width": 0.0, "widths": [0.0], "test_error": 0.0, "verified_error": 0.0}
    run_dirs = [
        _run(tmp_path / f"{'name ' * 30}{i}", lr=0.1**i, epochs=1, changes=zero if i == 1 else {})
        for i in range(1, 6)
    ]
    figure = figure_of(run_dirs)
    plotting._arrange(figure)
    assert not recwarn.list  # matplotlib warns where it gives the layout up
    _assert_apart([axes.title for axes in figure.axes])
    first = figure.axes[0].get_title()
    assert first.startswith("...") and first.endswith("name 1") and first.count("\n") == 1


def test_bad_input(tmp_path):
    run_dir = _run(tmp_path / "a")
    with pytest.raises(ValueError, match="name at least one run folder"):
        plotting.plot([], tmp_path / "curves.png")
    with pytest.raises(FileNotFoundError, match="nowhere is not a run folder"):
        plotting.plot([run_dir, tmp_path / "nowhere"], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="epoch_steps must be 1 or more, or None, not 0"):
        plotting.plot_schedules(runs.read_config(run_dir), tmp_path / "a.png", epoch_steps=0)
    subjects = {plotting.plot: [run_dir], plotting.plot_schedules: runs.read_config(run_dir)}
    for function, subject in subjects.items():
        with pytest.raises(ValueError, match=r"must end in .png, .pdf or .svg, not 'curves.bmp'"):
            function(subject, tmp_path / "curves.bmp")
        with pytest.raises(OSError, match=r"cannot make the folder .*config.json: File exists"):
            function(subject, run_dir / "config.json" / "curves.png")
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


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for function, subject in {plotting.plot: [tmp_path], plotting.plot_schedules: None}.items():
        with pytest.raises(ImportError, match=r"pip install 'cibp-fast\[plot\]'"):
            function(subject, tmp_path / "curves.png")


def test_texts_are_moved_apart_by_as_little_as_possible():
    assert plotting._moved_apart([0.1, 0.5], 0.1) == pytest.approx([0.1, 0.5])
    assert plotting._moved_apart([0.1, 0.5, 0.5, 0.52], 0.1) == pytest.approx(
        [0.1, 0.40667, 0.50667, 0.60667], 1e-3
    )
    assert plotting._moved_apart([0.3, 0.3], 0.1) == pytest.approx([0.25, 0.35])
