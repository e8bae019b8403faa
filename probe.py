"""Probes of the learning dynamics, and the pictures made of them.

    python probe.py runs/11m-meta                    # pictures and a table of phases of one run
    python probe.py runs/11m-vanilla runs/11m-meta   # comparison at equal cost
    python probe.py runs/11m-meta --live             # a window that follows a running job

Effective rank (Roy & Vetterli 2007): exp of the entropy of the normalised singular values; how many directions a
matrix really uses. Attention entropy: how many positions a head really looks at.
"""
import io
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import read_settings, write_atomically
from kernels import cross_entropy
from model import Parser

ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
FEWEST = 12        # probes that phases are seen in: of a short run they would show its first hump alone
BATCH = 4          # validation windows in the probe batch
HEADS_AT_ONCE = 4  # heads whose attention probabilities are held at a time


# ---- measures ----------------------------------------------------------------------------------------------

def effective_rank(matrix):
    """exp(-sum p ln p), p the singular values of matrix (m, n) divided by their sum: from 1 to min(m, n); 0 for a
    matrix of zeros."""
    return effective_ranks([matrix])[0]


def effective_ranks(matrices):
    """effective_rank of each matrix, as a list. The singular values are roots of the eigenvalues of the smaller Gram
    matrix, in float64; those of one size are found in one call, so that a GPU is not waited for a hundred times."""
    grams, ranks = {}, [math.nan] * len(matrices)
    for i, matrix in enumerate(matrices):
        matrix = (matrix.detach().cpu() if matrix.device.type == "mps" else matrix.detach()).double()  # MPS knows neither float64 nor eigvalsh
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        grams.setdefault(len(gram), []).append((i, gram))
    for group in grams.values():
        stack = torch.stack([gram for _, gram in group])  # (matrices, size, size)
        finite = stack.isfinite().all(dim=2).all(dim=1)
        singular = torch.linalg.eigvalsh(stack.nan_to_num(0, 0, 0)).clamp_min(0).sqrt()  # (matrices, size)
        total = singular.sum(dim=1)
        rank = torch.special.entr(singular / total[:, None]).sum(dim=1).exp().where(total > 0, 0.0).where(finite, math.nan)
        for (i, _), value in zip(group, rank.tolist()):
            ranks[i] = value
    return ranks


def head_entropy(q, k):
    """Entropy of causal attention in nats, (heads, T): the mean over the batch at each position, from queries
    (B, heads, T, head_dim) and keys (B, kv_heads, T, head_dim). Uniform attention over t positions has ln t."""
    group = q.shape[1] // k.shape[1]
    visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    entropies = []
    for heads in torch.arange(q.shape[1]).split(HEADS_AT_ONCE):
        scores = q[:, heads].float() @ k[:, heads // group].float().mT * q.shape[3] ** -0.5
        attention = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)  # (B, few heads, T, T)
        entropies.append(torch.special.entr(attention).sum(dim=-1).mean(dim=0))
    return torch.cat(entropies)


def measure(decoder, batch):
    """The figures of a probe line from validation windows batch (B, T+1): per layer, effective rank and
    proportional effective rank (over the number of singular values) of centred hidden states, weights, and gradients
    of the next-token loss; per layer and head, attention entropy in nats and over ln t, position 0 left out."""
    layers = decoder.model.layers
    hidden, queries_keys, hooks = [], [], []
    for layer in layers:
        hooks.append(layer.register_forward_hook(lambda module, args, out: hidden.append(out.detach())))
        hooks.append(layer.self_attn.register_forward_pre_hook(
            lambda module, args: queries_keys.append([t.detach() for t in module.qkv(*args[:3])[:2]])))
    try:
        states = decoder.model(batch[:, :-1])
        cross_entropy(states.flatten(0, 1), decoder.lm_head.weight, batch[:, 1:].flatten()).backward()
    finally:
        for hook in hooks:
            hook.remove()
    centred = [h.flatten(0, 1) - h.flatten(0, 1).mean(dim=0) for h in hidden]  # the mean state would drown the rest
    matrices = {"hidden": [[h] for h in centred]}  # name -> layers -> matrices
    for name, block, projections in (("attention", "self_attn", ATTENTION), ("mlp", "mlp", FEED_FORWARD)):
        weights = [[getattr(getattr(layer, block), p).weight for p in projections] for layer in layers]
        matrices[name] = weights
        matrices[f"{name}_grad"] = [[w.grad for w in row] for row in weights]
    ranks = {name: [] for name in matrices}
    for i in range(len(layers)):
        found = iter(effective_ranks([m for rows in matrices.values() for m in rows[i]]))
        for name, rows in matrices.items():
            ranks[name].append([next(found) for _ in rows[i]])
    decoder.zero_grad()
    nats = torch.stack([head_entropy(q, k)[:, 1:] for q, k in queries_keys])       # (layers, heads, T-1)
    uniform = torch.arange(2, nats.shape[2] + 2, device=nats.device).float().log()
    mean = lambda values: sum(values) / len(values)
    return {"effective_rank": {name: [mean(row) for row in rows] for name, rows in ranks.items()},
            "proportional_effective_rank": {name: [mean([r / min(m.shape) for r, m in zip(row, ms)])
                                                   for row, ms in zip(rows, matrices[name])] for name, rows in ranks.items()},
            "head_entropy": {"nats": nats.mean(dim=2).tolist(), "normalised": (nats / uniform).mean(dim=2).tolist()}}


