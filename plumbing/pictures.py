"""The pictures: one run's dynamics, several runs at equal cost, and a tagger's F1.

Each panel answers one question, and its title is the answer.
"""
import io
import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.ticker import EngFormatter, LogLocator

from plumbing.compare import FEWSHOT, cost_sentence
from plumbing.files import write_atomically
from plumbing.logs import layer_series, series
from plumbing.statistics import interval

# Okabe & Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = COLOURS = [
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
# Readable from the last row of a lecture hall. A run's name may contain dollar signs.
matplotlib.rcParams.update({"font.size": 14, "axes.titlesize": 15, "legend.frameon": False,
                            "text.parse_math": False})
# How many characters of a title fit above a panel.
TITLE_WIDTH = 64


# ---- parts -------------------------------------------------------------------------------------

def new_figure(width=17.0, height=11.0):
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    write_atomically(path, png.getvalue())


def label_panel(ax, title, ylabel="", xlabel="updates", width=TITLE_WIDTH):
    ax.set_title(textwrap.fill(title, width), loc="left")
    ax.set_ylabel(ylabel)
    ax.set_xlabel(xlabel)
    ax.spines[["top", "right"]].set_visible(False)


def legend_below(ax, columns=2):
    """A legend below the panel, where no curve crosses it."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns)


def log_steps(ax, last):
    """An x axis that shows update 0 and the dense start: linear to 1, logarithmic from there."""
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlim(0, max(last, 2))
    ticks = [0] + [10 ** k for k in range(8) if 10 ** k <= last]
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])


def plot_evaluations(ax, x, y, color, label=None, style="-"):
    """Points joined by lines. The first one, of the untrained model, is not joined, since nothing
    was measured between it and the second."""
    ax.plot(x[:1], y[:1], "o", color=color)
    ax.plot(x[1:], y[1:], "o", linestyle=style, color=color, linewidth=2, label=label)


# ---- one run -----------------------------------------------------------------------------------

def save_dynamics(folder, lines, settings):
    """Draw a run's dynamics.png."""
    figure = new_figure()
    draw_dynamics(figure, lines, settings)
    save_figure(figure, folder / "dynamics.png")


def draw_dynamics(figure, lines, settings):
    """Draw one run on an empty figure: its next-token loss, its few-shot accuracy, and maps of
    rank and entropy by layer."""
    last = lines[-1]["step"] if lines else 1
    (loss_ax, accuracy_ax), (rank_ax, entropy_ax) = figure.subplots(2, 2)
    draw_losses(loss_ax, lines, settings, last)
    draw_accuracy(accuracy_ax, lines, last)
    draw_layers(rank_ax, lines, ("proportional_effective_rank", "hidden"),
                "Mean over layers: hidden states use {:.0%} of their directions at first, {:.0%} "
                "at the lowest and {:.0%} at the end", "share of full rank")
    draw_layers(entropy_ax, lines, ("head_entropy", "normalised"),
                "Mean over layers: attention has {:.0%} of its largest entropy at first, {:.0%} at "
                "the lowest and {:.0%} at the end", "share of the largest entropy")
    n_meta = sum(line.get("kind") == "meta" for line in lines)
    kind = f"{n_meta:,} of them meta steps" if settings.get("meta") else "vanilla"
    figure.suptitle(f"{settings['name'][:80]}: {last:,} of {settings['steps']:,} updates, {kind}, "
                    f"seed {settings['seed']}")


def draw_losses(ax, lines, settings, last):
    steps, loss = series([line for line in lines if line.get("kind") == "lm"], "loss")
    ax.plot(steps, loss, ".", markersize=3, alpha=0.4, color=BLUE, label="training")
    steps, val = series(lines, "val_loss")
    plot_evaluations(ax, steps, val, "black", "validation")
    title = "Next-token prediction: no evaluation yet"
    if len(val):
        title = f"Next-token prediction: {val[-1]:.2f} nats per token"
    bigram = settings.get("bigram")
    if len(val) and isinstance(bigram, float):
        side = "better" if val[-1] < bigram else "worse"
        title += f", {abs(val[-1] - bigram):.2f} {side} than the bigram"
    ignorance = float(np.log(settings["vocab_size"]))
    for name, height, style in (("bigram", bigram, "--"), ("uniform guess", ignorance, ":")):
        if isinstance(height, float):
            ax.axhline(height, color="grey", linestyle=style, label=f"{name}: {height:.2f}")
    mark_first_meta_step(ax, lines)
    label_panel(ax, title, "nats per token")
    log_steps(ax, last)
    legend_below(ax)


