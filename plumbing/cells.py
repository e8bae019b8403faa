"""The results of ner.py: one cell for each run, training treebank, mode, seed and test treebank.

The cells are stored in ner.json, a list of dicts. Each records the settings it was computed with,
so that a stopped job continues where it was and never mixes results of different settings.
"""
import itertools
import json
from pathlib import Path

import numpy as np

from plumbing.checkpoints import fingerprint
from plumbing.commands import UserError
from plumbing.files import parse_json, read_file, write_atomically
from plumbing.text import digest

# The keys that identify a cell.
KEY = ("run", "train", "mode", "seed", "test")
FILE = "ner.json"
# The fields that are read from a cell, and their types.
KINDS = {"run": str, "train": str, "mode": str, "seed": int, "test": str, "settings": dict,
         "f1": float | int, "sentences": int, "counts": list, "auc": float | int,
         "slope": float | int, "t90": float | int | None}


def read_cells(folder):
    """{(run, train, mode, seed, test): cell} of the ner.json in a folder; {} if there is none.
    Raises UserError if it holds anything else."""
    path = Path(folder) / FILE
    if not path.exists():
        return {}
    content = parse_json(read_file(path), path)
    if not (isinstance(content, list) and all(map(is_cell, content))):
        raise UserError(f"{path} is not a list of result cells: move it away, or choose another "
                        "--out")
    return {tuple(cell[key] for key in KEY): cell for cell in content}


def is_cell(cell):
    """Whether a value has all fields of a cell, with the right types."""
    if not isinstance(cell, dict):
        return False
    if not all(isinstance(cell.get(key), kind) for key, kind in KINDS.items()):
        return False
    try:
        counts = np.array(cell["counts"])
    except ValueError:
        return False
    if counts.dtype.kind != "i" or counts.shape != (cell["sentences"], 3):
        return False
    return (counts >= 0).all() and 0 <= cell["f1"] <= 1


def write_cells(cells, folder):
    lines = ",\n".join(map(json.dumps, cells.values()))
    write_atomically(Path(folder) / FILE, f"[{lines}]\n")


def predictions_path(folder, cell):
    run, train, mode, seed, test = cell
    return Path(folder) / f"{run}__{train}__{mode}__seed{seed}__{test}.tsv"


def write_predictions(folder, cell, sentences, predicted):
    """Write `word TAB gold TAB predicted` lines, with a blank line between sentences."""
    blocks = []
    for sentence, tags in zip(sentences, predicted):
        rows = zip(sentence.words, sentence.tags, tags)
        blocks.append("\n".join("\t".join(row) for row in rows))
    write_atomically(predictions_path(folder, cell), "\n\n".join(blocks) + "\n")


def cells_to_compute(args, models, treebanks, cells, rates):
    """{(run, train, mode, seed, test): settings} of the cells that are still missing.

    models is {run: (decoder, encoding)}, rates {(run, mode): learning rate}. The settings are all
    that a result depends on. Raises UserError if a finished cell was computed with other ones."""
    weights = {run: fingerprint(decoder.state_dict())[:16]
               for run, (decoder, _) in models.items()}
    texts = {key: digest(json.dumps(sentences)).hex()[:16]
             for key, sentences in treebanks.items()}
    missing = {}
    for cell in itertools.product(models, args.train, args.mode, range(args.seeds), args.test):
        run, train, mode, _, test = cell
        settings = {"epochs": args.epochs, "batch_size": args.batch_size, "max_len": args.max_len,
                    "lr": rates[run, mode], "checkpoint": weights[run],
                    "train": texts[train, "train"], "dev": texts.get((train, "dev")),
                    "test": texts[test, "test"],
                    # fixed now; earlier versions had flags for these
                    "subtoken": "first", "strict": False}
        if cell in cells:
            sentences = len(treebanks[test, "test"])
            check_same(cell, cells[cell]["settings"] | {"sentences": cells[cell]["sentences"]},
                       settings | {"sentences": sentences}, args.out)
        no_predictions = args.predictions and not predictions_path(args.out, cell).exists()
        if cell not in cells or no_predictions:
            missing[cell] = settings
    return missing


def check_same(cell, old, new, folder):
    differing = [f"{key} {str(old.get(key))[:40]} there, {new[key]} now"
                 for key in new if old.get(key) != new[key]]
    if differing:
        name = " ".join(map(str, cell))
        raise UserError(f"{folder}/{FILE} has {name} with other settings "
                        f"({', '.join(differing)}): choose another --out")