def is_probe_step(step, every, last):
    """Dense at the start, where the first drop is over in a hundred updates: 0, 1, 2, 4, 8, ...; then evenly."""
    return step % every == 0 or step == last or (step < every and step & (step - 1) == 0)


# ---- the log -----------------------------------------------------------------------------------------------

def read_metrics(path):
    """(lines, notes): the objects of a metrics.jsonl as far as it is whole, and what was wrong with the rest."""
    lines, bad = [], 0
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, KeyError, TypeError, OverflowError):
            bad += 1
    return lines, [f"{path}: {bad} unreadable line{'s'[:bad != 1]} left out"] if bad else []


def read_run(folder):
    """(settings, lines, notes) of a run, finished or not. Raises ValueError if the folder holds none."""
    folder = Path(folder)
    settings = read_settings(folder)
    lines, notes = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else ([], [])
    if not any("val_loss" in line for line in lines):
        raise ValueError(f"{folder} has no evaluation in its log yet")
    if lines[-1]["step"] < settings["steps"]:
        notes.append(f"{folder}: still going or stopped, at update {lines[-1]['step']} of {settings['steps']}")
    return settings, lines, notes


def series(lines, *path, x="step"):
    """(x (S,), values (S, ...)) of one figure of the log, float64, such as series(lines, "effective_rank", "hidden");
    lines without it are passed over, and so are values that are not finite or not of the usual shape."""
    found = []
    for line in lines:
        value = line
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        try:
            value = np.array(value, dtype=float)
        except (TypeError, ValueError):
            continue
        if value.size and np.isfinite(value).all() and (not found or value.shape == found[0][1].shape):
            found.append((line[x], value))
    return np.array([x for x, _ in found], dtype=float), np.array([v for _, v in found])


# ---- phases ------------------------------------------------------------------------------------------------

def smooth(values):
    """Running mean of three, values (S,); the ends keep two."""
    padded = np.concatenate([[np.nan], values, [np.nan]])
    return np.nanmean(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)


def monotone_fit(values):
    """Least-squares rising fit to values (S,) by pooling adjacent violators (Ayer et al. 1955)."""
    if not len(values):
        return values
    blocks = []  # [mean, size]
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, size = blocks.pop()
            total = blocks[-1][1] + size
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * size) / total, total]
    return np.concatenate([np.full(size, mean) for mean, size in blocks])


def hump(values):
    """(height, bottom, peak, end) of the best rise and fall in values (S,): indices, with height the smaller of the
    two; bottom is the lowest point before the peak and end the lowest after it."""
    before, after = np.minimum.accumulate(values), np.minimum.accumulate(values[::-1])[::-1]
    heights = values - np.maximum(before, after)
    peak = int(heights.argmax())
    return heights[peak], int(values[:peak + 1].argmin()), peak, peak + int(values[peak:].argmin())