def mark_first_meta_step(ax, lines):
    first = next((line["step"] for line in lines if line.get("kind") == "meta"), None)
    if first:
        ax.axvline(first, color=ORANGE, linewidth=1.5, label="first meta step")


def draw_accuracy(ax, lines, last):
    newest = {}
    for key, colour, label in (("fewshot_after", ORANGE, "meta head, adapted"),
                               ("fewshot_after_new", YELLOW, "meta head, adapted*"),
                               ("fewshot_before", SKY, "meta head, not adapted"),
                               ("fewshot_prototype", GREEN, "nearest prototype*")):
        x, y = series(lines, key)
        if len(x):
            newest[key] = y[-1]
            # Dashed: only the new queries, where the look-up must guess.
            style = "--" if label.endswith("*") else "-"
            plot_evaluations(ax, x, 100 * y, colour, f"{label}: {y[-1]:.0%}", style)
    for key, style, label in (("fewshot_lookup", "--", "previous-token look-up"),
                              ("fewshot_chance", ":", "chance")):
        _, y = series(lines, key)
        if len(y):
            newest[key] = y[-1]
            ax.axhline(100 * y[-1], color="grey", linestyle=style, label=f"{label}: {y[-1]:.0%}")
    mark_first_meta_step(ax, lines)
    label_panel(ax, accuracy_sentence(newest), "% right\n(* new queries: the look-up must guess)")
    ax.set_ylim(bottom=0)
    log_steps(ax, last)
    legend_below(ax)


def accuracy_sentence(figures):
    """A sentence about few-shot figures (shares from 0 to 1)."""
    chance = figures.get("fewshot_chance", 0)
    if {"fewshot_before", "fewshot_after"} <= figures.keys():
        before, after = figures["fewshot_before"], figures["fewshot_after"]
        return (f"Adapting takes accuracy on held-out words from {before:.0%} to {after:.0%} "
                f"(chance {chance:.0%})")
    if "fewshot_prototype" in figures:
        return (f"The nearest prototype gets {figures['fewshot_prototype']:.0%} of held-out words "
                f"right (chance {chance:.0%})")
    return "No few-shot accuracy yet"


def draw_layers(ax, lines, path, title, unit):
    """A map of a probe: time to the right, layers upwards. The title is a format with places for
    the mean over the layers at first, at its lowest and at the end."""
    x, values = layer_series(lines, *path)
    if not len(x):
        label_panel(ax, "not probed yet")
        return
    n_layer = values.shape[1]  # values (S, layers)
    edges = np.append(x, x[-1] * 1.05 + 0.5)
    image = ax.pcolormesh(edges, np.arange(n_layer + 1) - 0.5, values.T, cmap="viridis")
    ax.figure.colorbar(image, ax=ax, label=unit)
    means = values.mean(axis=1)
    label_panel(ax, title.format(means[0], means.min(), means[-1]), "layer (0 reads the text)",
                width=TITLE_WIDTH - 4)
    log_steps(ax, edges[-1])


# ---- several runs ------------------------------------------------------------------------------

def draw_comparison(groups, result):
    """A figure of the result of compare.compare for groups {label: [(settings, lines)]}: loss at
    equal cost, few-shot accuracy, and effective rank by layer."""
    figure = new_figure(20, 7.5)
    loss_ax, accuracy_ax, rank_ax = figure.subplots(1, 3)
    colours = dict(zip(groups, COLOURS * len(groups)))
    draw_loss_at_equal_cost(loss_ax, groups, result, colours)
    draw_accuracy_bars(accuracy_ax, result["groups"], colours)
    draw_ranks(rank_ax, result["groups"], colours)
    counted = [f"{label[:60]} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
               for label, runs in groups.items()]
    figure.suptitle(" against ".join(counted))
    return figure


def draw_loss_at_equal_cost(ax, groups, result, colours):
    highest = 0.0
    for label, runs in groups.items():
        for i, (_, lines) in enumerate(runs):
            x, y = series(lines, result["loss"], x="flops")
            highest = max([highest, *x[1:]])
            ax.plot(x[1:], y[1:], "o-", linewidth=2, color=colours[label],
                    label=None if i else label[:60])
    label_panel(ax, cost_sentence(result), result["unit"], "model FLOPs", width=44)
    legend_below(ax)
    if highest == 0:  # a logarithmic axis needs positive costs
        return
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter("")


