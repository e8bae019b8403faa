"""What a run came to, and several at equal cost.

    from report import compare, comparison_table, group_runs, summary    # python probe.py RUN RUN ... compares

The comparison: the same held-out next-token loss against updates, tokens, FLOPs and seconds; how much sooner one group of
runs gets there than another; the paper's own reading beside it; few-shot accuracy, rank and entropy.
"""
import json
import math
import platform
import sys
import time
from collections import Counter

import numpy as np
import torch

import data
from model import generate, precision
from probe import COLOURS, CURVES, holds, panel, series

# ---- one run -----------------------------------------------------------------------------------------------

def status(lines):
    """The bar's figures: the newest loss of each kind."""
    newest = {}
    for line in lines:
        newest |= {f"{line.get('kind')} {key}": value for key, value in line.items() if value is not None}
    parts = [f"loss {newest['lm loss']:.2f}" if "lm loss" in newest else "", f"val {newest['None val_loss']:.2f}" if "None val_loss" in newest else ""]
    if "meta query_accuracy" in newest:
        parts.append(f"query {newest['meta query_accuracy']:.0%} (chance {newest['meta chance']:.0%})")
    parts += [f"{value} skipped" for key, value in newest.items() if key.endswith(" skipped")][-1:]
    rate = next((line["tokens_per_second"] for line in reversed(lines) if "tokens_per_second" in line), None)
    parts.append(f"{rate:,.0f} tok/s" if rate else "")
    return ", ".join(filter(None, parts))


def summary(folder, lines, settings, corpus, windows, decoder, device, processes=1):
    """The report at the end of a run, a string: what was reached, what it cost, a sample, and what to do next."""
    evaluations = [line for line in lines if "val_loss" in line]
    first, final = evaluations[0], evaluations[-1]
    baselines = data.ngram_baselines(corpus.train, windows, corpus.vocab_size)
    rows = ["", f"validation loss {final['val_loss']:.3f} nats per token ({final['bits_per_byte']:.3f} bits per byte); "
                f"unigram {baselines['unigram']:.3f}, smoothed bigram {baselines['bigram']:.3f}"]
    head = "fewshot_after_new" in final
    if "fewshot_chance" in final:
        rows += [f"few-shot accuracy on held-out words, {settings['n_way']}-way {settings['k_shot']}-shot, chance {final['fewshot_chance']:.1%}:"]
        error = {"prototype": "fewshot_stderr", "after": "fewshot_after_stderr"}
        for key, words in (("prototype", "nearest prototype"), ("before", "meta head before adapting"), ("after", "meta head after adapting")):
            if f"fewshot_{key}" in final:
                spread = f" +- {final[error[key]]:.1%}" if key in error else ""
                rows.append(f"  {words:<26} {final[f'fewshot_{key}']:6.1%}{spread}   (untrained {first[f'fewshot_{key}']:.1%})")
        rows.append(f"  {'previous-token look-up':<26} {final['fewshot_lookup']:6.1%}   (prototypes are asked only what it cannot answer"
                    + (f"; there the head has {final['fewshot_after_new']:.1%})" if head else ")"))
    else:
        rows.append(f"no few-shot accuracy: the validation text has too few held-out words for {settings['n_way']}-way episodes")
    skipped = max((line.get("skipped", 0) for line in lines), default=0)
    if skipped:
        rows.append(f"{skipped} updates were skipped: their loss or gradient was not finite")
    achieved, peak = final["flops"] / max(final["seconds"], 1e-9), processes * matmul_peak(device)
    rows += [f"cost: {final['tokens']:,} tokens, {final['flops']:.3g} model FLOPs, {final['seconds'] / 60:.1f} minutes of training"
             f" on {settings['device_name']}" + peak_memory(device),
             f"model FLOPs utilisation {achieved / peak:.0%}: {achieved / 1e9:,.0f} of the {peak / 1e9:,.0f} GFLOP/s of a plain matrix product here",
             f"sample: {sample(decoder, corpus, device)}",
             f"files in {folder}: config.json, metrics.jsonl, ckpt.pt, dynamics.png",
             f'next: python model.py {folder} --prompt "Returns the"   or   python probe.py {folder}']
    return "\n".join(rows)


def sample(decoder, corpus, device, prompt="Returns the"):
    end = corpus.encoding.encode_single_token(data.END)
    with precision(device):
        ids = list(generate(decoder, corpus.encoding.encode_ordinary(prompt), 40, n_ids=end, generator=torch.Generator().manual_seed(0)))
    return repr(prompt + corpus.encoding.decode(ids))


