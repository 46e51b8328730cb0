"""The figure of one or several runs: what it shows, and what it refuses."""

from __future__ import annotations

import builtins

import pytest

from cibp_fast import plotting, runs
from cibp_fast.config import preset

matplotlib = pytest.importorskip("matplotlib")


def _run(folder, method="cibp", seed=0, epochs=4, finished=True, eps="0.1"):
    config = preset(f"mnist5k-small-{eps}-{method}", seed=seed)
    runs.create(folder, config)
    records = [
        {
            "epoch": epoch,
            "width": None if method == "nominal" else 0.5 / epoch,
            "test_error": None if epoch == 2 else 0.2 / epoch,
            "verified_error": None if epoch == 2 else 1 / epoch,
        }
        for epoch in range(1, epochs + 1)
    ]
    runs.write_metrics(folder, records)
    if finished:
        runs.write_result(folder, {"test_error": 0.05, "pgd_error": 0.07, "verified_error": 0.25})
    return folder


@pytest.mark.parametrize(
    ("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_writes_the_format_that_the_ending_names(tmp_path, suffix, magic):
    output = tmp_path / "new" / f"curves.{suffix}"
    plotting.plot([_run(tmp_path / "a"), _run(tmp_path / "b", "ibp")], output)
    assert output.read_bytes().startswith(magic)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def _texts(tmp_path, run_dirs) -> str:
    """Everything that is written in the figure: svg with text as text."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plotting.plot(run_dirs, tmp_path / "curves.svg")
    return (tmp_path / "curves.svg").read_text()


def test_names_methods_axes_and_final_errors(tmp_path):
    text = _texts(tmp_path, [_run(tmp_path / "a"), _run(tmp_path / "b", "ibp")])
    for words in ("constrained IBP", "IBP", "epoch", "verified", "PGD", "25.0 %", "eps = 0.1"):
        assert words in text


def test_labels_are_as_short_as_they_can_be(tmp_path):
    text = _texts(tmp_path, [_run(tmp_path / "a"), _run(tmp_path / "b", seed=1)])
    assert "mnist5k-small-0.1-cibp seed 1" in text
    text = _texts(tmp_path, [tmp_path / "a", _run(tmp_path / "c")])
    assert ">c" in text or "c:" in text


def test_an_unfinished_run_a_nominal_one_and_zero_errors_are_drawn(tmp_path):
    nominal = _run(tmp_path / "a", "nominal", finished=False)
    zero = _run(tmp_path / "b", "ibp", epochs=1)
    runs.write_metrics(zero, [{"epoch": 1, "width": 0.0, "test_error": 0.0, "verified_error": 0.0}])
    plotting.plot([nominal], tmp_path / "a.png")
    plotting.plot([nominal, zero], tmp_path / "b.png")
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()


def test_many_runs(tmp_path):
    run_dirs = [_run(tmp_path / str(seed), seed=seed, epochs=1) for seed in range(9)]
    plotting.plot(run_dirs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_bad_input(tmp_path):
    run_dir = _run(tmp_path / "a")
    with pytest.raises(ValueError, match="name at least one run folder"):
        plotting.plot([], tmp_path / "curves.png")
    with pytest.raises(ValueError, match=r"must end in .png, .pdf or .svg, not 'curves.bmp'"):
        plotting.plot([run_dir], tmp_path / "curves.bmp")
    with pytest.raises(FileNotFoundError, match="nowhere is not a run folder"):
        plotting.plot([run_dir, tmp_path / "nowhere"], tmp_path / "curves.png")
    with pytest.raises(OSError, match=r"cannot make the folder .*config.json: File exists"):
        plotting.plot([run_dir], run_dir / "config.json" / "curves.png")
    runs.write_metrics(run_dir, [])
    with pytest.raises(ValueError, match="a has no finished epoch to plot"):
        plotting.plot([run_dir], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [("metrics.jsonl", '{"epoch": 1}'), ("metrics.jsonl", "5"), ("result.json", "{}")],
)
def test_a_damaged_run_is_named(tmp_path, file, content):
    run_dir = _run(tmp_path / "a")
    (run_dir / file).write_text(content)
    with pytest.raises(ValueError, match=f"a/{file}"):
        plotting.plot([run_dir], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'cibp-fast\[plot\]'"):
        plotting.plot([_run(tmp_path / "a")], tmp_path / "curves.png")


def test_texts_are_moved_apart_by_as_little_as_possible():
    assert plotting._apart([0.1, 0.5], 0.1) == pytest.approx([0.1, 0.5])
    assert plotting._apart([0.1, 0.5, 0.5, 0.52], 0.1) == pytest.approx(
        [0.1, 0.40667, 0.50667, 0.60667], 1e-3
    )
    assert plotting._apart([0.3, 0.3], 0.1) == pytest.approx([0.25, 0.35])
