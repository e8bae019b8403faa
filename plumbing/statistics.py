"""Spread over seeds, and intervals for differences."""
import math

import numpy as np

# The 97.5 % quantiles of Student's t with 1, 2, ... 9 degrees of freedom. The last is a safe
# choice for more.
STUDENT = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def mean_and_spread(values):
    """{"mean", "sd"} over the first dimension of values, numbers or lists of numbers. sd is the
    sample standard deviation, None for a single value. NaN becomes None."""
    values = np.array(values, dtype=float)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else None
    return {"mean": without_nan(values.mean(axis=0)), "sd": without_nan(spread)}


def without_nan(numbers):
    """Plain numbers for JSON: a float or a list of floats, with None for NaN."""
    if numbers is None:
        return None
    if numbers.ndim == 0:
        return float(numbers)
    return [None if math.isnan(number) else float(number) for number in numbers]


def in_words(entry, form):
    """A mean and its spread as text, such as "3.48 +- 0.01"; form is a format such as "{:.2f}"."""
    text = form.format(entry["mean"])
    if entry["sd"] is not None:
        text += f" +- {form.format(entry['sd'])}"
    return text


def interval(values, draws):
    """(mean, low, high), a 95 % interval for the mean difference of n pairs of runs, values (n,).

    It uses Student's t, since pretraining seeds differ more than anything else. For a single pair
    it uses bootstrap draws (R,) of its difference, which do not cover other seeds."""
    if len(values) == 1:
        return values[0], *np.percentile(draws, [2.5, 97.5])
    t = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    half = t * np.std(values, ddof=1) / len(values) ** 0.5
    return np.mean(values), np.mean(values) - half, np.mean(values) + half


def bootstrap(first, second, f1_of, resamples=1000):
    """(resamples,) differences of F1, mean over seeds, a second tagger minus a first, from their
    counts (seeds, S, 3) for each sentence. f1_of turns counts (..., 3) into F1 (...).

    Sentences and seeds are drawn with replacement, the same for both (Koehn 2004)."""
    seeds, n, _ = first.shape
    rng = np.random.default_rng(0)
    # The seeds are drawn first, so they are the same for all test treebanks.
    drawn = rng.integers(seeds, size=(resamples, seeds))
    # (resamples, S): how often each sentence is drawn
    times = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    f1 = [f1_of(np.tensordot(times, counts, axes=(1, 1))) for counts in (first, second)]
    return np.take_along_axis(f1[1] - f1[0], drawn, axis=1).mean(axis=1)
