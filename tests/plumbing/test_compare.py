"""Comparison at equal cost: runs whose ratio is known, and which runs form a group."""
import math

import numpy as np
import pytest

from made_up_runs import made_up_run
from plumbing.compare import (
    compare, comparison_table, cost_in_words, first_reach, group_runs, sooner_by)


def sooner(runs, label):
    """How much sooner the group of this label reaches the loss of the first group."""
    return compare(group_runs(runs))["sooner_by"][label]


# ---- groups ------------------------------------------------------------------------------------

def run_of(name, seed):
    """(settings, content) of a run; the content is its name."""
    return {"name": name, "seed": seed, "lr": 0.1}, name


def test_runs_of_one_seed_are_not_one_group():
    groups = group_runs([run_of("b-s1", 1), run_of("b", 0), run_of("changed", 0), run_of("c", 2)])
    names = {}
    for label, members in groups.items():
        names[label] = [name for _, name in members]
    assert names == {"b": ["b", "b-s1", "c"], "changed": ["changed"]}


def test_groups_of_one_name_are_numbered():
    """They differ in a setting, or else are two runs of the same seed."""
    settings, content = run_of("a", 0)
    groups = group_runs([(settings, content), (settings | {"lr": 0.2}, content)])
    assert list(groups) == ["a (1)", "a (2)"]
    assert list(group_runs([run_of("a", 0), run_of("a", 0)])) == ["a (1)", "a (2)"]


def test_a_run_from_before_the_baselines_were_logged_is_of_the_same_group():
    newer, content = run_of("b", 1)
    groups = group_runs([run_of("a", 0), (newer | {"unigram": 6.9, "bigram": 5.3}, content)])
    assert list(groups) == ["a"]


# ---- how much sooner ---------------------------------------------------------------------------

def test_sooner_by_recovers_a_known_ratio():
    entry = sooner([made_up_run("v", 1), made_up_run("m", 1.6, flops_per_step=20)], "m")
    assert entry["step"]["mean"][-1] == pytest.approx(1.6, rel=0.01)
    assert entry["tokens"]["mean"][-1] == pytest.approx(1.6, rel=0.01)
    assert entry["flops"]["mean"][-1] == pytest.approx(0.8, rel=0.01)
    assert entry["seconds"]["mean"][-1] == pytest.approx(1.6, rel=0.01)
    assert entry["papers_reading"]["mean"][0] == pytest.approx(1.6, rel=0.1)


def test_seeds_are_grouped_and_spread_is_over_them():
    runs = [made_up_run("v", 1), made_up_run("v-s1", 1, seed=1),
            made_up_run("m", 1.5), made_up_run("m-s1", 1.7, seed=1)]
    sizes = {label: len(members) for label, members in group_runs(runs).items()}
    assert sizes == {"v": 2, "m": 2}
    entry = sooner(runs, "m")
    assert entry["step"]["mean"][-1] == pytest.approx(1.6, rel=0.02)
    assert entry["step"]["sd"][-1] == pytest.approx(0.2 / math.sqrt(2), rel=0.1)


def curve_at(speed):
    """(costs, losses) of a curve that goes down by 1 for every 1 / speed of cost."""
    return np.array([0.0, 10 / speed]), np.array([10.0, 0])


def test_curves_are_paired_by_seed_or_else_each_with_each():
    first = [curve_at(1), curve_at(2)]
    twice = [curve_at(2), curve_at(4)]
    assert sooner_by(first, twice, [5.0, 1.0]) == {"mean": [2, 2], "sd": [0, 0]}
    # Three against two: the ratios are 1, 2, 4 and 1/2, 1, 2.
    ratios = sooner_by(first, [curve_at(1), *twice], [5.0])
    values = [1, 2, 4, 0.5, 1, 2]
    assert ratios["mean"] == pytest.approx([np.mean(values)])
    assert ratios["sd"] == pytest.approx([np.std(values, ddof=1)])


def test_a_loss_never_reached_is_not_extrapolated():
    costs, losses = np.array([0.0, 10, 20]), np.array([5.0, 3, 2])
    assert first_reach(costs, losses, 4) == 5
    assert first_reach(costs, losses, 2.5) == 15
    assert math.isnan(first_reach(costs, losses, 1.9))
    assert math.isnan(first_reach(costs, losses, 6))
    ratios = sooner_by([(costs, losses)], [(costs, losses - 1)], [2.5, 1.5])
    assert ratios["mean"][0] == pytest.approx(15 / 7.5)
    assert ratios["mean"][1] is None
    assert ratios["sd"] is None


# ---- what is compared --------------------------------------------------------------------------

def test_comparison_begins_where_all_runs_have_been_evaluated_twice():
    """Before that, a line from update 0 to a late second evaluation would tell of differences
    that are none."""
    settings, lines = made_up_run("rare", 1)
    rare = [line for line in lines if "val_loss" not in line or line["step"] % 500 == 0]
    entry = sooner([(settings | {"eval_every": 500}, rare), made_up_run("often", 1)], "often")
    assert entry["levels"][0] <= 10 - math.log(501)
    assert entry["levels"][-1] == pytest.approx(10 - math.log(1001))
    for ratio in entry["step"]["mean"]:
        assert 0.98 < ratio < 1.15


def test_different_corpora_are_compared_in_bits_per_byte():
    groups = group_runs([made_up_run("v", 1), made_up_run("m", 2, corpus="b")])
    result = compare(groups)
    # Nats of different vocabularies are not comparable.
    assert "papers_reading" not in result["sooner_by"]["m"]
    assert result["loss"] == "bits_per_byte"
    final = result["groups"]["v"]["bits_per_byte"]
    assert final["mean"] == pytest.approx((10 - math.log(1001)) / 4)


def test_final_figures_and_the_untrained_ones():
    result = compare(group_runs([made_up_run("v", 1), made_up_run("m", 1.6)]))
    final = result["groups"]["v"]
    assert final["runs"] == ["v"]
    assert final["val_loss"] == {"mean": pytest.approx(10 - math.log(1001)), "sd": None,
                                 "untrained": 10.0}
    assert final["fewshot_prototype"] == {"mean": 0.2, "sd": None, "untrained": 0.2}
    assert "fewshot_after" not in final
    table = comparison_table(result).splitlines()
    assert table[0] == "m needs 1.60x fewer FLOPs than v for the same held-out loss (3.09)"
    last, = [line for line in table if line.startswith("   3.091")]
    assert last.split() == ["3.091"] + 4 * ["1.60x", "fewer"]


@pytest.mark.parametrize("ratio, spread, words", [
    (1.6, None, "1.60x fewer"), (0.4, None, "2.50x as many"), (None, None, "never reached"),
    (1.001, 0.1, "as many"),
    (1.6, 0.1, "1.60x fewer +- 0.10"),
    # 1 / 0.39 is 2.564 and 1 / 0.41 is 2.439: half of the difference is 0.06.
    (0.4, 0.01, "2.50x as many +- 0.06")])
def test_a_ratio_below_one_is_turned_over(ratio, spread, words):
    assert cost_in_words({"mean": [ratio], "sd": None if spread is None else [spread]}, 0) == words
