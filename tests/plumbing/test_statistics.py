"""Spreads and intervals, against worked examples and against what they are estimates of."""
import math

import numpy as np
import pytest

from ner import f1_of
from plumbing.statistics import bootstrap, in_words, interval, mean_and_spread


def test_interval_is_students_or_the_bootstraps():
    """Against Student's own example (1908): the extra hours of sleep of ten patients, with mean
    1.58 and 95 % interval from 0.70 to 2.46."""
    sleep = np.array([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert interval(sleep, None) == pytest.approx((1.58, 0.70, 2.46), abs=0.005)
    assert interval(np.array([3.0]), np.arange(1001)) == pytest.approx((3.0, 25.0, 975.0))


def test_spread_is_the_samples_and_what_is_unknown_stays_so():
    assert mean_and_spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "sd": pytest.approx(7 ** 0.5)}
    assert mean_and_spread([2.5]) == {"mean": 2.5, "sd": None}
    by_layer = mean_and_spread([[1.0, 4.0], [3.0, math.nan]])
    assert by_layer == {"mean": [2.0, None], "sd": [pytest.approx(2 ** 0.5), None]}
    assert in_words(mean_and_spread([1.0, 2.0, 6.0]), "{:.2f}") == "3.00 +- 2.65"
    assert in_words(mean_and_spread([2.5]), "{:.2f}") == "2.50"


# ---- the bootstrap -----------------------------------------------------------------------------

def two_taggers():
    """Counts (seeds, S, 3) of two taggers: the second finds a quarter of what the first misses."""
    first = np.random.default_rng(0).integers(0, 3, size=(3, 400, 3))
    second = first.copy()
    second[:, ::4, 0] += second[:, ::4, 2]
    second[:, ::4, 2] = 0
    return first, second


def mean_f1(counts):
    """F1, mean over seeds, of counts (seeds, S, 3)."""
    return f1_of(counts.sum(axis=1)).mean()


def test_bootstrap_pairs_sentences():
    first, second = two_taggers()
    # Whatever is drawn, it is drawn for both.
    assert not bootstrap(first, first, f1_of).any()
    draws = bootstrap(first, second, f1_of)
    assert draws.shape == (1000,)
    assert draws.mean() == pytest.approx(mean_f1(second) - mean_f1(first), abs=0.003)
    assert 0 < draws.min()
    assert 0.005 < draws.std() < 0.02
    np.testing.assert_array_equal(draws, -bootstrap(second, first, f1_of))


def test_bootstrap_pairs_seeds():
    first, second = two_taggers()
    spread = bootstrap(first, second, f1_of).std()
    # Seeds that differ add to the spread.
    by_seed = np.stack([first[0], second[0]])
    draws = bootstrap(by_seed[::-1], by_seed, f1_of)
    assert draws.std() > 3 * spread
    # Another treebank meets the same draws of seeds.
    other = bootstrap(by_seed[::-1, :300], by_seed[:, :300], f1_of)
    assert np.corrcoef(draws, other)[0, 1] > 0.8
