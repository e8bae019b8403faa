"""The pictures: one run's dynamics, several runs at equal cost, and a tagger's F1."""
import io

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.ticker import EngFormatter, LogLocator

from plumbing.compare import COSTS, FEWSHOT, STANDARD_ERROR
from plumbing.files import write_atomically
from plumbing.logs import layer_series, series

# Okabe & Ito's colours, which colour-blind eyes can tell apart.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = COLOURS = [
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
# A run's name may hold dollar signs.
matplotlib.rcParams["text.parse_math"] = False


# ---- parts -------------------------------------------------------------------------------------

def new_figure(width=15.0, height=8.0):
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    write_atomically(path, png.getvalue())


def label_panel(ax, title, ylabel="", xlabel="updates"):
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_ylabel(ylabel)
    ax.set_xlabel(xlabel)
    ax.spines[["top", "right"]].set_visible(False)


def log_steps(ax, last):
    """An axis that shows update 0 and the dense start: linear to 1, logarithmic from there."""
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlim(0, max(last, 2))
    ticks = [0] + [10 ** k for k in range(8) if 10 ** k <= last]
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])


def plot_evaluations(ax, x, y, color, label=None):
    """Points joined by lines. The first one, of the untrained model, stands alone, since what
    lies between it and the second is not known."""
    ax.plot(x[:1], y[:1], "o", color=color, markersize=3)
    ax.plot(x[1:], y[1:], "o-", color=color, markersize=3, label=label)


# ---- one run -----------------------------------------------------------------------------------

def save_dynamics(folder, lines, settings):
    """Draw a run's dynamics.png."""
    figure = new_figure()
    draw_dynamics(figure, lines, settings)
    save_figure(figure, folder / "dynamics.png")


def draw_dynamics(figure, lines, settings):
    """Draw one run on an empty figure: its losses and few-shot accuracy over the updates, and
    maps of rank and entropy by layer."""
    last = lines[-1]["step"] if lines else 1
    (loss_ax, rank_ax), (accuracy_ax, entropy_ax) = figure.subplots(2, 2)
    draw_losses(loss_ax, lines, last)
    draw_accuracy(accuracy_ax, lines, last)
    draw_layers(rank_ax, lines, ("proportional_effective_rank", "hidden"),
                "effective rank of hidden states", "share of full rank")
    draw_layers(entropy_ax, lines, ("head_entropy", "normalised"),
                "attention-head entropy", "share of uniform attention")
    kind = "vanilla"
    if settings.get("meta"):
        ratio = settings.get("hybrid_ratio", 0) * (1 - settings.get("meta_start", 0))
        kind = f"meta steps in {ratio:.1%} of updates"
    figure.suptitle(f"{settings['name']}: {settings['size']}, {kind}, {last:,} of "
                    f"{settings['steps']:,} updates, seed {settings.get('seed', 0)}")


def draw_losses(ax, lines, last):
    for kind, colour, label in (("lm", BLUE, "next-token, training"),
                                ("meta", ORANGE, "meta query, training")):
        x, y = series([line for line in lines if line.get("kind") == kind], "loss")
        if len(x):
            ax.plot(x, y, ".", markersize=2, alpha=0.4, color=colour, label=label)
    steps, val = series(lines, "val_loss")
    plot_evaluations(ax, steps, val, "black", "next-token, validation")
    ax.legend(fontsize=8, frameon=False)
    title = f"loss: validation {val[-1]:.2f} nats per token" if len(val) else "loss"
    label_panel(ax, title, "nats")
    log_steps(ax, last)


def draw_accuracy(ax, lines, last):
    for key, colour, label in (("fewshot_prototype", GREEN, "nearest prototype*"),
                               ("fewshot_before", SKY, "meta head before adapting"),
                               ("fewshot_after", ORANGE, "meta head after adapting"),
                               ("fewshot_after_new", YELLOW, "meta head after adapting*")):
        x, y = series(lines, key)
        if len(x):
            plot_evaluations(ax, x, 100 * y, colour, f"{label}: {y[-1]:.0%}")
    for key, style, label in (("fewshot_chance", "--", "chance"),
                              ("fewshot_lookup", ":", "previous-token look-up")):
        _, y = series(lines, key)
        if len(y):
            ax.axhline(100 * y[-1], color="grey", linestyle=style, linewidth=1,
                       label=f"{label}: {y[-1]:.0%}")
    if ax.lines:
        ax.legend(fontsize=8, frameon=False, loc="upper left")
    ax.margins(y=0.2)
    ax.set_ylim(bottom=0)
    label_panel(ax, "few-shot accuracy on held-out words (* where the look-up has no answer)",
                "% right")
    log_steps(ax, last)


