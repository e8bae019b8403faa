"""Several runs at equal cost: how much sooner does one group reach the same held-out loss?

Runs that differ only in their seed form a group, and later groups are compared with the first. The
loss is measured on the same validation text, and the cost in updates, tokens, FLOPs and seconds.
The paper's own comparison, a mixed training loss against updates, is given as well.
"""
import itertools
import json
import math
from collections import Counter

import numpy as np

from plumbing.commands import UserError
from plumbing.logs import layer_series, series
from plumbing.phases import CURVES
from plumbing.statistics import in_words, mean_and_spread

# key in a log line -> its name
COSTS = {"step": "updates", "tokens": "tokens", "flops": "model FLOPs",
         "seconds": "seconds of training"}
FEWSHOT = {"fewshot_before": "meta head, not adapted", "fewshot_after": "meta head, adapted",
           "fewshot_after_new": "meta head, adapted*", "fewshot_prototype": "prototype*"}
STANDARD_ERROR = {"fewshot_prototype": "fewshot_stderr", "fewshot_after": "fewshot_after_stderr"}
# Runs of one configuration may differ in these settings.
NOT_A_CONFIGURATION = {"name", "runs", "seed", "resume", "quiet", "cache", "device",
                       "device_name", "head_parameters", "tokenizer_sha256", "unigram",
                       "bigram"}
# The number of losses at which the costs of two groups are compared.
LEVELS = 3


# ---- groups ------------------------------------------------------------------------------------

def group_runs(runs):
    """{label: [(settings, anything)]} of runs, a list of (settings, anything).

    Runs that differ only in their seed form one group, sorted by seed and labelled with the name
    of the first. A second run with the same seed, perhaps of other code, starts another group."""
    groups, seen = {}, Counter()
    for settings, content in runs:
        configuration = {key: value for key, value in settings.items()
                         if key not in NOT_A_CONFIGURATION}
        text = json.dumps(configuration, sort_keys=True)
        seed = settings["seed"]
        groups.setdefault((text, seen[text, seed]), []).append((settings, content))
        seen[text, seed] += 1
    members = [sorted(group, key=lambda run: run[0]["seed"]) for group in groups.values()]
    names = [group[0][0]["name"] for group in members]
    labelled = {}
    for i, (name, group) in enumerate(zip(names, members), start=1):
        label = f"{name} ({i})" if names.count(name) > 1 else name
        labelled[label] = group
    return labelled


# ---- comparison --------------------------------------------------------------------------------

def compare(groups):
    """Compare the second and later groups, {label: [(settings, lines)]}, with the first.

    Returns what the table and the picture show: {"loss": its key in the log, "unit",
    "groups": {label: final figures}, "sooner_by": {label: ratios}}. Runs on different texts or
    tokenizers are compared in bits per byte, since their nats per token are not comparable."""
    texts = set()
    for runs in groups.values():
        for settings, _ in runs:
            texts.add((settings.get("corpus_sha256"), settings["vocab_size"],
                       settings.get("tokenizer")))
    same_text = len(texts) == 1
    loss = "val_loss" if same_text else "bits_per_byte"
    result = {"loss": loss, "unit": "nats per token" if same_text else "bits per byte",
              "groups": {}, "sooner_by": {}}
    logs = {}
    for label, runs in groups.items():
        names = [settings["name"] for settings, _ in runs]
        logs[label] = [lines for _, lines in runs]
        result["groups"][label] = {"runs": names} | final_figures(logs[label], loss)
    first, *others = logs
    for label in others:
        entry = ratios(logs[first], logs[label], loss)
        if same_text:
            entry |= papers_reading(logs[first], logs[label])
        result["sooner_by"][label] = entry
    return result


def final_figures(logs, loss):
    """{key: {"mean", "sd", "untrained"}} at the end of the runs with these logs, for the figures
    that all of them have, and {curve: {"mean", "sd"}} for the probes, each a list over layers."""
    figures = {}
    keys = [loss, *FEWSHOT, *STANDARD_ERROR.values(), "fewshot_lookup", "fewshot_chance"]
    for key in keys:
        curves = [series(lines, key)[1] for lines in logs]
        if all(map(len, curves)):
            untrained = mean_and_spread([curve[0] for curve in curves])["mean"]
            ends = mean_and_spread([curve[-1] for curve in curves])
            figures[key] = ends | {"untrained": untrained}
    for name, path in CURVES.items():
        curves = [layer_series(lines, *path)[1] for lines in logs]
        if all(map(len, curves)) and len({curve.shape[1] for curve in curves}) == 1:
            figures[name] = mean_and_spread([curve[-1] for curve in curves])
    return figures


def ratios(first, second, loss):
    """{"levels": losses, and for each cost {"mean", "sd"} by level}: how many times less of each
    cost the logs `second` need than the logs `first` to reach each loss. Raises UserError."""
    losses = [series(lines, loss)[1] for lines in first + second]
    if not all(map(len, losses)):
        raise UserError(f"a run has no {loss} in its log: leave it out of the comparison")
    # The levels begin where all runs have been evaluated twice. Before that, interpolation would
    # invent values. They end at the lowest loss that all runs reach.
    end = max(curve.min() for curve in losses)
    begin = max(end, min(curve[:2][-1] for curve in losses))
    levels = np.unique(np.linspace(begin, end, LEVELS))[::-1]
    entry = {"levels": levels.tolist()}
    for cost in COSTS:
        first_curves = [series(lines, loss, x=cost) for lines in first]
        second_curves = [series(lines, loss, x=cost) for lines in second]
        entry[cost] = sooner_by(first_curves, second_curves, levels)
    return entry