def in_words(device):
    """The device as the log names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory(device):
    if device.type == "cuda":
        return f", peak {torch.cuda.max_memory_allocated(device) / 2 ** 30:.1f} GiB on the device"
    try:
        import resource  # not on Windows
    except ImportError:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30:.1f} GiB"


def matmul_peak(device):
    """FLOP/s of a plain matrix product in the precision of training on this device, measured: the best of five."""
    size, times = 8192 if device.type == "cuda" else 2048, []
    with precision(device):
        a = torch.randn(size, size, device=device)
        a = (a @ a) / size  # in the precision of a product
        for _ in range(5):
            started = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - started)
    return 2 * size ** 3 / min(times)


# ---- several runs ------------------------------------------------------------------------------------------

COSTS = {"step": "updates", "tokens": "tokens", "flops": "model FLOPs", "seconds": "seconds of training"}
FEWSHOT = {"fewshot_before": "head before", "fewshot_after": "head after", "fewshot_after_new": "head after*", "fewshot_prototype": "prototype*"}
STANDARD_ERROR = {"fewshot_prototype": "fewshot_stderr", "fewshot_after": "fewshot_after_stderr"}
NOT_A_CONFIGURATION = {"name", "runs", "seed", "resume", "quiet", "cache", "device", "device_name", "versions", "head_parameters"}


def group_runs(runs):
    """{label: [(settings, lines)]} of runs [(settings, lines)]: those that differ in their seed alone are one group,
    sorted by seed and labelled by the name of the first. A second run of one seed, which may be of other code, begins another group."""
    groups, seen = {}, Counter()
    for settings, lines in runs:
        key = json.dumps({k: v for k, v in settings.items() if k not in NOT_A_CONFIGURATION}, sort_keys=True)
        groups.setdefault((key, seen[key, settings["seed"]]), []).append((settings, lines))
        seen[key, settings["seed"]] += 1
    members = [sorted(group, key=lambda run: run[0]["seed"]) for group in groups.values()]
    labels = [group[0][0]["name"] for group in members]
    return {f"{label} ({i})" if labels.count(label) > 1 else label: group for i, (label, group) in enumerate(zip(labels, members), 1)}


def first_reach(costs, losses, level):
    """The cost at which a curve first comes down to `level`, interpolated between its points; NaN if it never does."""
    i = int((losses <= level).argmax())
    if i == 0 or losses[i] > level:  # it began below (when it passed is not known), or it never got there
        return float(costs[0]) if losses[0] == level else math.nan
    return float(np.interp(level, losses[[i, i - 1]], costs[[i, i - 1]]))


def sooner_by(first, second, levels):
    """How many times less the curves `second` need than the curves `first` to reach each level.

    Curves are lists of (costs (S,), losses (S,)). The i-th is set against the i-th where there are as many (the same
    seeds), else each against each. Returns {mean, sd} by level over the pairs; a level that one curve never reached
    is None, and so is the sd of a single pair."""
    pairs = zip(first, second) if len(first) == len(second) else ((a, b) for a in first for b in second)
    return mean_and_spread([[first_reach(*a, level) / first_reach(*b, level) for level in levels] for a, b in pairs])


def mean_and_spread(values):
    """{mean, sd} over the first dimension of values, numbers or lists; sd is the sample's, None for one value."""
    values = np.array(values, dtype=float)
    blank = lambda numbers: [None if math.isnan(n) else float(n) for n in numbers] if numbers.ndim else float(numbers)
    return {"mean": blank(values.mean(axis=0)), "sd": blank(values.std(axis=0, ddof=1)) if len(values) > 1 else None}


STUDENT = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # 97.5 % quantiles of t with 1, 2, ... degrees of freedom


def interval(values, draws):
    """(mean, low, high): 95 % for the mean difference of n pairs of runs, values (n,), by Student's t, since pretraining seeds
    differ more than anything else; of a single pair by bootstrap draws (R,) of it, which know nothing of other seeds."""
    if len(values) == 1:
        return values[0], *np.percentile(draws, [2.5, 97.5])
    half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * np.std(values, ddof=1) / len(values) ** 0.5
    return np.mean(values), np.mean(values) - half, np.mean(values) + half