def draw_layers(ax, lines, path, name, unit):
    """A map of a probe: time to the right, layers upwards."""
    x, values = layer_series(lines, *path)
    if not len(x):
        label_panel(ax, f"{name}: no probe yet")
        return
    n_layer = values.shape[1]  # values (S, layers)
    edges = np.append(x, x[-1] * 1.05 + 0.5)
    image = ax.pcolormesh(edges, np.arange(n_layer + 1) - 0.5, values.T, cmap="viridis")
    ax.figure.colorbar(image, ax=ax, label=unit)
    title = f"{name}: mean {values[0].mean():.2f} to {values[-1].mean():.2f}"
    label_panel(ax, title, "layer (0 reads the text)")
    log_steps(ax, edges[-1])


# ---- several runs ------------------------------------------------------------------------------

def draw_comparison(groups, result):
    """A figure of what compare.compare found in groups {label: [(settings, lines)]}: the same
    held-out loss against four costs, few-shot accuracy, and the rank of the hidden states."""
    figure = new_figure(15, 8)
    axes = figure.subplots(2, 3).ravel()
    colours = dict(zip(groups, COLOURS * len(groups)))
    for ax, cost in zip(axes, COSTS):
        draw_loss_against(ax, cost, groups, result, colours)
    axes[0].legend(fontsize=8, frameon=False)
    draw_accuracy_bars(axes[4], result["groups"], colours)
    name = "rank of hidden states"
    for label, entry in result["groups"].items():
        if name in entry:
            layers = entry[name]["mean"]
            axes[5].plot(range(len(layers)), layers, "o-", markersize=3, color=colours[label])
    label_panel(axes[5], f"{name} at the end", "effective rank", "layer (0 reads the text)")
    counted = [f"{label} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
               for label, runs in groups.items()]
    figure.suptitle("held-out loss at equal cost: " + " against ".join(counted))
    return figure


def draw_loss_against(ax, cost, groups, result, colours):
    for label, runs in groups.items():
        for i, (_, lines) in enumerate(runs):
            x, y = series(lines, result["loss"], x=cost)
            ax.plot(x[1:], y[1:], "o-", markersize=2.5, linewidth=1.2, color=colours[label],
                    label=None if i else label)
    ratios = []
    for entry in result["sooner_by"].values():
        at_the_end = entry[cost]["mean"][-1]
        ratios.append("- (never reached)" if at_the_end is None else f"{at_the_end:.2f}x")
    label_panel(ax, "sooner by " + "; ".join(ratios), result["unit"], COSTS[cost])
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter("")


def draw_accuracy_bars(ax, entries, colours):
    """Bars of few-shot accuracy, {label: final figures}. The error is the spread over seeds or,
    of a single seed, the standard error over episodes."""
    width = 0.8 / len(entries)
    for g, (label, entry) in enumerate(entries.items()):
        for b, key in enumerate(FEWSHOT):
            if key in entry:
                x = b + (g - (len(entries) - 1) / 2) * width
                error = entry[key]["sd"]
                if error is None and STANDARD_ERROR.get(key) in entry:
                    error = entry[STANDARD_ERROR[key]]["mean"]
                ax.bar(x, 100 * entry[key]["mean"], width, color=colours[label], capsize=2,
                       yerr=None if error is None else 100 * error)
                ax.hlines(100 * entry[key]["untrained"], x - width / 2, x + width / 2,
                          color="black", linewidth=1)
        if "fewshot_chance" in entry:
            ax.axhline(100 * entry["fewshot_chance"]["mean"], color="grey", linestyle="--",
                       linewidth=1)
    ax.set_xticks(range(len(FEWSHOT)), FEWSHOT.values(), fontsize=8)
    label_panel(ax, "few-shot accuracy (dashed chance, black untrained)", "% right",
                "* on queries that the look-up cannot answer")


# ---- taggers -----------------------------------------------------------------------------------

def draw_f1(bars, tests):
    """Bars of a tagger's F1, a panel for each (mode, training treebank). bars is {(mode, train):
    {label: [F1 in points (runs, tunings), for each test]}}; the error is their standard
    deviation, if there are several."""
    figure = new_figure(min(40, 2 + 1.5 * len(bars) * len(tests)), 5)
    axes = figure.subplots(1, len(bars), squeeze=False, sharey=True)[0]
    for ax, ((mode, train), groups) in zip(axes, bars.items()):
        width = 0.8 / len(groups)
        for g, (label, f1) in enumerate(groups.items()):
            x = np.arange(len(tests)) + (g - (len(groups) - 1) / 2) * width
            spread = [values.std(ddof=1) for values in f1] if f1[0].size > 1 else None
            ax.bar(x, [values.mean() for values in f1], width, yerr=spread, capsize=3,
                   color=COLOURS[g % len(COLOURS)], label=label)
        ax.set_xticks(range(len(tests)), tests)
        label_panel(ax, f"mode {mode}, trained on {train}", "F1 (points)", "test treebank")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False)
    return figure