def hump_test(values, draws=400):
    """(height, bottom, peak, end, p) of the best rise and fall in values (S,), smoothed.

    p is the probability of one of this height in curves that are monotone in truth: the best monotone fit plus noise,
    which is what a fit that may fall, rise, fall and rise leaves over, resampled in blocks that keep its
    autocorrelation (Kunsch 1989)."""
    height, bottom, peak, end = hump(smooth(values))
    falling = lambda part: -monotone_fit(-part)
    fit = min(monotone_fit(values), falling(values), key=lambda f: ((values - f) ** 2).sum())
    free_fit = np.concatenate([falling(values[:bottom]), monotone_fit(values[bottom:peak]),
                               falling(values[peak:end]), monotone_fit(values[end:])])
    freedom = len(values) - len(np.unique(free_fit))  # the fit follows the noise, too: what it leaves is too small
    residuals, size = (values - free_fit) * len(values) / max(1, freedom), max(3, len(values) // 4)
    starts = np.random.default_rng(0).integers(0, len(values), (draws, -(-len(values) // size)))
    at = (starts[:, :, None] + np.arange(size)) % len(values)
    null = fit + residuals[at.reshape(draws, -1)[:, :len(values)]]
    return height, bottom, peak, end, (1 + sum(hump(smooth(curve))[0] >= height for curve in null)) / (1 + draws)


def phase(steps, values):
    """What one layer's curve values (S,) at steps (S,) does: a dict of bottom, peak and reconverged (the step at which
    nine tenths of the fall are done), the sizes of rise and fall, p (see hump_test), and a verdict in a word. The
    opposite, a fall and a rise, is tested likewise: its lowest point is trough, its p is p_trough."""
    smoothed, spread = smooth(values), np.ptp(smooth(values))
    height, bottom, peak, end, p = hump_test(values)
    depth, _, trough, _, p_trough = hump_test(-values)
    # Of monotone curves with noise of 5 % of their range and autocorrelation 0.6, none in forty passes both bars; with spread / 20 one in six.
    humped, dipped = p < 0.005 and height > spread / 8, p_trough < 0.005 and depth > spread / 8
    if humped and dipped:
        verdict = "rises, falls, rises" if peak < trough else "falls, rises, falls"
    elif humped or dipped:
        verdict = "rises and falls" if humped else "falls and rises"
    elif spread < 1e-9:
        verdict = "flat"
    else:
        verdict = "monotone, rising" if smoothed[-1] > smoothed[0] else "monotone, falling"
    fallen = smoothed[peak] - smoothed[peak:end + 1] >= 0.9 * (smoothed[peak] - smoothed[end])
    return {"bottom": int(steps[bottom]), "peak": int(steps[peak]), "reconverged": int(steps[peak + int(fallen.argmax())]),
            "rise": float(smoothed[peak] - smoothed[bottom]), "fall": float(smoothed[peak] - smoothed[end]), "p": float(p),
            "trough": int(steps[trough]), "p_trough": float(p_trough), "verdict": verdict}


def holds(verdict, shape):
    """Whether a verdict of `phase` is, or begins or ends with, the shape "rises, falls" or "falls, rises"."""
    return shape in verdict.replace(" and ", ", ")


CURVES = {"rank of hidden states": ("effective_rank", "hidden"), "rank of attention weights": ("effective_rank", "attention"),
          "rank of MLP weights": ("effective_rank", "mlp"), "head entropy": ("head_entropy", "normalised")}


def phases(lines):
    """{curve: [phase of each layer]} for the curves that the log holds with at least FEWEST probes."""
    result = {}
    for name, path in CURVES.items():
        steps, values = series(lines, *path)
        if len(steps) >= FEWEST:
            values = values.mean(axis=2) if values.ndim == 3 else values  # entropy: the mean of a layer's heads
            result[name] = [phase(steps, column) for column in values.T]
    return result


def phase_table(result):
    """The phases in words: one row a layer, and for each curve who peaks first and who reconverges."""
    rows = []
    for name, layers in result.items():
        rows.append(f"\n{name}\n{'layer':>6} {'bottom':>7} {'peak':>6} {'reconverged':>12} {'rise':>8} {'fall':>8} {'p':>6} {'trough':>7} {'p':>6}  verdict")
        rows += [f"{i:>6} {q['bottom']:>7} {q['peak']:>6} {q['reconverged']:>12} {q['rise']:>8.3g} {q['fall']:>8.3g} {q['p']:>6.3f} {q['trough']:>7} {q['p_trough']:>6.3f}  {q['verdict']}"
                 for i, q in enumerate(layers)]
        humps = [(q["peak"], q["reconverged"], i) for i, q in enumerate(layers) if holds(q["verdict"], "rises, falls")]
        if humps:
            first, back = sorted(humps)[:3], sorted((end, i) for _, end, i in humps)[:3]
            rows.append(f"  {len(humps)} of {len(layers)} layers fan out, then collapse; first to peak: layers "
                        f"{', '.join(str(i) for *_, i in first)}; first to reconverge: layers {', '.join(str(i) for _, i in back)}")
        else:
            rows.append(f"  no layer of {len(layers)} fans out and then collapses (no rise-and-fall beyond autocorrelated noise, p < 0.005, and an eighth of the range)")
    return "\n".join(rows) if rows else f"fewer than {FEWEST} probes: too early for phases"


# ---- pictures ----------------------------------------------------------------------------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]  # Okabe & Ito: safe for colour-blind eyes


def save_figure(figure, path):
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    write_atomically(path, png.getvalue())


def panel(ax, title, ylabel="", xlabel="updates"):
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_ylabel(ylabel)
    ax.set_xlabel(xlabel)
    ax.spines[["top", "right"]].set_visible(False)


def log_steps(ax, last):
    """An axis on which update 0 and the dense start are seen: linear to 1, logarithmic from there."""
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlim(0, max(last, 2))
    ticks = [0] + [10 ** k for k in range(8) if 10 ** k <= last]
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])


def dotted(ax, x, y, color, label=None):
    """Points joined by lines, but for the first, of the untrained model: what lies between it and the second is not known."""
    ax.plot(x[:1], y[:1], "o", color=color, markersize=3)
    ax.plot(x[1:], y[1:], "o-", color=color, markersize=3, label=label)


def draw_dynamics(figure, lines, settings):
    """Draw one run on an empty figure: losses, few-shot accuracy, and rank and entropy by layer as lines and maps."""
    from matplotlib import colormaps
    last = lines[-1]["step"] if lines else 1
    (losses, ranks, entropies), (accuracy, rank_map, entropy_map) = figure.subplots(2, 3)

    steps, val = series(lines, "val_loss")
    for kind, colour, label in (("lm", COLOURS[0], "next-token, training"), ("meta", COLOURS[1], "meta query, training")):
        x, y = series([line for line in lines if line.get("kind") == kind], "loss")
        if len(x):
            losses.plot(x, y, ".", markersize=2, alpha=0.4, color=colour, label=label)
    dotted(losses, steps, val, color="black", label="next-token, validation")
    losses.legend(fontsize=8, frameon=False)
    panel(losses, f"loss: validation {val[-1]:.2f} nats per token" if len(val) else "loss", "nats")

    title = "few-shot accuracy on held-out words"
    for key, colour, label, side in (("fewshot_prototype", COLOURS[2], "nearest prototype*", "bottom"), ("fewshot_before", COLOURS[4], "head before", "bottom"),
                                     ("fewshot_after", COLOURS[1], "head after adapting", "bottom"), ("fewshot_after_new", COLOURS[5], "head after adapting*", "top")):
        x, y = series(lines, key)
        if len(x):
            dotted(accuracy, x, 100 * y, color=colour)
            accuracy.annotate(f"{label} {y[-1]:.0%}", (x[-1], 100 * y[-1]), (-3, 4 if side == "bottom" else -20), textcoords="offset points",
                              color=colour, fontsize=8, ha="right", va=side)
    for key, name in (("fewshot_chance", "chance"), ("fewshot_lookup", "previous-token look-up")):
        _, level = series(lines, key)
        if len(level):
            accuracy.axhline(100 * level[-1], color="grey", linestyle="--", linewidth=1)
            accuracy.annotate(f" {name}", (0, 100 * level[-1]), color="grey", fontsize=8, va="bottom")
            title += f", {round(1 / level[-1])}-way" if name == "chance" else ""
    accuracy.annotate("* on queries that the look-up cannot answer", (0.01, 0.95), xycoords="axes fraction", color="grey", fontsize=8)
    accuracy.margins(y=0.2)
    accuracy.set_ylim(bottom=0)
    panel(accuracy, title, "% right")
    for ax in (losses, accuracy):
        log_steps(ax, last)

    for (line_ax, map_ax), path, name, unit in (
            ((ranks, rank_map), ("proportional_effective_rank", "hidden"), "effective rank of hidden states", "share of full rank"),
            ((entropies, entropy_map), ("head_entropy", "normalised"), "attention-head entropy", "share of uniform attention")):
        x, values = series(lines, *path)
        if not len(x):
            for ax in (line_ax, map_ax):
                panel(ax, f"{name}: no probe yet")
            continue
        values = values.mean(axis=2) if values.ndim == 3 else values  # (S, layers)
        colours = colormaps["viridis"](np.linspace(0, 0.9, values.shape[1]))
        for layer, colour in enumerate(colours):
            line_ax.plot(x, values[:, layer], color=colour, linewidth=1.2)
        for layer in (0, values.shape[1] - 1):
            line_ax.annotate(f" {layer}", (x[-1], values[-1, layer]), color=colours[layer], fontsize=8)
        panel(line_ax, f"{name}: {values[0].mean():.2f} to {values[-1].mean():.2f}", unit)
        edges = np.append(x, x[-1] * 1.05 + 0.5)
        image = map_ax.pcolormesh(edges, np.arange(values.shape[1] + 1) - 0.5, values.T, cmap="viridis")
        map_ax.figure.colorbar(image, ax=map_ax, label=unit)
        panel(map_ax, f"{name}, by layer", "layer (0 reads the text)")
        for ax in (line_ax, map_ax):
            log_steps(ax, edges[-1])
    kind = f"meta steps in {settings.get('hybrid_ratio', 0) * (1 - settings.get('meta_start', 0)):.1%} of updates" if settings.get("meta") else "vanilla"
    figure.suptitle(f"{settings['name']}: {settings['size']}, {kind}, {last:,} of {settings['steps']:,} updates, seed {settings.get('seed', 0)}")


def new_figure(width=15.0, height=8.0):
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    return Figure(figsize=(width, height), layout="constrained")


class Artist:
    """Draws a running job's dynamics.png, so seldom that it costs less than 1 % of the time."""

    def __init__(self, folder):
        self.folder, self.drawn, self.cost = folder, -math.inf, 0.0

    def draw(self, lines, settings, last=False):
        started = time.perf_counter()
        if last or started - self.drawn > 100 * self.cost:
            figure = new_figure()
            draw_dynamics(figure, lines, settings)
            save_figure(figure, self.folder / "dynamics.png")
            self.drawn = time.perf_counter()
            self.cost = self.drawn - started


# ---- the command -------------------------------------------------------------------------------------------

def follow(folder, every=2.0):
    """Redraw a running job's picture whenever its log has grown: in a window, or, where there is no display, in
    dynamics.png until the run is over."""
    import matplotlib.pyplot as plt
    windowed = plt.get_backend().lower() not in ("agg", "pdf", "svg", "ps", "template", "cairo")
    settings = read_settings(folder)
    if not windowed:
        print(f"no display here: rewriting {folder / 'dynamics.png'} until the run is over (Ctrl-C ends it)")
    plt.rcParams["figure.raise_window"] = False  # or it would come to the front at every look
    figure = plt.figure(f"{settings['name']}, live", figsize=(15, 8), layout="constrained") if windowed else None
    seen, over = -1, False
    while plt.fignum_exists(figure.number) if windowed else not over:
        log = folder / "metrics.jsonl"
        if log.exists() and log.stat().st_size != seen:
            seen = log.stat().st_size
            lines, _ = read_metrics(log)
            over = any("val_loss" in line and line["step"] >= settings["steps"] for line in lines)
            if windowed:
                figure.clear()
                draw_dynamics(figure, lines, settings)
            elif lines:
                Artist(folder).draw(lines, settings, last=True)
        if windowed:
            plt.pause(every)
        elif not over:
            time.sleep(every)


def main():
    parser = Parser(description="Pictures and phases of one run (dynamics.png and phases.json in its folder), or the comparison of several.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; runs that differ only in their seed are grouped, "
                        "and later groups are compared with the first")
    parser.add_argument("--live", action="store_true", help="a window that follows one running job")
    parser.add_argument("--out", type=Path, default=Path("compare"), help="folder for compare.png and compare.json (default: compare)")
    args = parser.parse_args()
    from report import compare, comparison_table, draw_comparison, group_runs, phase_count_table, phase_counts  # made of this file's parts
    try:
        if args.live:
            if len(args.runs) > 1:
                parser.error("--live follows one run")
            follow(args.runs[0])
            return
        args.runs = list({folder.resolve(): folder for folder in args.runs}.values())
        runs = [read_run(folder) for folder in args.runs]
        for note in (note for *_, notes in runs for note in notes):
            print(f"note: {note}", file=sys.stderr)
        found = []  # (settings, phases)
        for folder, (settings, lines, _) in zip(tqdm(args.runs, unit="run", disable=None if len(runs) > 1 else True), runs):
            Artist(folder).draw(lines, settings, last=True)
            found.append((settings, phases(lines)))
            write_atomically(folder / "phases.json", json.dumps(found[-1][1], indent=1))
        if len(runs) == 1:
            print(f"{settings['name']}\n{phase_table(found[0][1])}\n\nwritten: {folder / 'dynamics.png'}, {folder / 'phases.json'}")
        else:
            groups = group_runs([(settings, lines) for settings, lines, _ in runs])
            result = compare(groups) | {"phases": phase_counts(group_runs(found))}
            args.out.mkdir(parents=True, exist_ok=True)
            write_atomically(args.out / "compare.json", json.dumps(result, indent=1))
            figure = new_figure(18, 8)
            draw_comparison(figure, groups, result)
            save_figure(figure, args.out / "compare.png")
            print(f"{comparison_table(result)}\n{phase_count_table(result['phases'])}\n\nwritten: {args.out / 'compare.png'}, {args.out / 'compare.json'}")
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
