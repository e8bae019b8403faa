"""Phases: made-up curves whose rises and falls are known, and what is counted over runs."""
import numpy as np
import pytest

from plumbing.phases import (
    CURVES, FEWEST_PROBES, hump, noise_level, phase, phase_count_table, phase_counts, phase_table,
    phases, smooth)

STEPS = np.array([0, 1, 2, 4, 8, 16, 32, 64, *range(100, 2001, 100)])
# Time, from 0 to 1, at each of STEPS.
TIME = np.linspace(0, 1, len(STEPS))


# ---- one curve ---------------------------------------------------------------------------------

def noise(seed, rho=0.5):
    """Noise (S,) for STEPS, from 0 on, with autocorrelation rho."""
    rng = np.random.default_rng(seed)
    values = [0.0]
    for _ in STEPS[1:]:
        values.append(rho * values[-1] + rng.normal())
    return np.array(values)


@pytest.mark.parametrize("peak, start, verdict", [(12, 0.5, "falls, rises, falls"),
                                                  (18, 0.02, "rises and falls")])
def test_a_known_rise_and_fall_is_recovered(peak, start, verdict):
    """The curve falls from its start to the fourth probe, rises by 3 to its peak, and falls by
    2.25 up to the 25th."""
    x = np.arange(len(STEPS))
    curve = 5 + 3 * np.interp(x, [0, 3, peak, 24, 27], [start, 0, 1, 0.25, 0.25])
    found = phase(STEPS, curve + 0.02 * noise(peak))
    assert found["verdict"] == verdict
    assert STEPS[2] <= found["bottom"] <= STEPS[4]
    assert STEPS[peak - 1] <= found["peak"] <= STEPS[peak + 1]
    assert STEPS[22] <= found["reconverged"] <= STEPS[25]
    assert found["rise"] == pytest.approx(3, abs=0.6)
    assert found["fall"] == pytest.approx(2.25, abs=0.5)
    mirrored = phase(STEPS, -curve + 0.02 * noise(peak))
    assert mirrored["trough"] in STEPS[peak - 1:peak + 2]


@pytest.mark.parametrize("curve, word", [(TIME, "rises"), (1 - np.exp(-4 * TIME), "rises"),
                                         (-TIME, "falls"), (0 * TIME, "flat")])
def test_monotone_curves_have_no_turn(curve, word):
    assert phase(STEPS, curve)["verdict"] == word


@pytest.mark.parametrize("curve, word", [(TIME, "rises"), (1 - np.exp(-4 * TIME), "rises"),
                                         (-TIME, "falls")])
def test_false_alarms_are_rare(curve, word):
    """Monotone curves with autocorrelated noise."""
    verdicts = [phase(STEPS, curve + 0.04 * noise(seed))["verdict"] for seed in range(40)]
    assert verdicts.count(word) >= 38


def test_noise_alone_has_no_hump():
    """Nearly all of its humps are higher than an eighth of its range, so the noise has to tell."""
    curves = [noise(seed, rho=0) for seed in range(40)]
    verdicts = [phase(STEPS, curve)["verdict"] for curve in curves]
    assert verdicts.count("rises") + verdicts.count("falls") >= 39


def test_a_deep_dip_with_a_sharp_fall_is_found():
    """The shape of the hidden states' rank in a short run: 86 to 40 within a few probes, then
    slowly back to 58."""
    x = np.arange(len(STEPS))
    curve = np.interp(x, [0, 4, 8, 27], [86, 84, 40, 58]) + 0.5 * noise(3)
    assert phase(STEPS, curve)["verdict"] == "falls and rises"


def test_the_noise_level_is_a_standard_deviation():
    """Of independent noise, also on a trend with a jump."""
    rng = np.random.default_rng(0)
    values = 3 * rng.normal(size=4000)
    assert noise_level(values) == pytest.approx(3, rel=0.05)
    trend = np.linspace(0, 50, 4000) + 100 * (np.arange(4000) > 2000)
    assert noise_level(values + trend) == pytest.approx(3, rel=0.05)


def test_smoothing_is_a_mean_of_three_and_of_two_at_the_ends():
    smoothed = smooth(np.array([1.0, 2.0, 6.0, 4.0]))
    assert smoothed.tolist() == pytest.approx([1.5, 3, 4, 5])


def test_the_highest_hump_is_found():
    """Its height is the smaller of rise and fall."""
    values = np.array([2.0, 1, 4, 3, 0, 3, 9, 8.5, 5, 7])
    assert hump(values) == (4, 4, 6, 8)
    assert hump(np.array([1.0, 2, 3]))[0] == 0


# ---- a run -------------------------------------------------------------------------------------

def probe_lines(n):
    """A log of n probes of two layers. The rank of the first rises and then falls, that of the
    second falls; each layer has two heads, of which one is even and one rises."""
    lines = []
    for i, t in enumerate(np.linspace(0, 1, n)):
        ranks = [4 * t * (1 - t), -t]
        heads = [[0.5, t], [0.5, 0.5]]
        lines.append({"step": 10 * i, "effective_rank": {"hidden": ranks},
                      "head_entropy": {"normalised": heads}})
    return lines


def test_phases_of_a_log():
    lines = probe_lines(21)
    found = phases(lines)
    assert set(found) == {"rank of hidden states", "head entropy"}
    first, second = found["rank of hidden states"]
    assert (first["verdict"], first["bottom"], first["peak"]) == ("rises and falls", 0, 100)
    assert second["verdict"] == "falls"
    # The entropy of a layer is the mean of its heads.
    verdicts = [layer["verdict"] for layer in found["head entropy"]]
    assert verdicts == ["rises", "flat"]
    table = phase_table(found)
    assert "1 of 2 layers rise and then fall; first to peak: layers 0;" in table
    assert "  layer 0          rises and falls (from update 0; peak at 100," in table
    assert "no layer of 2 rises and then falls" in table
    # Neighbours that do the same share a row.
    alike = phase_table({"head entropy": found["head entropy"] + 2 * [found["head entropy"][1]]})
    assert "  layers 1 to 3    flat" in alike
    assert phases(lines[:FEWEST_PROBES - 1]) == {}
    assert "too few" in phase_table({})


# ---- groups of runs ----------------------------------------------------------------------------

def run_of(*verdicts):
    """(settings, phases) of a run whose layers' entropy has these verdicts."""
    return {}, {"head entropy": [{"verdict": verdict} for verdict in verdicts]}


def test_phases_are_counted_over_seeds():
    """Three layers and two seeds, counted by hand; a group in which a run lacks a curve (too few
    probes) is left out of it."""
    groups = {
        "v": [run_of("rises and falls", "rises", "falls and rises"),
              run_of("falls, rises, falls", "rises and falls", "flat")],
        "m": [run_of("rises, falls, rises", "falls", "flat")],
        "early": [({}, {})]}
    counts = phase_counts(groups)
    assert set(counts) == set(CURVES)
    assert not counts["rank of hidden states"]
    assert counts["head entropy"] == {
        "v": {"rise and fall": {"mean": 1.5, "sd": pytest.approx(0.5 ** 0.5)},
              "fall and rise": {"mean": 1.0, "sd": 0.0}},
        "m": {"rise and fall": {"mean": 1.0, "sd": None},
              "fall and rise": {"mean": 1.0, "sd": None}}}
    table = phase_count_table(counts).splitlines()
    row, = [line for line in table if line.startswith("head entropy")]
    assert row.split() == ["head", "entropy", "v", "1.5", "+-", "0.7", "1.0", "+-", "0.0"]