def mixed_loss(lines):
    """(updates, loss): the paper's own reading, training loss of whatever kind of update, mean of the last 50."""
    steps, loss = series(lines, "loss")
    width = min(50, max(1, len(loss) // 4))
    return steps[width - 1:], np.convolve(loss, np.ones(width) / width, mode="valid")


def compare(groups):
    """Compare the second and later groups with the first: a dict of the figures that the table and picture show.

    Runs on different texts or tokenizers are compared in bits per byte, since their nats per token differ in kind."""
    kinds = {(s.get("corpus_sha256"), s["vocab_size"], s.get("tokenizer")) for runs in groups.values() for s, _ in runs}
    loss, unit = ("val_loss", "nats per token") if len(kinds) == 1 else ("bits_per_byte", "bits per byte")
    result = {"loss": loss, "unit": unit, "groups": {}, "sooner_by": {}}
    for label, runs in groups.items():
        entry = result["groups"][label] = {"runs": [s["name"] for s, _ in runs]}
        curves = {key: [series(lines, key)[1] for _, lines in runs]
                  for key in (loss, *FEWSHOT, *STANDARD_ERROR.values(), "fewshot_lookup", "fewshot_chance")}
        curves |= {name: [series(lines, *path)[1] for _, lines in runs] for name, path in CURVES.items()}
        for key, values in curves.items():
            if all(map(len, values)):
                ends = [v[-1].mean(axis=1) if v.ndim == 3 else v[-1] for v in values]  # entropy: the mean of a layer's heads
                entry[key] = mean_and_spread(ends) | {"untrained": mean_and_spread([v[0] for v in values])["mean"]} \
                    if key not in CURVES else mean_and_spread(ends)
    first, *others = groups
    for label in others:
        sides = [[lines for _, lines in groups[g]] for g in (first, label)]
        losses = [series(lines, loss)[1] for side in sides for lines in side]
        # from where all have been evaluated twice (before that a line between two points would be fiction) to the last common loss
        end = max(y.min() for y in losses)
        levels = np.unique(np.linspace(max(end, min(y[:2][-1] for y in losses)), end, 6))[::-1]
        entry = result["sooner_by"][label] = {"levels": levels.tolist()}
        for cost in COSTS:
            entry[cost] = sooner_by(*[[series(lines, loss, x=cost) for lines in side] for side in sides], levels)
        mixed = [[mixed_loss(lines) for lines in side] for side in sides]
        if len(kinds) == 1 and all(len(y) for side in mixed for _, y in side):
            level = max(y.min() for side in mixed for _, y in side)
            entry["papers_reading"] = {"level": float(level)} | sooner_by(*mixed, [level])
    return result


def in_figures(entry, form):
    """{mean, sd} as text, without an sd that is None."""
    return form.format(entry["mean"]) + (f" +- {form.format(entry['sd'])}" if entry["sd"] is not None else "")


def comparison_table(result):
    """What `compare` found, in words."""
    figure = lambda entry, key, form="{:.1%}": in_figures(entry[key], form) if key in entry else "-"
    rows = [f"final figures; loss in {result['unit']} on validation text; +- is the standard deviation over seeds",
            f"{'':<20} {'loss':>16} " + "".join(f"{name:>18}" for name in FEWSHOT.values()) + f"{'untrained prototype*':>22} {'chance':>8}",
            "* on queries that the previous-token look-up cannot answer"]
    for label, entry in result["groups"].items():
        untrained = f"{entry['fewshot_prototype']['untrained']:.1%}" if "fewshot_prototype" in entry else "-"
        rows.append(f"{label:<20} {figure(entry, result['loss'], '{:.3f}'):>16} " + "".join(f"{figure(entry, key):>18}" for key in FEWSHOT)
                    + f"{untrained:>22} " + (f"{entry['fewshot_chance']['mean']:>8.1%}" if "fewshot_chance" in entry else f"{'-':>8}"))
        errors = [f"{FEWSHOT[key]} {entry[error]['mean']:.1%}" for key, error in STANDARD_ERROR.items() if error in entry]
        rows.append(f"{'':<20} standard error over episodes: {', '.join(errors)}" if errors else "")
    first = next(iter(result["groups"]))
    ratio = lambda entry, i: "never reached" if entry["mean"][i] is None else f"{entry['mean'][i]:.2f}x" + (f" +- {entry['sd'][i]:.2f}" if entry["sd"] else "")
    for label, entry in result["sooner_by"].items():
        rows += [f"\n{label} reaches the same held-out loss sooner than {first} by a factor of (below 1: later)",
                 f"{'loss':>8} " + "".join(f"{name:>22}" for name in COSTS.values())]
        rows += [f"{level:8.3f} " + "".join(f"{ratio(entry[cost], i):>22}" for cost in COSTS) for i, level in enumerate(entry["levels"])]
        rows[-1] += "   the last common loss"
        if "papers_reading" in entry:
            rows.append(f"the paper's reading, mixed training loss {entry['papers_reading']['level']:.3f} against updates: "
                        f"{ratio(entry['papers_reading'], 0)} (where meta steps mix an easier question in: not a fair measure)")
    return "\n".join(rows)


def phase_counts(groups):
    """{curve: {label: {"rise and fall": {mean, sd}, "fall and rise": ...}}}, over the seeds of a group: in how many layers the
    curve does so by `probe.phase`, of groups {label: [(settings, probe.phases)]}. A layer that does both is in both."""
    shapes = {"rise and fall": "rises, falls", "fall and rise": "falls, rises"}
    return {curve: {label: {name: mean_and_spread([sum(holds(layer["verdict"], shape) for layer in phases[curve]) for _, phases in runs])
                            for name, shape in shapes.items()} for label, runs in groups.items() if all(curve in phases for _, phases in runs)}
            for curve in CURVES}


def phase_count_table(counts):
    """phase_counts in words."""
    rows = [f"\nin how many of its layers a curve does it (layer by layer: python probe.py RUN)\n{'':<28}{'':<20}{'rise and fall':>16}{'fall and rise':>16}"]
    for curve, labels in counts.items():
        for i, (label, kinds) in enumerate(labels.items()):
            rows.append(f"{'' if i else curve:<28}{label:<20}" + "".join(f"{in_figures(kind, '{:.1f}'):>16}" for kind in kinds.values()))
    return "\n".join(rows)


def draw_comparison(figure, groups, result):
    """Draw the comparison on an empty figure: the same held-out loss against four costs, accuracy, rank, entropy."""
    from matplotlib.ticker import EngFormatter, LogLocator
    axes = figure.subplots(2, 4).ravel()
    colours = dict(zip(groups, COLOURS * len(groups)))
    for ax, (cost, name) in zip(axes, COSTS.items()):
        for label, runs in groups.items():
            for i, (_, lines) in enumerate(runs):
                x, y = series(lines, result["loss"], x=cost)
                ax.plot(x[1:], y[1:], "o-", markersize=2.5, linewidth=1.2, color=colours[label], label=None if i else label)
        ends = [entry[cost]["mean"][-1] for entry in result["sooner_by"].values()]
        panel(ax, "sooner by " + "; ".join("- (never reached)" if end is None else f"{end:.2f}x" for end in ends), result["unit"], name)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_minor_formatter("")
    axes[0].legend(fontsize=8, frameon=False)
    width = 0.8 / len(groups)
    for g, (label, entry) in enumerate(result["groups"].items()):
        for b, key in enumerate(FEWSHOT):
            if key in entry:
                at = b + (g - (len(groups) - 1) / 2) * width
                error = entry[key]["sd"] or entry.get(STANDARD_ERROR.get(key), {"mean": 0})["mean"]  # over seeds, else episodes
                axes[4].bar(at, 100 * entry[key]["mean"], width, yerr=100 * error, color=colours[label], capsize=2)
                axes[4].hlines(100 * entry[key]["untrained"], at - width / 2, at + width / 2, color="black", linewidth=1)
        if "fewshot_chance" in entry:
            axes[4].axhline(100 * entry["fewshot_chance"]["mean"], color="grey", linestyle="--", linewidth=1)
    axes[4].set_xticks(range(len(FEWSHOT)), FEWSHOT.values(), fontsize=8)
    panel(axes[4], "few-shot accuracy (dashed chance, black untrained)", "% right", "* on queries that the look-up cannot answer")
    for ax, name in zip(axes[5:], ("rank of hidden states", "rank of attention weights", "head entropy")):
        entries = {label: entry[name]["mean"] for label, entry in result["groups"].items() if name in entry}
        for label, layers in entries.items():
            ax.plot(range(len(layers)), layers, "o-", markersize=3, color=colours[label])
        panel(ax, f"{name}: mean " + " / ".join(f"{np.mean(layers):.2f}" for layers in entries.values()),
              "share of uniform attention" if "entropy" in name else "effective rank", "layer (0 reads the text)")
    figure.suptitle("held-out loss at equal cost: " + " against ".join(f"{label} ({len(runs)} seed{'s'[:len(runs) != 1]})" for label, runs in groups.items()))
