"""Pictures: made of short and partial logs, with bars and titles that agree with the figures."""
import math

import numpy as np
import pytest

from made_up_runs import made_up_run
from plumbing.compare import compare, group_runs
from plumbing.pictures import (
    draw_comparison, draw_dynamics, draw_f1, new_figure, save_dynamics, save_figure)


# ---- runs --------------------------------------------------------------------------------------

@pytest.mark.parametrize("length", [0, 1, None])
def test_pictures_are_made_from_short_and_partial_logs(length, tmp_path):
    settings, lines = made_up_run("v", 1)
    figure = new_figure()
    draw_dynamics(figure, lines[:length], settings)
    save_figure(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_dynamics_are_those_of_the_log(tmp_path):
    settings, lines = made_up_run("v", 1)
    settings["bigram"] = 4.0
    for line in lines[::2]:
        t = line["step"] / 1000
        line["proportional_effective_rank"] = {"hidden": [t, 2 * t]}
        line["head_entropy"] = {"normalised": [[1, 0.5], [0.5, 0.5]]}
    figure = new_figure()
    draw_dynamics(figure, lines, settings)
    titles = [" ".join(ax.get_title(loc="left").split()) for ax in figure.axes[:4]]
    assert titles == [
        "Next-token prediction: 3.09 nats per token, 0.91 better than the bigram",
        "The nearest prototype gets 20% of held-out words right (chance 10%)",
        "Mean over layers: hidden states use 0% of their directions at first, 0% at the lowest and "
        "150% at the end",
        "Mean over layers: attention has 62% of its largest entropy at first, 62% at the lowest "
        "and 62% at the end"]
    legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes[:2]]
    assert legends == [["training", "validation", "bigram: 4.00", "uniform guess: 4.60"],
                       ["nearest prototype*: 20%", "chance: 10%"]]
    save_dynamics(tmp_path, lines, settings)
    assert (tmp_path / "dynamics.png").read_bytes()[:4] == b"\x89PNG"


def test_comparison_shows_the_ratios(tmp_path):
    groups = group_runs([made_up_run("v", 1), made_up_run("m", 1.6, flops_per_step=20)])
    figure = draw_comparison(groups, compare(groups))
    loss_ax, accuracy_ax, _ = figure.axes
    assert " ".join(loss_ax.get_title(loc="left").split()) == (
        "m needs 1.25x as many FLOPs as v for the same held-out loss (3.09)")
    # Each run's curve goes on to its loss and its cost at the last update.
    vanilla, meta = loss_ax.lines
    assert (vanilla.get_xdata()[-1], meta.get_xdata()[-1]) == (10_000, 20_000)
    assert vanilla.get_ydata()[-1] == pytest.approx(10 - math.log(1001))
    assert meta.get_ydata()[-1] == pytest.approx(10 - math.log(1601))
    # The accuracy is in percent: a bar for each of the two groups, without an error of one seed.
    assert [bar.get_height() for bar in accuracy_ax.patches] == pytest.approx([20, 20])
    assert all(bars.errorbar is None for bars in accuracy_ax.containers)
    save_figure(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


# ---- taggers -----------------------------------------------------------------------------------

def errors_of(bars):
    """Half the lengths of the error bars, (N,)."""
    _, _, (lines,) = bars.errorbar.lines
    halves = []
    for (_, low), (_, high) in lines.get_segments():
        halves.append((high - low) / 2)
    return halves


def test_bars_of_f1_have_the_right_heights():
    """Two panels, two groups of runs and two tests. Of each there are two runs with two tunings,
    and the error is the interval over the runs."""
    tests = ["toy", "en_pud"]
    rng = np.random.default_rng(0)
    bars = {}
    for mode in ("head", "full"):
        bars[mode, "en_ewt"] = {}
        for label in ("vanilla", "meta"):
            bars[mode, "en_ewt"][label] = [100 * rng.random((2, 2)) for _ in tests]
    figure = draw_f1(bars, tests)
    assert len(figure.axes) == 2
    for ax, ((mode, train), groups) in zip(figure.axes, bars.items()):
        assert "tag head" in ax.get_title(loc="left") or mode == "full"
        assert train in ax.get_title(loc="left")
        assert [label.get_text() for label in ax.get_xticklabels()] == tests
        assert len(ax.containers) == 2 * len(groups)  # of bars and of their errors
        drawn = {container.get_label(): container for container in ax.containers
                 if hasattr(container, "errorbar")}
        assert list(drawn) == list(groups)
        for label, f1 in groups.items():
            heights = [bar.get_height() for bar in drawn[label]]
            assert heights == pytest.approx([values.mean() for values in f1])
            # Student's t over the two runs: 12.71 times the standard error of their mean.
            halves = [12.71 * values.mean(axis=1).std(ddof=1) / 2 ** 0.5 for values in f1]
            assert errors_of(drawn[label]) == pytest.approx(halves)


def test_bars_of_f1_stand_at_their_test_side_by_side():
    f1 = [np.array([[50.0]]), np.array([[60.0]]), np.array([[70.0]])]
    figure = draw_f1({("head", "toy"): {"vanilla": f1, "meta": f1}}, ["a", "b", "c"])
    ax, = figure.axes
    vanilla, meta = ax.containers
    for at, (left, right) in enumerate(zip(vanilla, meta)):
        assert left.get_x() + left.get_width() == pytest.approx(at)
        assert right.get_x() == pytest.approx(at)
        assert left.get_facecolor() != right.get_facecolor()


def test_a_single_tuning_has_a_bar_without_an_error(tmp_path):
    figure = draw_f1({("head", "toy"): {"vanilla": [np.array([[62.5]])]}}, ["toy"])
    ax, = figure.axes
    bars, = ax.containers
    assert [bar.get_height() for bar in bars] == [62.5]
    assert bars.errorbar is None
    legend, = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["vanilla"]
    save_figure(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
