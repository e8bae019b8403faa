"""What a run has written, whole, damaged or missing."""
import json
import math

import pytest

from made_up_runs import made_up_run
from plumbing.commands import UserError
from plumbing.logs import layer_series, read_run, read_settings, series


def write_run(folder, settings, log):
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text(log)


def as_log(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_settings_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"size": "11m", "vocab_size": 4096}')
    assert read_settings(tmp_path) == {"size": "11m", "vocab_size": 4096, "name": tmp_path.name,
                                       "steps": 0, "seed": 0}
    settings = {"size": "11m", "vocab_size": 4096, "lr": 0.5, "steps": 7, "name": "mine",
                "seed": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_settings(tmp_path) == settings


def test_damaged_logs_are_read_as_far_as_whole(tmp_path):
    settings, lines = made_up_run("v", 1)
    lines[4]["val_loss"] = math.nan
    torn = '[1, 2]\n{"step": "x"}\nnull\n{"step": 1010, "val_lo'
    write_run(tmp_path, settings, as_log(lines) + torn)
    _, read, notes = read_run(tmp_path)
    assert len(read) == len(lines)
    assert len(notes) == 1
    assert "4 unreadable lines" in notes[0]
    # There are 101 evaluations, and one of them is NaN.
    steps, losses = series(read, "val_loss")
    assert len(steps) == len(losses) == 100


def test_a_run_that_goes_on_is_said_to(tmp_path):
    settings, lines = made_up_run("v", 1)
    write_run(tmp_path, settings, as_log(lines[:21]))
    read_back, read, notes = read_run(tmp_path)
    assert read_back == settings
    assert read == lines[:21]
    assert len(notes) == 1
    assert "running or stopped, at update 100 of 1000" in notes[0]


def test_a_log_without_an_evaluation_is_refused(tmp_path):
    settings, lines = made_up_run("v", 1)
    write_run(tmp_path, settings, as_log(lines[1:2]))
    with pytest.raises(UserError, match="no evaluation"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no evaluation"):
        read_run(tmp_path)


def test_series_passes_over_what_is_no_figure():
    """Lines without the figure, values that are not finite, and those of another shape."""
    lines = [{"step": 0, "cost": 5, "probe": {"rank": [1, 2]}}, {"step": 1, "cost": 6},
             {"step": 2, "cost": 7, "probe": {"rank": [3, None]}},
             {"step": 3, "cost": 8, "probe": {"rank": [3, 4, 5]}},
             {"step": 4, "cost": 9, "probe": 1.0}, {"step": 5, "cost": 10, "probe": {"rank": []}},
             {"step": 6, "cost": 11, "probe": {"rank": [[1], [2, 3]]}},
             {"step": 7, "cost": 12, "probe": {"rank": [6, 7]}}]
    steps, values = series(lines, "probe", "rank")
    assert steps.tolist() == [0, 7]
    assert values.tolist() == [[1, 2], [6, 7]]
    costs, _ = series(lines, "probe", "rank", x="cost")
    assert costs.tolist() == [5, 12]


def test_layers_beyond_all_decoders_are_no_probe():
    """The search for phases in so many would take minutes."""
    for layers, probes in ((12, 2), (5000, 0)):
        lines = [{"step": step, "probe": [1.0] * layers} for step in (1, 2)]
        assert len(layer_series(lines, "probe")[0]) == probes
