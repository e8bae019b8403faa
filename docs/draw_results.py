"""Draw the pictures of docs/results.md from the figures in docs/results/*.json, next to this file.

    python docs/draw_results.py

docs/experiments.py collects these figures from runs.
"""
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from plumbing.commands import Parser, command  # noqa: E402
from plumbing.files import read_file  # noqa: E402
from plumbing.pictures import (  # noqa: E402
    BLUE, GREEN, ORANGE, PINK, label_panel, legend_below, new_figure, save_figure)
from plumbing.statistics import mean_and_spread  # noqa: E402


# ---- little text -------------------------------------------------------------------------------

# change in the runs -> its label, and where that is drawn, in points to the right and above
RIVALS = {"dropout=0.1": ("dropout 0.1", (9, -4)),
          "mask-inputs=0.15": ("15 % of inputs masked", (9, -33)),
          "shuffle-labels": ("labels shuffled", (-55, -22)),
          "name-words": ("meta steps name words", (9, 9))}


def little_text(figure, results):
    """Loss against cost, and against passes over the text, for vanilla runs, hybrid runs, and
    rivals."""
    groups = group_seeds(results["runs"])
    cost_ax, passes_ax = figure.subplots(1, 2)
    best = {}
    for kind, colour, style in (("vanilla", BLUE, "o-"), ("hybrid", ORANGE, "s-")):
        mine = [group for group in groups if group["kind"] == kind]
        best[kind] = min(group["loss"] for group in mine)
        for ax, x in ((cost_ax, "tflop"), (passes_ax, "passes")):
            points = sorted((group[x], group["loss"], group["sd"]) for group in mine)
            place, loss, sd = zip(*points)
            ax.errorbar(place, loss, sd, fmt=style, color=colour, linewidth=2, capsize=4,
                        markersize=8, label=kind)
    rivals = [group for group in groups if group["kind"] == "rival"]
    for group in rivals:
        for ax, x in ((cost_ax, "tflop"), (passes_ax, "passes")):
            ax.errorbar(group[x], group["loss"], group["sd"], fmt="D", color=GREEN, capsize=4)
            ax.annotate(group["label"], (group[x], group["loss"]), group["offset"],
                        textcoords="offset points", fontsize=13, color=GREEN)
    winner = min(groups, key=lambda group: group["loss"])
    label_panel(cost_ax, f"The best vanilla run ends at {best['vanilla']:.2f} nats, the best "
                         f"hybrid run at {best['hybrid']:.2f}, and the best of all "
                         f"({winner['label']}) at {winner['loss']:.2f}",
                "validation loss, nats per token", "cost of training, 10^12 FLOPs", width=70)
    gaps = [f"{gap:+.2f}".replace("-", "−") for gap in gaps_at_equal_passes(groups)]
    label_panel(passes_ax, "After equally many passes over the text, hybrid runs differ from the "
                           f"vanilla curve by {', '.join(gaps)} nats", "",
                "passes of next-token steps over the text", width=70)
    for ax, ticks in ((cost_ax, (9, 17, 35, 70, 105)), (passes_ax, (2, 4, 8, 16))):
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{tick}" for tick in ticks])
        ax.minorticks_off()
        ax.margins(y=0.08)
        legend_below(ax)


def gaps_at_equal_passes(groups):
    """The loss of each hybrid run, by passes, minus that of vanilla runs after equally many passes
    over the text. The vanilla curve is interpolated between runs, not extended beyond them."""
    curve = sorted((group["passes"], group["loss"])
                   for group in groups if group["kind"] == "vanilla")
    places, losses = zip(*curve)
    gaps = []
    for group in sorted(groups, key=lambda group: group["passes"]):
        if group["kind"] == "hybrid" and places[0] <= group["passes"] <= places[-1]:
            vanilla = np.interp(np.log(group["passes"]), np.log(places), losses)
            gaps.append(group["loss"] - vanilla)
    return gaps


def group_seeds(runs):
    """Runs that differ only in their seed, as one dict each: its mean loss at the end and the
    standard deviation over seeds (0 for one seed), kind, label, cost in 10^12 FLOPs, and passes."""
    found = {}
    for run in runs:
        key = (run["meta"], run["hybrid_ratio"], run["changes"], run["steps"])
        found.setdefault(key, []).append(run)
    groups = []
    for (meta, ratio, changes, steps), members in found.items():
        spread = mean_and_spread([run["val_loss"] for run in members])
        plain = not changes and ratio in (None, 0.5)
        kind = ("hybrid" if meta else "vanilla") if plain else "rival"
        first = members[0]
        label = kind if plain else changes or f"hybrid ratio {ratio}"
        label, offset = RIVALS.get(changes, (label, (9, -4)))
        groups.append({"kind": kind, "label": label, "offset": offset, "tflop": first["tflop"],
                       "passes": first["passes"], "loss": spread["mean"],
                       "sd": spread["sd"] or 0, "seeds": len(members)})
    return groups


# ---- two phases --------------------------------------------------------------------------------

# name of a setting in the runs -> what its panel says
SETTINGS = {"default": "our settings", "init": "initial weights N(0, 0.02²)",
            "rate": "learning rate 0.0003", "warmup": "warm-up 42 %",
            "decay": "weight decay 1 instead of 0.1", "prose": "prose",
            "all": "rate, warm-up, initial weights and start of meta steps as in the paper"}
CURVES = {"hidden": (BLUE, "hidden states, effective rank"),
          "mlp": (ORANGE, "MLP weights, effective rank"),
          "mlp_grad": (GREEN, "gradients of the MLP weights, effective rank"),
          "entropy": (PINK, "attention entropy")}


def two_phases(figure, results):
    """A panel for each setting, with mean curves over layers: hybrid runs solid, vanilla runs
    dotted."""
    runs = {run["name"]: run for run in results["runs"]}
    axes = figure.subplots(2, 4, sharey=True).flat
    for ax, (name, title) in zip(axes, SETTINGS.items()):
        for kind, style in (("meta", "-"), ("vanilla", ":")):
            probes = runs[f"{name}-{kind}"]["probes"]
            for curve, (colour, label) in CURVES.items():
                ax.plot([max(step, 0.7) for step in probes[curve]["steps"]],
                        [100 * value for value in probes[curve]["mean"]], style, color=colour,
                        linewidth=2, label=f"{label} ({kind})")
        counts = runs[f"{name}-meta"]["probes"]["hidden"]
        label_panel(ax, f"{title}: hidden states rise and fall in {counts['rise_and_fall']} "
                        "of 12 layers", "% of the largest", width=36)
        ax.set_xscale("log")
    last = axes[-1]
    last.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    last.legend(handles, labels, loc="center", fontsize=12)


# ---- the command -------------------------------------------------------------------------------

@command
def main():
    Parser(description="Draw the pictures of docs/results.md.").parse_args()
    for name, draw, size in (("little-text", little_text, (20, 10)),
                             ("two-phases", two_phases, (22, 12))):
        source = HERE / "results" / f"{name}.json"
        if not source.exists():
            continue
        figure = new_figure(*size)
        draw(figure, json.loads(read_file(source)))
        save_figure(figure, HERE / f"{name}.png")
        print(f"written: {HERE / name}.png")


if __name__ == "__main__":
    main()
