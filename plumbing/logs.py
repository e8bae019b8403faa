"""Read what a run has written: config.json and metrics.jsonl."""
from pathlib import Path

import numpy as np

from plumbing.commands import LARGEST_NUMBER, UserError
from plumbing.files import parse_json, read_file

LARGEST_SETTINGS = 1_000_000  # bytes
# What is read from config.json. All but size and vocab_size may be missing.
SETTINGS = {"size": str, "vocab_size": int, "steps": int | None, "seed": int | None,
            "name": str | None, "meta": bool | None, "hybrid_ratio": float | int | None,
            "meta_start": float | int | None, "tokenizer": str | None,
            "corpus_sha256": str | None, "tokenizer_sha256": str | None, "data": str | None,
            "cache": str | None, "episode_len": int | None, "head": str | None,
            "inner": str | None, "inner_lr": float | int | None}
# The limits of the counts among them.
COUNTS = {"vocab_size": (2, 10 ** 7), "steps": (0, LARGEST_NUMBER), "seed": (0, LARGEST_NUMBER)}
LONGEST_NAME = 100
# What every line of the log must hold, and what lines of each kind must hold as well. All other
# values are numbers, or null where a figure was not finite, except for the OBJECTS.
COSTS = {"step": int, "tokens": float | int, "flops": float | int, "seconds": float | int}
FIGURES = {None: (), "lm": (), "meta": ("query_accuracy", "chance")}
OBJECTS = {"effective_rank", "proportional_effective_rank", "head_entropy"}
# No real figure is larger, and sums of such numbers stay finite.
LARGEST_FIGURE = 1e30
# No decoder has more. A damaged log must not keep the search for phases busy for minutes.
MOST_LAYERS = 100


def read_settings(folder):
    """The config.json of a run, a dict of plain values. Raises UserError if the folder holds no
    run."""
    folder = Path(folder)
    path = folder / "config.json"
    if not folder.exists():
        raise UserError(f"{folder} does not exist: check the name (train.py makes runs)")
    if not path.exists():
        raise UserError(f"{folder} is not a run: it has no config.json (train.py makes runs)")
    content = read_file(path, LARGEST_SETTINGS)
    settings = parse_json(content, f"{folder} is not a run: its config.json", SETTINGS)
    settings = {key: value for key, value in settings.items()
                if not (value is None or isinstance(value, dict | list))}
    settings = {"steps": 0, "seed": 0} | settings
    settings["name"] = printable(settings.get("name") or folder.resolve().name)
    settings["size"] = printable(settings["size"])
    for key, (low, high) in COUNTS.items():
        if not low <= settings[key] <= high:
            raise UserError(f"{folder} is not a run: the {key} in its config.json is invalid")
    return settings


def printable(name):
    """A name that terminals and pictures can show."""
    return (name if name.isprintable() else ascii(name)[1:-1])[:LONGEST_NAME]


def read_metrics(path):
    """(lines, notes): the objects of a metrics.jsonl that can be read, and a list of notes about
    the rest. A run that was killed at once has no such file, and so no lines."""
    path, lines, unreadable = Path(path), [], 0
    if not path.exists():
        return [], []
    for text in read_file(path).splitlines():
        try:
            line = parse_json(text, path, COSTS | {"kind": str | None})
        except UserError:
            line = None
        if line and is_log_line(line):
            lines.append(line)
        else:
            unreadable += 1
    if not unreadable:
        return lines, []
    plural = "s" if unreadable > 1 else ""
    return lines, [f"{path}: {unreadable} unreadable line{plural} left out"]


def is_log_line(line):
    """Whether an object that has the COSTS is a valid line of the log."""
    kind = line.get("kind")
    if not 0 <= line["step"] <= LARGEST_NUMBER or kind not in FIGURES:
        return False
    if any(line.get(key) is None for key in FIGURES[kind]):
        return False
    for key, value in line.items():
        is_number = isinstance(value, int | float) and not abs(value) > LARGEST_FIGURE
        if not (is_number or value is None or key in OBJECTS or key == "kind"):
            return False
    return True


def read_run(folder):
    """(settings, lines, notes) of a run, finished or not. Raises UserError if the folder holds no
    run, or one that has not been evaluated yet."""
    folder = Path(folder)
    settings = read_settings(folder)
    lines, notes = read_metrics(folder / "metrics.jsonl")
    evaluations, _ = series(lines, "val_loss")
    if not len(evaluations):
        raise UserError(f"{folder} has no evaluation in its log yet: let it train first")
    last = lines[-1]["step"]
    if last < settings["steps"]:
        notes.append(f"{folder}: running or stopped, at update {last} of {settings['steps']}")
    return settings, lines, notes


def layer_series(lines, *path):
    """A probe, layer by layer: (steps (S,), values (S, layers)). The entropy of a layer is the mean
    over its heads."""
    steps, values = series(lines, *path)
    if values.ndim == 3:
        values = values.mean(axis=2)
    if values.ndim != 2 or values.shape[1] > MOST_LAYERS:
        return np.zeros(0), np.zeros((0, 0))
    return steps, values


def series(lines, *path, x="step"):
    """(x (S,), values (S, ...)) of one figure in the lines of a log, both float64.

    The path leads to the figure, as in series(lines, "effective_rank", "hidden"). Lines without
    it are skipped, and so are values that are not finite or not of the first one's shape."""
    xs, values = [], []
    for line in lines:
        value = line
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        try:
            value = np.array(value, dtype=float)
        except (TypeError, ValueError, OverflowError, RecursionError):
            continue
        usable = (value.size and (np.abs(value) < LARGEST_FIGURE).all()
                  and line.get(x) is not None)
        if usable and (not values or value.shape == values[0].shape):
            xs.append(line[x])
            values.append(value)
    return np.array(xs, dtype=float), np.array(values)
