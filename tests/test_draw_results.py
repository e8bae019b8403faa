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
    curve = [[0, 0, 9.0], [steps // 2, steps, loss - 0.5], [steps, 2 * steps, loss]]
    probes = {probe: {"steps": [0, 1, steps], "mean": [0.9, 0.5, 0.7], "rise_and_fall": 2,
                      "fall_and_rise": 9} for probe in draw_results.CURVES}
    return {"name": name, "seed": seed, "meta": meta, "hybrid_ratio": 0.5 if meta else None,
            "changes": changes, "steps": steps, "tflop": 2.0 * steps, "val_loss": loss,
            "curve": curve, "probes": probes}


def test_seeds_are_grouped():
    runs = [run_of("a", 4.0), run_of("b", 4.2, seed=1), run_of("c", 5.0, changes="dropout=0.1"),
            run_of("d", 6.0, meta=True)]
    vanilla, rival, hybrid = draw_results.group_seeds(runs)
    assert (vanilla["kind"], rival["kind"], hybrid["kind"]) == ("vanilla", "rival", "hybrid")
    assert vanilla["loss"] == pytest.approx(4.1) and vanilla["seeds"] == 2
    assert vanilla["sd"] == pytest.approx(0.1414, abs=1e-4)
    assert rival["label"] == "dropout 0.1" and rival["sd"] == 0
    assert hybrid["on_the_way"] == [(10, 5.5), (20, 6.0)]


def test_the_title_of_little_text_names_the_best():
    runs = [run_of("a", 4.25), run_of("b", 4.5, steps=20), run_of("c", 4.125, meta=True),
            run_of("d", 4.0, changes="dropout=0.1")]
    figure = new_figure()
    draw_results.little_text(figure, {"runs": runs})
    title = " ".join(figure.axes[0].get_title(loc="left").split())
    assert "best vanilla run ends at 4.25 nats per token, the best hybrid run at 4.12" in title
    assert "(dropout 0.1) at 4.00" in title


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
