"""Shared by all tests: a small generated text, its corpus, and a way to run the scripts."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

import data  # noqa: E402
import model  # noqa: E402


def toy_text(sentences=9000, seed=0):
    """Sentences of a first-order chain over 260 made-up words: enough words in the frequency band for episodes."""
    rng = np.random.default_rng(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = sorted({"".join(rng.choice(syllables, 2 + i % 2)) for i in range(300)})[:260]
    likely = rng.integers(len(words), size=(len(words), 6))
    lines = []
    for _ in range(sentences):
        at, line = int(rng.integers(len(words))), []
        for _ in range(int(rng.integers(4, 10))):
            line.append(words[at])
            at = int(likely[at, rng.integers(6)]) if rng.random() < 0.8 else int(rng.integers(len(words)))
        lines.append("The " + " ".join(line) + ".")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "toy.txt"
    path.write_text(toy_text())
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(text_file, cache):
    return data.load(text_file, vocab_size=2048, cache=cache, quiet=True)


@pytest.fixture
def tiny():
    """A decoder small enough for float64 derivatives."""
    config = model.Config(d_model=24, vocab_size=50, n_layer=2, n_head=6, n_kv_head=2, context=64)
    return model.Decoder(config, torch.Generator().manual_seed(0)).double()


@pytest.fixture
def script(text_file, cache, tmp_path):
    """run(name, *flags) -> CompletedProcess of a script, in an empty folder; train.py gets the small text by default."""
    def run(name, *flags, small=True, timeout=200, **environment):
        if name == "train.py" and small:
            flags = ("--data", text_file, "--vocab-size", 2048, "--batch-size", 4, "--seq-len", 32, "--n-way", 4,
                     "--k-shot", 2, "--n-query", 2, "--episode-len", 16, *flags)
        if name == "train.py":
            flags = ("--cache", cache, *flags)
        return subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], cwd=tmp_path, text=True,
                              capture_output=True, timeout=timeout, env=os.environ | {"MPLBACKEND": "agg"} | environment)
    return run
