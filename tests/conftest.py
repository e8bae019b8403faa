"""What all tests share: a small generated text, its corpus, and a way to run the scripts."""
import functools
import itertools
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
from plumbing.tokenizer import END, PATTERN  # noqa: E402

# Scripts run in processes forked from one that has already imported what they import. That saves
# each of them three seconds. plumbing.processes is not in the list, nor is anything that imports
# it: it must read its environment variables in the new process.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["MPLBACKEND"] = "agg"
os.environ["OMP_NUM_THREADS"] = "1"
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([
    "torch", "matplotlib.figure", "matplotlib.backends.backend_agg", "data", "meta", "probe", "ner",
    "plumbing.pictures", "plumbing.huggingface", "plumbing.summary"])

# Flags for train.py that fit the small text.
SMALL = ("--vocab-size", 2048, "--batch-size", 4, "--seq-len", 32, "--n-way", 4, "--k-shot", 2,
         "--n-query", 2, "--episode-len", 16)


# ---- a small text ------------------------------------------------------------------------------

def toy_text(sentences=9000, seed=0):
    """Sentences of a first-order chain over 260 made-up words: enough words in the frequency band
    for episodes."""
    rng = np.random.default_rng(seed)
    syllables = [a + b for a, b in itertools.product("bdfgklmnprstvz", "aeiou")]
    words = set()
    for i in range(300):
        words.add("".join(rng.choice(syllables, 2 + i % 2)))
    words = sorted(words)[:260]
    likely = rng.integers(len(words), size=(len(words), 6))
    lines = []
    for _ in range(sentences):
        at, line = int(rng.integers(len(words))), []
        for _ in range(int(rng.integers(4, 10))):
            line.append(words[at])
            if rng.random() < 0.8:
                at = int(likely[at, rng.integers(6)])
            else:
                at = int(rng.integers(len(words)))
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
    """A stand-in for GPT-2's vocabulary, which is not here without a network: the bytes, a space
    with three letters, and numbers to fill it."""
    letters = b"abcdefghijklmnopqrstuvwxyz"
    tokens = [bytes([i]) for i in range(256)]
    tokens += [b" " + bytes(three) for three in itertools.product(letters, repeat=3)]
    tokens += [b"\xff%d" % i for i in range(50256 - len(tokens))]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={END: 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


@pytest.fixture
def tiny():
    """A decoder small enough for float64 derivatives."""
    config = model.Config(d_model=24, vocab_size=50, n_layer=2, n_head=6, n_kv_head=2, context=64)
    return model.Decoder(config, torch.Generator().manual_seed(0)).double()


# ---- scripts -----------------------------------------------------------------------------------

def run_in_child(path, flags, folder, output, environment):
    """What `python path flags` does in folder, with its output in the files output.1 and
    output.2."""
    os.chdir(folder)
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


class Job:
    """A script that runs by itself; finish() waits for it."""

    def __init__(self, name, flags, folder, output, environment):
        self.args = [str(ROOT / name), [str(flag) for flag in flags]]
        self.output = output
        self.process = processes.Process(
            target=run_in_child, args=(*self.args, folder, str(output), environment))
        self.process.start()

    def finish(self, timeout=200):
        """A CompletedProcess with the exit code (-9 if killed) and the output. A job that takes
        too long is an error."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return subprocess.CompletedProcess(self.args, self.process.exitcode,
                                           self.read(1), self.read(2))

    def read(self, stream):
        """The output so far: of stdout (1) or stderr (2)."""
        path = Path(f"{self.output}.{stream}")
        if not path.exists():  # the job was killed before it began
            return ""
        return path.read_text()


@pytest.fixture(scope="session")
def start_in(text_file, cache, tmp_path_factory):
    """start_in(folder, name, *flags) -> a running Job of a script, in folder. train.py gets the
    small text, unless small=False. Other keywords are environment variables."""
    jobs, outputs = [], tmp_path_factory.mktemp("output")

    def start_job(folder, name, *flags, small=True, **environment):
        if name == "train.py" and small:
            flags = ("--data", text_file, *SMALL, *flags)
        if name == "train.py":
            flags = ("--cache", cache, *flags)
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
    def run(*args, **keywords):
        return start(*args, **keywords).finish()
    return run


@pytest.fixture
def train_here(monkeypatch, tmp_path, cache, text_file):
    """train_here(*flags) -> the exit code of train.train, on the small text, in an empty folder
    and in this process; or, with main=True, all of train.main."""
    import train
    monkeypatch.chdir(tmp_path)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(*flags, main=False):
        flags = ("--data", text_file, "--cache", cache, *SMALL, "--quiet", *flags)
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags)])
        if main:
            return train.main()
        args, _ = train.parse()
        return train.train(args)

    yield run
    for number, handler in handlers:
        signal.signal(number, handler)
