"""Phases of a curve: does it rise and then fall by more than noise would?

The paper's claim is that rank and entropy first rise ("fan out") and then fall ("collapse"). A
curve counts as rising and falling if curves that only rise or only fall, with the same kind of
noise, show so high a hump in fewer than one of 200 cases, and if the hump is not small. The test
is meant for curves with a clear trend. In autocorrelated noise alone it finds too many humps.
"""
import itertools

import numpy as np

from plumbing.logs import layer_series
from plumbing.statistics import in_words, mean_and_spread

# curve -> its place in a line of the log
CURVES = {
    "rank of hidden states": ("effective_rank", "hidden"),
    "rank of attention weights": ("effective_rank", "attention"),
    "rank of MLP weights": ("effective_rank", "mlp"),
    "head entropy": ("head_entropy", "normalised"),
}
# The number of probes that phases need. A shorter run would show only its first hump.
FEWEST_PROBES = 12
TOO_EARLY = f"fewer than {FEWEST_PROBES} probes: too few for phases"
# Of 40 monotone curves with noise of 5 % of their range and autocorrelation 0.6, none passes both
# limits. With 1/20 of the range as the second limit, one in six does.
LARGEST_P = 0.005
SMALLEST_SHARE = 1 / 8  # of a curve's range
# How many curves are simulated for one test.
DRAWS = 400


# ---- one curve ---------------------------------------------------------------------------------

def smooth(values):
    """Running mean of three of the values (S,), and of two at the ends."""
    padded = np.concatenate([[np.nan], values, [np.nan]])
    return np.nanmean(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)


def rising_fit(values):
    """The least-squares fit to values (S,) that never falls, by pooling adjacent violators (Ayer
    et al. 1955)."""
    blocks = []  # [mean, size]
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, size = blocks.pop()
            before, before_size = blocks[-1]
            total = before_size + size
            blocks[-1] = [(before * before_size + mean * size) / total, total]
    if not blocks:
        return values
    return np.concatenate([np.full(size, mean) for mean, size in blocks])


def falling_fit(values):
    return -rising_fit(-values)


def hump(values):
    """(height, bottom, peak, end) of the largest rise and fall in values (S,).

    The last three are indices: the lowest point before the peak, the peak, and the lowest point
    after it. The height is the smaller of rise and fall."""
    lowest_before = np.minimum.accumulate(values)
    lowest_after = np.minimum.accumulate(values[::-1])[::-1]
    heights = values - np.maximum(lowest_before, lowest_after)
    peak = int(heights.argmax())
    bottom = int(values[:peak + 1].argmin())
    end = peak + int(values[peak:].argmin())
    return heights[peak], bottom, peak, end


def hump_test(values):
    """(height, bottom, peak, end, p) of the largest rise and fall in values (S,), smoothed.

    p is the probability of so high a hump if the true curve is monotone. Such curves are
    simulated: the best monotone fit, plus the noise of `resampled_noise`."""
    height, bottom, peak, end = hump(smooth(values))
    fits = [rising_fit(values), falling_fit(values)]
    errors = [((values - fit) ** 2).sum() for fit in fits]
    monotone = fits[int(np.argmin(errors))]
    higher = 0
    for noise in resampled_noise(values, bottom, peak, end):
        higher += hump(smooth(monotone + noise))[0] >= height
    return height, bottom, peak, end, (1 + higher) / (1 + DRAWS)


