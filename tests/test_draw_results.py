"""The pictures of docs/results.md say what the figures in docs/results/*.json say."""
import importlib.util

import pytest

from conftest import ROOT
from plumbing.pictures import new_figure

spec = importlib.util.spec_from_file_location("draw_results", ROOT / "docs" / "draw_results.py")
draw_results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw_results)


def run_of(name, loss, seed=0, meta=False, changes="", steps=10):
    """A run of the JSON files, as far as the pictures need it. It costs 2 TFLOP per update."""
    probes = {probe: {"steps": [0, 1, steps], "mean": [0.9, 0.5, 0.7], "rise_and_fall": 2,
                      "fall_and_rise": 9} for probe in draw_results.CURVES}
    return {"name": name, "seed": seed, "meta": meta, "hybrid_ratio": 0.5 if meta else None,
            "changes": changes, "steps": steps, "tflop": 2.0 * steps, "passes": steps / 5,
            "val_loss": loss, "probes": probes}


def test_seeds_are_grouped():
    runs = [run_of("a", 4.0), run_of("b", 4.2, seed=1), run_of("c", 5.0, changes="dropout=0.1"),
            run_of("d", 6.0, meta=True)]
    vanilla, rival, hybrid = draw_results.group_seeds(runs)
    assert (vanilla["kind"], rival["kind"], hybrid["kind"]) == ("vanilla", "rival", "hybrid")
    assert vanilla["loss"] == pytest.approx(4.1) and vanilla["seeds"] == 2
    assert vanilla["sd"] == pytest.approx(0.1414, abs=1e-4)
    assert rival["label"] == "dropout 0.1" and rival["sd"] == 0
    assert hybrid["tflop"] == 20 and hybrid["passes"] == 2


def test_the_title_of_little_text_names_the_best():
    runs = [run_of("a", 4.25), run_of("b", 4.5, steps=20), run_of("c", 4.125, meta=True),
            run_of("d", 4.0, changes="dropout=0.1")]
    figure = new_figure()
    draw_results.little_text(figure, {"runs": runs})
    title = " ".join(figure.axes[0].get_title(loc="left").split())
    assert "best vanilla run ends at 4.25 nats, the best hybrid run at 4.12" in title
    assert "(dropout 0.1) at 4.00" in title
    # The vanilla runs, by cost and by passes.
    for ax, places in zip(figure.axes, ([20, 40], [2, 4])):
        assert ax.lines[0].get_xdata().tolist() == places
        assert ax.lines[0].get_ydata().tolist() == [4.25, 4.5]


def test_gaps_are_taken_at_equal_passes():
    """Between 2 and 8 passes, 4 are half way on a logarithmic axis. One hybrid run lies outside."""
    runs = [run_of("a", 5.0, steps=10), run_of("b", 4.0, steps=40),
            run_of("c", 4.75, meta=True, steps=20), run_of("d", 9.0, meta=True, steps=50)]
    gaps = draw_results.gaps_at_equal_passes(draw_results.group_seeds(runs))
    assert gaps == pytest.approx([0.25])


def test_two_phases_have_a_panel_for_each_setting():
    runs = [run_of(f"{name}-{kind}", 4.0, meta=kind == "meta")
            for name in draw_results.SETTINGS for kind in ("vanilla", "meta")]
    figure = new_figure()
    draw_results.two_phases(figure, {"runs": runs})
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert sum("rise and fall in 2 of 12 layers" in " ".join(title.split())
               for title in titles) == len(draw_results.SETTINGS)
    # Each panel has the four curves of both runs.
    assert [len(ax.lines) for ax in figure.axes[:7]] == [8] * 7
