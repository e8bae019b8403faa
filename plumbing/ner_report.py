"""What ner.py found: a table of F1 and tuning speed, differences with intervals, a picture."""
import itertools
from pathlib import Path

import numpy as np

from plumbing.pictures import draw_f1, save_figure
from plumbing.statistics import bootstrap, interval

# How many steps make one point of a fine-tuning loss curve.
CURVE_EVERY = 10


def tuning_speed(losses, every=CURVE_EVERY):
    """The paper's measures of fine-tuning speed, from losses (steps,). Each point of the loss curve
    is the mean of `every` steps.

    t90    the first step at which 90 % of the drop from first to last point is done; None if the
           loss does not drop
    auc    the area under the curve (trapezoids) divided by the range of steps, in nats per word
    slope  by least squares on the first 10 % of the points, in nats per step"""
    every = max(1, min(every, len(losses) // 2))
    whole = len(losses) // every * every
    loss = losses[:whole].reshape(-1, every).mean(axis=1).astype(float)
    if len(loss) == 1:
        loss = np.repeat(loss, 2)  # a single step: a flat line
    step = every * np.arange(1, len(loss) + 1)
    early = max(2, round(0.1 * len(loss)))
    t90 = None
    if loss[-1] < loss[0]:
        done = loss <= loss[0] - 0.9 * (loss[0] - loss[-1])
        t90 = int(step[done.argmax()])
    return {"t90": t90,
            "auc": float((loss[1:] + loss[:-1]).mean() / 2),
            "slope": float(np.polyfit(step[:early], loss[:early], 1)[0])}


# ---- the table ---------------------------------------------------------------------------------

def values_of(cells, key, runs, mode, train, test, seeds):
    """(runs, seeds): one figure from the cells of several runs."""
    values = []
    for run in runs:
        values.append([cells[run, train, mode, seed, test][key] for seed in range(seeds)])
    return np.array(values)


def pair_up(groups):
    """(name, name) pairs of the first two groups' runs: by seed or, without a common seed, in
    order; [] for a single group."""
    if len(groups) < 2:
        return []
    first, second = list(groups.values())[:2]
    common = sorted(first.keys() & second.keys())
    if common:
        return [(first[seed], second[seed]) for seed in common]
    return list(zip(first.values(), second.values()))


def difference(args, cells, pairs, f1_of, mode, train, test):
    """(differences (pairs,), bootstrap draws (R,)) of F1, in points, second minus first. Bootstrap
    draws are made only for a single pair."""
    first, second = zip(*pairs)
    f1 = [values_of(cells, "f1", runs, mode, train, test, args.seeds).mean(axis=1)
          for runs in (first, second)]
    draws = np.zeros(0)
    if len(pairs) == 1:
        counts = [values_of(cells, "counts", runs, mode, train, test, args.seeds)[0]
                  for runs in (first, second)]  # (seeds, S, 3) each
        draws = 100 * bootstrap(*counts, f1_of)
    return 100 * (f1[1] - f1[0]), draws


def report(args, groups, cells, f1_of):
    """A Markdown table: for each group of runs F1 in points (mean ± standard deviation over runs
    and tunings) and tuning speed, then the difference of the first two groups with a 95 %
    interval. Also writes ner.png."""
    rows = [["mode", "train", "run", *args.test, "t90 (steps)", "AUC (nats)",
             "slope (nats/step)"]]
    rows.append(["---"] * len(rows[0]))
    pairs, labels = pair_up(groups), list(groups)
    bars, differences = {}, []
    for mode, train in itertools.product(args.mode, args.train):
        for label, runs in groups.items():
            f1 = [100 * values_of(cells, "f1", runs.values(), mode, train, test, args.seeds)
                  for test in args.test]
            bars.setdefault((mode, train), {})[label] = f1
            name = f"{label} ({len(runs)} runs)" if len(runs) > 1 else label
            speed = [speed_in_words(cells, key, form, runs, mode, train, args)
                     for key, form in (("t90", ".0f"), ("auc", ".4f"), ("slope", ".1e"))]
            rows.append([mode, train, name, *map(f1_in_words, f1), *speed])
        if pairs:
            found = [difference(args, cells, pairs, f1_of, mode, train, test)
                     for test in args.test]
            differences += found
            rows.append([mode, train, f"{labels[1]} − {labels[0]}",
                         *(difference_in_words(*one) for one in found), "", "", ""])
    save_figure(draw_f1(bars, args.test), Path(args.out) / "ner.png")
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    if not pairs:
        return text
    average = difference_in_words(*(np.mean(part, axis=0) for part in zip(*differences)))
    covers = f"t over {len(pairs)} pairs of pretraining runs"
    if len(pairs) == 1:
        covers = ("bootstrap over sentences and tunings; other pretraining seeds would differ "
                  "more")
    named_pairs = ", ".join(" and ".join(pair) for pair in pairs)
    return (f"{text}\n\n{labels[1]} − {labels[0]}: {average} F1 points on average "
            f"(95 % interval, {covers}; pairs: {named_pairs})")


def f1_in_words(f1):
    if f1.size == 1:
        return f"{f1.mean():.1f}"
    return f"{f1.mean():.1f} ± {f1.std(ddof=1):.1f}"


def difference_in_words(values, draws):
    mean, low, high = interval(values, draws)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def speed_in_words(cells, key, form, runs, mode, train, args):
    values = values_of(cells, key, runs.values(), mode, train, args.test[0], args.seeds)
    return "-" if None in values else format(values.mean(), form)