def resampled_noise(values, bottom, peak, end):
    """(DRAWS, S) of noise like that of values (S,): the residuals of a fit that falls, rises, falls
    and rises again, resampled in blocks that keep their autocorrelation (Kunsch 1989)."""
    n = len(values)
    fit = np.concatenate([falling_fit(values[:bottom]), rising_fit(values[bottom:peak]),
                          falling_fit(values[peak:end]), rising_fit(values[end:])])
    # The fit also follows the noise, so its residuals are too small and are scaled up.
    freedom = n - len(np.unique(fit))
    residuals = (values - fit) * n / max(1, freedom)
    size = max(3, n // 4)
    blocks = -(-n // size)
    starts = np.random.default_rng(0).integers(0, n, (DRAWS, blocks))
    places = (starts[:, :, None] + np.arange(size)) % n  # (DRAWS, blocks, size)
    return residuals[places.reshape(DRAWS, -1)[:, :n]]


def phase(steps, values):
    """The phases of a curve, values (S,) at steps (S,), as a dict.

    bottom, peak   the steps where the rise begins and ends
    reconverged    the step at which 90 % of the fall is done
    rise, fall     their sizes
    p              see hump_test
    trough, p_trough  the lowest point of the opposite, a fall and then a rise, and its p
    verdict        in words
    """
    smoothed = smooth(values)
    height, bottom, peak, end, p = hump_test(values)
    depth, _, trough, _, p_trough = hump_test(-values)
    spread = np.ptp(smoothed)
    humped = p < LARGEST_P and height > SMALLEST_SHARE * spread
    dipped = p_trough < LARGEST_P and depth > SMALLEST_SHARE * spread
    if humped and dipped:
        verdict = "rises, falls, rises" if peak < trough else "falls, rises, falls"
    elif humped:
        verdict = "rises and falls"
    elif dipped:
        verdict = "falls and rises"
    elif spread < 1e-9:
        verdict = "flat"
    else:
        verdict = "monotone, rising" if smoothed[-1] > smoothed[0] else "monotone, falling"
    fall = smoothed[peak] - smoothed[end]
    fallen = smoothed[peak] - smoothed[peak:end + 1] >= 0.9 * fall
    return {"bottom": int(steps[bottom]), "peak": int(steps[peak]),
            "reconverged": int(steps[peak + int(fallen.argmax())]),
            "rise": float(smoothed[peak] - smoothed[bottom]), "fall": float(fall), "p": float(p),
            "trough": int(steps[trough]), "p_trough": float(p_trough), "verdict": verdict}


def holds(verdict, shape):
    """Whether a verdict of `phase` contains the shape, "rises, falls" or "falls, rises"."""
    return shape in verdict.replace(" and ", ", ")


# ---- a run, and groups of runs -----------------------------------------------------------------

def phases(lines):
    """{curve: [phase of each layer]} of a run's log, for the curves with enough probes."""
    result = {}
    for name, path in CURVES.items():
        steps, values = layer_series(lines, *path)
        if len(steps) >= FEWEST_PROBES:
            result[name] = [phase(steps, layer) for layer in values.T]
    return result


def phase_table(run_phases):
    """The phases of a run in words: for each curve a sentence, then a row per layer."""
    if not run_phases:
        return TOO_EARLY
    lines = []
    for name, layers in run_phases.items():
        lines += ["", f"{name}: {who_is_first(layers)}"]
        rows = [in_a_row(found) for found in layers]
        first = 0
        for row, same in itertools.groupby(rows):  # neighbours with the same row share it
            last = first + len(list(same)) - 1
            which = f"layer {first}" if first == last else f"layers {first} to {last}"
            lines.append(f"  {which:<16} {row}")
            first = last + 1
    return "\n".join(lines)


def in_a_row(found):
    """The verdict on a layer and, for a rise and fall, the updates at which they happen."""
    if not holds(found["verdict"], "rises, falls"):
        return found["verdict"]
    return (f"{found['verdict']} (from update {found['bottom']:,}; peak at {found['peak']:,}, 90 % "
            f"of the fall by {found['reconverged']:,})")


def who_is_first(layers):
    """Which layers peak and reconverge first, in words."""
    humped = [i for i, found in enumerate(layers) if holds(found["verdict"], "rises, falls")]
    if not humped:
        return (f"no layer of {len(layers)} rises and then falls by more than noise "
                f"(p < {LARGEST_P}) and by more than an eighth of its range")
    by_peak = sorted(humped, key=lambda i: (layers[i]["peak"], layers[i]["reconverged"]))
    by_end = sorted(humped, key=lambda i: layers[i]["reconverged"])
    return (f"{len(humped)} of {len(layers)} layers rise and then fall; first to peak: layers "
            f"{', '.join(map(str, by_peak[:3]))}; first to reconverge: layers "
            f"{', '.join(map(str, by_end[:3]))}")


def phase_counts(groups):
    """In how many layers each curve rises and falls, or falls and rises, over the seeds of each
    group, {label: [(settings, phases)]}. A layer that does both counts as both.

    Returns {curve: {label: {"rise and fall": {mean, sd}, "fall and rise": {mean, sd}}}}. A group
    in which a run has too few probes is left out."""
    shapes = {"rise and fall": "rises, falls", "fall and rise": "falls, rises"}
    counts = {curve: {} for curve in CURVES}
    for curve in CURVES:
        for label, runs in groups.items():
            if not all(curve in run_phases for _, run_phases in runs):
                continue
            counts[curve][label] = {}
            for name, shape in shapes.items():
                layers = [count_layers(run_phases[curve], shape) for _, run_phases in runs]
                counts[curve][label][name] = mean_and_spread(layers)
    return counts


def count_layers(layers, shape):
    return sum(holds(found["verdict"], shape) for found in layers)


def phase_count_table(counts):
    """The result of phase_counts as a table."""
    if not any(counts.values()):
        return f"\n{TOO_EARLY}"
    lines = ["", most_humps(counts), " " * 48 + f"{'rise and fall':>16}{'fall and rise':>16}"]
    for curve, labels in counts.items():
        for i, (label, shapes) in enumerate(labels.items()):
            name = "" if i else curve
            figures = [f"{in_words(shape, '{:.1f}'):>16}" for shape in shapes.values()]
            lines.append(f"{name:<28}{label[:19]:<20}" + "".join(figures))
    return "\n".join(lines)


def most_humps(counts):
    """Which curve shows the paper's phases, a rise and then a fall, in most layers, in words."""
    found = [(shapes["rise and fall"]["mean"], curve, label)
             for curve, labels in counts.items() for label, shapes in labels.items()]
    layers, curve, label = max(found)
    where = f"in at most {layers:.2g} layers ({curve}, {label})" if layers else "in no layer"
    return (f"The paper's two phases, a rise and then a fall, are seen {where}. The number of "
            "layers with each shape (to see which layers: python probe.py RUN):")
