"""Reading what a run has written: config.json and metrics.jsonl."""
import json
from pathlib import Path

import numpy as np

from plumbing.commands import UserError


def read_settings(folder):
    """The config.json of a run, a dict. Raises UserError if the folder holds no run."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / "config.json").read_text())
        settings |= {"size": str(settings["size"]),
                     "vocab_size": int(settings["vocab_size"]),
                     "name": str(settings.get("name", folder.name)),
                     "steps": int(settings.get("steps", 0)),
                     "seed": int(settings.get("seed", 0))}
        return settings
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise UserError(f"{folder} is not a run: it has no readable config.json "
                        "(train.py makes runs)") from None


def read_metrics(path):
    """(lines, notes): the objects of a metrics.jsonl as far as it can be read, and a list of what
    was wrong with the rest. A run that was killed at once has no such file, and so no lines."""
    path, lines, unreadable = Path(path), [], 0
    if not path.exists():
        return [], []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
            lines.append(line)
        except (ValueError, KeyError, TypeError, OverflowError):
            unreadable += 1
    if not unreadable:
        return lines, []
    plural = "s" if unreadable > 1 else ""
    return lines, [f"{path}: {unreadable} unreadable line{plural} left out"]


def read_run(folder):
    """(settings, lines, notes) of a run, finished or not. Raises UserError if the folder holds no
    run, or one that has not been evaluated yet."""
    folder = Path(folder)
    settings = read_settings(folder)
    lines, notes = read_metrics(folder / "metrics.jsonl")
    if not any("val_loss" in line for line in lines):
        raise UserError(f"{folder} has no evaluation in its log yet")
    last = lines[-1]["step"]
    if last < settings["steps"]:
        notes.append(f"{folder}: running or stopped, at update {last} of {settings['steps']}")
    return settings, lines, notes


def layer_series(lines, *path):
    """A probe of each layer, (steps (S,), values (S, layers)). The entropy of a layer is the mean
    over its heads."""
    steps, values = series(lines, *path)
    if values.ndim == 3:
        values = values.mean(axis=2)
    return steps, values


def series(lines, *path, x="step"):
    """(x (S,), values (S, ...)) of one figure in the lines of a log, both float64.

    The path leads to the figure, as in series(lines, "effective_rank", "hidden"). Lines without
    it are passed over, and so are values that are not finite or not of the usual shape."""
    xs, values = [], []
    for line in lines:
        value = line
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        try:
            value = np.array(value, dtype=float)
        except (TypeError, ValueError):
            continue
        usable = value.size and np.isfinite(value).all()
        if usable and (not values or value.shape == values[0].shape):
            xs.append(line[x])
            values.append(value)
    return np.array(xs, dtype=float), np.array(values)
