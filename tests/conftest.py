"""Shared by all tests: a small generated text, its corpus, and a way to run the scripts."""
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # these models are too small for more: two took a fifth longer

import data  # noqa: E402
import model  # noqa: E402
import text  # noqa: E402

# Scripts run in processes forked from one that has imported what they import: that saves each of them three seconds.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["MPLBACKEND"] = "agg"
os.environ["OMP_NUM_THREADS"] = "1"
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "matplotlib.figure", "matplotlib.backends.backend_agg", "ner", "meta", "report"])


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
def gpt2(monkeypatch):
    """A stand-in for GPT-2's vocabulary, which is not here without a network: bytes, pairs of letters, and numbers to fill it."""
    tokens = [bytes([i]) for i in range(256)] + [b" " + bytes([a, b, c]) for a in range(97, 123) for b in range(97, 123) for c in range(97, 123)]
    tokens += [b"\xff%d" % i for i in range(50256 - len(tokens))]
    encoding = tiktoken.Encoding("gpt2", pat_str=text.PATTERN, mergeable_ranks={token: i for i, token in enumerate(tokens)},
                                 special_tokens={data.END: 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


@pytest.fixture
def tiny():
    """A decoder small enough for float64 derivatives."""
    config = model.Config(d_model=24, vocab_size=50, n_layer=2, n_head=6, n_kv_head=2, context=64)
    return model.Decoder(config, torch.Generator().manual_seed(0)).double()


def run_in_child(path, flags, folder, output, environment):
    """What `python path flags` does in folder, with its output in the files output.1 and output.2."""
    os.chdir(folder)
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


class Job:
    """A script that runs by itself; finish() waits for it."""

    def __init__(self, name, flags, folder, output, environment):
        self.args, self.output = [str(ROOT / name), [str(flag) for flag in flags]], output
        self.process = processes.Process(target=run_in_child, args=(*self.args, folder, str(output), environment))
        self.process.start()

    def finish(self, timeout=200):
        """A CompletedProcess with the exit code (-9 if killed) and the output; a job that takes too long is an error."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        texts = [Path(f"{self.output}.{stream}") for stream in (1, 2)]  # not there if it was killed before it began
        return subprocess.CompletedProcess(self.args, self.process.exitcode, *(text.read_text() if text.exists() else "" for text in texts))


SMALL = ("--vocab-size", 2048, "--batch-size", 4, "--seq-len", 32, "--n-way", 4, "--k-shot", 2, "--n-query", 2, "--episode-len", 16)


@pytest.fixture(scope="session")
def start_in(text_file, cache, tmp_path_factory):
    """start_in(folder, name, *flags) -> a running Job of a script, in folder; train.py gets the small text by default."""
    jobs, outputs = [], tmp_path_factory.mktemp("output")

    def start_job(folder, name, *flags, small=True, **environment):
        if name == "train.py":
            flags = ("--cache", cache, *(("--data", text_file, *SMALL) if small else ()), *flags)
        jobs.append(Job(name, flags, folder, outputs / str(len(jobs)), environment))
        return jobs[-1]
    yield start_job
    for job in jobs:
        job.process.kill()


@pytest.fixture
def start(start_in, tmp_path):
    """start(name, *flags) -> a running Job, in an empty folder."""
    return functools.partial(start_in, tmp_path)


@pytest.fixture
def script(start):
    """script(name, *flags) -> CompletedProcess."""
    return lambda *args, **kwargs: start(*args, **kwargs).finish()


@pytest.fixture
def train_here(monkeypatch, tmp_path, cache, text_file):
    """train_here(*flags) -> train.train's exit code, on the small text, in an empty folder and in this process; or, with main=True, all of train.main."""
    import train
    monkeypatch.chdir(tmp_path)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(*flags, main=False):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, ("--data", text_file, "--cache", cache, *SMALL, "--quiet", *flags))])
        return train.main() if main else train.train(train.parse()[0])
    yield run
    for number, handler in handlers:
        signal.signal(number, handler)
