"""Phases of a curve: does it rise and then fall by more than noise would?

The paper's claim is that rank and entropy first rise ("fan out") and then fall ("collapse"). A
curve is smoothed by a running mean of three. It counts as rising and falling if the smaller of the
two is more than an eighth of the curve's range and more than four times its noise. This is a rule,
not a significance test: whether other seeds show the same says more.
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
# How large a rise and fall must be: this share of the curve's range, and this many times its noise.
# In 200 simulated curves of 28 points (trends with noise of 5 % of their range, or noise alone),
# 0 to 2 % had such a rise and fall by chance if the noise was independent, and 0 to 10 % if
# neighbours had a correlation of 0.3.
SMALLEST_SHARE, SMALLEST_RATIO = 1 / 8, 4


# ---- one curve ---------------------------------------------------------------------------------

def smooth(values):
    """Running mean of three of the values (S,), and of two at the ends."""
    padded = np.concatenate([[np.nan], values, [np.nan]])
    return np.nanmean(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)


def noise_level(values):
    """The standard deviation of independent noise in values (S,), estimated from their distances
    to the running mean of three. The median ignores the few points where a curve turns sharply."""
    distances = np.abs(values - smooth(values))[1:-1]
    # A normal variable's standard deviation is 1.48 times the median of its distance from 0. The
    # distance to the mean of three has 2/3 of the noise's variance.
    return 1.4826 * np.median(distances) / (2 / 3) ** 0.5


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


def phase(steps, values):
    """The phases of a curve, values (S,) at steps (S,), as a dict.

    bottom, peak   the steps where the rise begins and ends
    reconverged    the step at which 90 % of the fall is done
    rise, fall     their sizes
    trough         the lowest point of the opposite, a fall and then a rise
    verdict        in words; "rises" and "falls" mean that there is no clear turn
    """
    smoothed = smooth(values)
    height, bottom, peak, end = hump(smoothed)
    depth, _, trough, _ = hump(-smoothed)
    spread = np.ptp(smoothed)
    smallest = max(SMALLEST_SHARE * spread, SMALLEST_RATIO * noise_level(values))
    humped, dipped = height > smallest, depth > smallest
    if humped and dipped:
        verdict = "rises, falls, rises" if peak < trough else "falls, rises, falls"
    elif humped:
        verdict = "rises and falls"
    elif dipped:
        verdict = "falls and rises"
    elif spread < 1e-9:
        verdict = "flat"
    else:
        verdict = "rises" if smoothed[-1] > smoothed[0] else "falls"
    fall = smoothed[peak] - smoothed[end]
    fallen = smoothed[peak] - smoothed[peak:end + 1] >= 0.9 * fall
    return {"bottom": int(steps[bottom]), "peak": int(steps[peak]),
            "reconverged": int(steps[peak + int(fallen.argmax())]),
            "rise": float(smoothed[peak] - smoothed[bottom]), "fall": float(fall),
            "trough": int(steps[trough]), "verdict": verdict}


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
        return (f"no layer of {len(layers)} rises and then falls by more than an eighth of its "
                "range and four times its noise")
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