def papers_reading(first, second):
    """{"papers_reading": {"level", "mean", "sd"}}: the ratio of updates at the lowest mixed
    training loss that all runs reach; {} if there is none."""
    first_curves = [mixed_loss(lines) for lines in first]
    second_curves = [mixed_loss(lines) for lines in second]
    losses = [loss for _, loss in first_curves + second_curves]
    if not all(map(len, losses)):
        return {}
    level = max(loss.min() for loss in losses)
    found = sooner_by(first_curves, second_curves, [level])
    return {"papers_reading": {"level": float(level)} | found}


def mixed_loss(lines):
    """(updates, loss): the training loss over both kinds of update, as the paper compares it, the
    mean of the last 50."""
    steps, loss = series(lines, "loss")
    if not len(loss):
        return steps, loss
    width = min(50, max(1, len(loss) // 4))
    return steps[width - 1:], np.convolve(loss, np.ones(width) / width, mode="valid")


def sooner_by(first, second, levels):
    """{"mean", "sd"} by level, over pairs of curves (costs (S,), losses (S,)): how many times
    less `second` needs than `first`.

    Curves are paired in order if both lists are equally long (the same seeds). Otherwise each is
    paired with each. A level that a curve never reaches gives None."""
    if len(first) == len(second):
        pairs = list(zip(first, second))
    else:
        pairs = list(itertools.product(first, second))
    found = []
    for one, other in pairs:
        found.append([ratio(first_reach(*one, level), first_reach(*other, level))
                      for level in levels])
    return mean_and_spread(found)


def ratio(one, other):
    """one / other; NaN where a level was reached at no cost."""
    return one / other if other else math.nan


def first_reach(costs, losses, level):
    """The cost at which a curve first falls to `level`, interpolated between its points. NaN if it
    never does, or if it starts below, since then the crossing was not observed."""
    i = int((losses <= level).argmax())
    if losses[i] > level:
        return math.nan
    if i == 0:
        return float(costs[0]) if losses[0] == level else math.nan
    return float(np.interp(level, losses[[i, i - 1]], costs[[i, i - 1]]))


# ---- in words ----------------------------------------------------------------------------------

def comparison_table(result):
    """The result of `compare` in words: a sentence, then the figures behind it."""
    lines = [cost_sentence(result), "",
             f"{'at the end':<24}{result['unit']:>18}"
             + "".join(f"{name:>25}" for name in FEWSHOT.values())]
    for label, figures in result["groups"].items():
        accuracies = [in_words(figures[key], "{:.1%}") if key in figures else "-"
                      for key in FEWSHOT]
        lines.append(f"{label[:23]:<24}{in_words(figures[result['loss']], '{:.3f}'):>18}"
                     + "".join(f"{text:>25}" for text in accuracies))
    lines += notes(result["groups"])
    for label, entry in result["sooner_by"].items():
        lines += ["", f"what {label} needs for the same held-out loss as {first_of(result)}",
                  f"{'loss':>8}" + "".join(f"{name:>22}" for name in COSTS.values())]
        for i, level in enumerate(entry["levels"]):
            cells = [f"{cost_in_words(entry[cost], i):>22}" for cost in COSTS]
            lines.append(f"{level:8.3f}" + "".join(cells))
        if "papers_reading" in entry:
            reading = entry["papers_reading"]
            lines.append(f"The paper compares the mixed training loss: {cost_in_words(reading, 0)} "
                         f"updates at {reading['level']:.3f}. That is not fair, since meta steps "
                         "ask an easier question.")
    return "\n".join(lines)


def notes(groups):
    """Lines below the table of final figures: what they mean and how certain they are."""
    chance = [figures["fewshot_chance"]["mean"] for figures in groups.values()
              if "fewshot_chance" in figures]
    several_seeds = any(len(figures["runs"]) > 1 for figures in groups.values())
    spread = "+- is the standard deviation over seeds" if several_seeds else (
        "with one seed each, the spread over seeds is unknown")
    lines = [f"* on new queries, where the previous-token look-up must guess; {spread}"]
    if chance:
        lines.append(f"chance is {chance[0]:.1%}")
    errors = [figures[key]["mean"] for figures in groups.values()
              for key in STANDARD_ERROR.values() if key in figures]
    if errors:
        lines[-1] += (f"; the episodes are a sample, so each accuracy has a standard error of "
                      f"up to {max(errors):.1%}")
    return lines


def first_of(result):
    return next(iter(result["groups"]))


def cost_sentence(result):
    """What each group needs in FLOPs for the lowest common loss, against the first group."""
    sentences = []
    for label, entry in result["sooner_by"].items():
        words = cost_in_words(entry["flops"], -1)
        if words == "never reached":
            sentences.append(f"{label} and {first_of(result)} reach no common loss")
        else:
            link = "as" if "as many" in words else "than"
            sentences.append(f"{label} needs {words} FLOPs {link} {first_of(result)} for the same "
                             f"held-out loss ({entry['levels'][-1]:.2f})")
    return "; ".join(sentences)


def cost_in_words(entry, i):
    """The i-th of an entry's ratios, such as "1.52x as many +- 0.02". The ratio says how many times
    less is needed. Below 1 it is inverted, and its spread with it."""
    ratio = entry["mean"][i]
    if not ratio:
        return "never reached"
    if abs(ratio - 1) < 0.005:
        return "as many"
    text = f"{ratio:.2f}x fewer" if ratio >= 1 else f"{1 / ratio:.2f}x as many"
    if entry["sd"] and entry["sd"][i] is not None:
        spread = entry["sd"][i] if ratio >= 1 else entry["sd"][i] / ratio ** 2
        text += f" +- {spread:.2f}"
    return text
