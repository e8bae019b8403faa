"""What ner.py says of its cells: the speed of a tuning, the pairs it compares, the table."""
from types import SimpleNamespace

import numpy as np
import pytest

from ner import f1_of
from plumbing.ner_report import pair_up, report, tuning_speed


# ---- the speed of a tuning ---------------------------------------------------------------------

def test_tuning_speed_of_known_curves():
    steps = np.arange(1000.0)
    speed = tuning_speed(10 - 0.01 * steps)
    assert speed["slope"] == pytest.approx(-0.01)
    assert speed["auc"] == pytest.approx((9.955 + 0.055) / 2)
    # From one point to the next the loss drops by one of 99 equal parts.
    assert speed["t90"] == 910
    early = tuning_speed(np.where(steps < 200, 2.0, 1.0))
    assert early == {"t90": 210, "auc": pytest.approx(1 + 19.5 / 99),
                     "slope": pytest.approx(0, abs=1e-12)}
    assert tuning_speed(0.01 * steps)["t90"] is None
    single = tuning_speed(np.array([3.0]))
    assert single == {"t90": None, "auc": 3.0, "slope": pytest.approx(0, abs=1e-12)}


# ---- pairs -------------------------------------------------------------------------------------

def test_runs_are_paired_by_seed_or_else_in_order():
    assert pair_up({"a": {0: "a0", 1: "a1"}}) == []
    assert pair_up({"a": {0: "a0", 5: "a5", 7: "a7"}, "b": {7: "b7", 3: "b3", 0: "b0"},
                    "c": {0: "c0"}}) == [("a0", "b0"), ("a7", "b7")]
    assert pair_up({"a": {0: "a0", 1: "a1"}, "b": {2: "b2", 3: "b3", 4: "b4"}}) == [
        ("a0", "b2"), ("a1", "b3")]


# ---- the table ---------------------------------------------------------------------------------

def cell(tp, fn, t90):
    """A cell of ten sentences, in each of which tp entities are found and fn are missed."""
    counts = [[tp, 0, fn]] * 10
    return {"counts": counts, "f1": 2 * tp / (2 * tp + fn), "t90": t90, "auc": 0.5, "slope": -1e-3}


@pytest.fixture
def args(tmp_path):
    """Two modes, a training treebank, two test treebanks and two tunings of each kind."""
    return SimpleNamespace(mode=["head", "full"], train=["toy"], test=["toy", "en_pud"], seeds=2,
                           out=tmp_path)


def make_cells(runs, args):
    """{(run, train, mode, seed, test): cell}. F1 differs between modes, tests and seeds, and from
    run to run. The last run's loss never drops."""
    cells = {}
    for r, run in enumerate(runs):
        t90 = None if run == runs[-1] else 100
        for m, mode in enumerate(args.mode):
            for seed in range(args.seeds):
                for t, test in enumerate(args.test):
                    fn = 1 + m + 2 * t + seed
                    cells[run, "toy", mode, seed, test] = cell(6 + r, fn, t90)
    return cells


def f1_by_hand(run, mode, test):
    """F1 in points of make_cells' two tunings, from the positions of the three names."""
    values = []
    for seed in range(2):
        tp, fn = 6 + run, 1 + mode + 2 * test + seed
        values.append(100 * 2 * tp / (2 * tp + fn))
    return values


def row_by_hand(run, mode, name, t90):
    row = ["head" if mode == 0 else "full", "toy", name]
    for test in range(2):
        values = f1_by_hand(run, mode, test)
        row.append(f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}")
    return "| " + " | ".join([*row, t90, "0.5000", "-1.0e-03"]) + " |"


def test_table_of_two_groups(args):
    groups = {"one": {0: "one"}, "two": {0: "two"}}
    text = report(args, groups, make_cells(["one", "two"], args), f1_of)
    lines = text.splitlines()
    assert lines[0] == ("| mode | train | run | toy | en_pud | t90 (steps) | AUC (nats) | "
                        "slope (nats/step) |")
    all_differences = []
    for mode, name in enumerate(args.mode):
        rows = lines[2 + 3 * mode:5 + 3 * mode]
        assert rows[0] == row_by_hand(0, mode, "one", "100")
        assert rows[1] == row_by_hand(1, mode, "two", "-")
        cells = rows[2].split(" | ")
        assert cells[:3] == [f"| {name}", "toy", "two − one"]
        for test in range(2):
            found = np.mean(f1_by_hand(1, mode, test)) - np.mean(f1_by_hand(0, mode, test))
            assert cells[3 + test].startswith(f"{found:+.1f} [")
            all_differences.append(found)
    assert len(lines) == 10 and lines[8] == ""
    assert lines[9].startswith(f"two − one: {np.mean(all_differences):+.1f} [")
    assert "bootstrap over sentences and tunings" in lines[9]
    assert lines[9].endswith("pairs: one and two)")


def test_single_group_has_a_picture_but_no_difference(args):
    text = report(args, {"one": {0: "one"}}, make_cells(["one"], args), f1_of)
    assert len(text.splitlines()) == 2 + len(args.mode)
    assert "−" not in text
    assert (args.out / "ner.png").read_bytes()[:4] == b"\x89PNG"