def draw_accuracy_bars(ax, entries, colours):
    """Bars of few-shot accuracy, {label: final figures}. Error bars are the spread over seeds."""
    width = 0.8 / len(entries)
    sentences = []
    for g, (label, entry) in enumerate(entries.items()):
        for b, key in enumerate(FEWSHOT):
            if key in entry:
                x = b + (g - (len(entries) - 1) / 2) * width
                error = entry[key]["sd"]
                bar = ax.bar(x, 100 * entry[key]["mean"], width, color=colours[label], capsize=4,
                             yerr=None if error is None else 100 * error)
                ax.bar_label(bar, fmt="{:.1f}", padding=2)
        figures = {key: value["mean"] for key, value in entry.items() if key.startswith("fewshot")}
        sentences.append(accuracy_sentence(figures))
        if "fewshot_chance" in figures and not g:
            ax.axhline(100 * figures["fewshot_chance"], color="grey", linestyle=":",
                       label=f"chance: {figures['fewshot_chance']:.0%}")
    ax.set_xticks(range(len(FEWSHOT)), [name.replace(", ", ",\n") for name in FEWSHOT.values()])
    ax.margins(y=0.1)
    # The title is the sentence of the first group that adapts.
    adapting = [sentence for sentence in sentences if sentence.startswith("Adapting")]
    label_panel(ax, (adapting + sentences)[0], "% right", "* new queries: the look-up must guess",
                width=44)
    legend_below(ax)


def draw_ranks(ax, entries, colours):
    """The effective rank of the hidden states at the end, by layer."""
    name, means = "rank of hidden states", {}
    for label, entry in entries.items():
        if name in entry:
            layers = entry[name]["mean"]
            means[label] = np.mean(layers)
            ax.plot(range(len(layers)), layers, "o-", linewidth=2, color=colours[label])
    ax.set_ylim(bottom=0)
    said = ", ".join(f"{mean:.0f} in {label[:40]}" for label, mean in means.items())
    label_panel(ax, f"Directions that the hidden states use at the end: {said or 'not probed'}",
                "effective rank", "layer (0 reads the text)", width=44)


# ---- taggers -----------------------------------------------------------------------------------

def draw_f1(bars, tests):
    """Bars of a tagger's F1, a panel for each (mode, training treebank). bars is {(mode, train):
    {label: [F1 in points (runs, tunings), for each test]}}; the error bars are 95 % intervals
    over runs, or over the tunings of a single run."""
    figure = new_figure(min(40, 6 + 2 * len(bars) * len(tests)), 7)
    axes = figure.subplots(1, len(bars), squeeze=False, sharey=True)[0]
    for ax, ((mode, train), groups) in zip(axes, bars.items()):
        width = 0.8 / len(groups)
        for g, (label, f1) in enumerate(groups.items()):
            x = np.arange(len(tests)) + (g - (len(groups) - 1) / 2) * width
            bar = ax.bar(x, [values.mean() for values in f1], width, capsize=4,
                         yerr=half_intervals(f1), color=COLOURS[g % len(COLOURS)], label=label[:60])
            ax.bar_label(bar, fmt="{:.0f}", padding=2)
        ax.set_xticks(range(len(tests)), tests)
        means = {label: np.mean([values.mean() for values in f1]) for label, f1 in groups.items()}
        best = max(means, key=means.get)
        tuned = "the tag head alone" if mode == "head" else "everything"
        verb = "is best with" if len(means) > 1 else "reaches"
        label_panel(ax, f"Tuning {tuned} on {train}: {best[:40]} {verb} {means[best]:.1f} points",
                    "F1 (points)", "test treebank", width=36 + 10 * len(tests))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def half_intervals(f1):
    """Half the width of the 95 % interval of each mean of f1, (runs, tunings) each; None if there
    is only one value."""
    halves = []
    for values in f1:
        independent = values.mean(axis=1) if len(values) > 1 else values[0]
        if len(independent) < 2:
            return None
        mean, low, _ = interval(independent, None)
        halves.append(mean - low)
    return halves
