"""Draw the pictures of docs/results.md from the figures in docs/results/*.json, next to this file.

    python docs/draw_results.py

docs/experiments.py collects these figures from runs.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from plumbing.commands import Parser, command  # noqa: E402
from plumbing.files import read_file  # noqa: E402
from plumbing.pictures import (  # noqa: E402
    BLUE, GREEN, ORANGE, PINK, SKY, YELLOW, label_panel, legend_below, new_figure, save_figure)
from plumbing.statistics import mean_and_spread  # noqa: E402


# ---- little text -------------------------------------------------------------------------------

def little_text(figure, results):
    """Loss against budget, for vanilla and hybrid runs, and for rivals."""
    groups = group_seeds(results["runs"])
    ax = figure.subplots()
    best = {}
    for kind, colour in (("vanilla", BLUE), ("hybrid", ORANGE)):
        mine = [group for group in groups if group["kind"] == kind]
        points = sorted((group["tflop"], group["loss"], group["sd"]) for group in mine)
        best[kind] = min(loss for _, loss, _ in points)
        tflop, loss, sd = zip(*points)
        ax.errorbar(tflop, loss, sd, fmt="o-", color=colour, linewidth=2, capsize=4,
                    label=f"{kind}: at the end of runs of different length")
        longest = max(mine, key=lambda group: group["tflop"])
        ax.plot(*zip(*longest["on_the_way"]), ":", color=colour,
                label=f"{kind}: on the way of the longest run")
    colours = {"dropout": GREEN, "mask-inputs": PINK, "weight-decay": SKY, "layers": YELLOW}
    rivals = [group for group in groups if group["kind"] == "rival"]
    for group in sorted(rivals, key=lambda group: group["loss"]):
        colour = next((colours[name] for name in colours if name in group["label"]), "grey")
        ax.errorbar(group["tflop"], group["loss"], group["sd"], fmt="s", color=colour, capsize=4)
        ax.annotate(group["label"], (group["tflop"], group["loss"]), (8, -4),
                    textcoords="offset points", fontsize=12, color=colour)
    ax.set_xscale("log")
    ticks = [8, 17, 35, 70, 100]
    ax.set_xticks(ticks, [f"{tick}" for tick in ticks])
    ax.minorticks_off()
    winner = min(groups, key=lambda group: group["loss"])
    label_panel(ax, f"1 MB of prose: the best vanilla run ends at {best['vanilla']:.2f} nats per "
                    f"token, the best hybrid run at {best['hybrid']:.2f}, and the best of all "
                    f"({winner['label']}) at {winner['loss']:.2f}",
                "validation loss, nats per token", "training cost, 10^12 FLOPs", width=110)
    legend_below(ax)


def group_seeds(runs):
    """Runs that differ only in their seed, as one dict each: its mean loss at the end and the
    standard deviation over seeds (0 for one seed), kind, label, cost, and the losses on the way of
    the first seed as [(10^12 FLOPs, nats)]."""
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
        on_the_way = [(tflop, loss) for step, tflop, loss in first["curve"] if step > 0.2 * steps]
        label = kind if plain else changes or f"hybrid ratio {ratio}"
        groups.append({"kind": kind, "label": label.replace("=", " "), "tflop": first["tflop"],
                       "loss": spread["mean"], "sd": spread["sd"] or 0, "seeds": len(members),
                       "on_the_way": on_the_way})
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
    for name, draw, size in (("little-text", little_text, (17, 10)),
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
