"""How fast is a training step? Steps are timed side by side in one run, and compared.

    python tests/bench.py [--size 11m]   # steps: under two minutes
    python tests/bench.py --grow         # speed and memory by size, context, text: 5 to 10 minutes

The plain twin is the same decoder in float32, with PyTorch's own attention and all logits at
once. The paper's way is a meta step as the paper's code performs it: the backbone runs again in
every inner step, and its classifier scores the whole vocabulary at every position.
"""
import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import probe  # noqa: E402
from meta import HIDDEN, MetaHead, adapt, meta_flops, meta_loss  # noqa: E402
from model import SIZES, Config, Decoder, backbone_flops, lm_flops  # noqa: E402
from plumbing.machine import LONG_RUN, compiled, peak_memory, pick_device, precision  # noqa: E402

# A next-token step: rows and tokens in each.
BATCH, LENGTH = 8, 256
# A meta step: words, examples of each, tokens in each.
WAY, SHOT, QUERY, ROW = 32, 4, 2, 32
INNER_STEPS, INNER_LR = 10, 0.1
# A meta step performed the paper's way: rows, tokens in each, and its inner learning rate.
PAPER_ROWS, PAPER_LENGTH, PAPER_LR = 4, 256, 0.01
# The same tokens as rows that end at a masked word.
PAPER_WAY, PAPER_SHOT = 8, 2
# Tokens in each of the steps of --grow.
GROW_TOKENS = 2048
# The measured matrix products have this many rows and columns. On a GPU, larger ones are used for
# the precision of training.
PRODUCT, GPU_PRODUCT = 2048, 8192


# ---- the clock ---------------------------------------------------------------------------------

def seconds_of_one(step, device):
    """How long one call of a function takes, until the device is done."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started


def median_seconds(steps, repeats, device):
    """The median time of each of several functions over `repeats` rounds. They take turns, so
    that other load on the machine affects all of them. The first round is a warm-up."""
    times = [[] for _ in steps]
    for _ in range(1 + repeats):
        for step, own_times in zip(steps, times):
            own_times.append(seconds_of_one(step, device))
    return [sorted(own_times[1:])[repeats // 2] for own_times in times]


def product_flops(dtype, device):
    """FLOP/s of a plain matrix product in one precision, from the median time of ten."""
    a, b = torch.randn(2, PRODUCT, PRODUCT, device=device).to(dtype)
    seconds = median_seconds([partial(torch.mm, a, b)], 10, device)
    return 2 * PRODUCT ** 3 / seconds[0]


def matmul_peak(device):
    """FLOP/s of a plain matrix product in the precision of training, from the best time of five."""
    size = GPU_PRODUCT if device.type == "cuda" else PRODUCT
    times = []
    with precision(device):
        a = torch.randn(size, size, device=device)
        a = (a @ a) / size  # in the precision of a product
        for _ in range(5):
            times.append(seconds_of_one(partial(torch.mm, a, a), device))
    return 2 * size ** 3 / min(times)


# ---- the steps ---------------------------------------------------------------------------------

@dataclass
class Models:
    """What the steps train. The backbone is the decoder's, compiled if a long run would compile
    it."""
    device: torch.device
    decoder: Decoder
    backbone: torch.nn.Module
    meta_head: MetaHead
    optimizer: torch.optim.Optimizer


def build_models(size, vocab_size, device):
    generator = torch.Generator().manual_seed(0)
    config = Config(SIZES[size], vocab_size)
    decoder = Decoder(config, generator).to(device)
    meta_head = MetaHead(config.d_model, "slots", WAY, 0, generator).to(device)
    parameters = [*decoder.parameters(), *meta_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    backbone, _ = compiled(decoder.model, LONG_RUN)
    return Models(device, decoder, backbone, meta_head, optimizer)


class PapersLearner(torch.nn.Module):
    """Token ids (B, T) -> scores of the vocabulary (B * T, V): a backbone with a
    classifier of the paper's shape."""

    def __init__(self, backbone, d_model, vocab_size):
        super().__init__()
        self.backbone = backbone
        self.head = torch.nn.Sequential(
            torch.nn.Linear(d_model, HIDDEN), torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN, vocab_size))

    def forward(self, ids):
        return self.head(self.backbone(ids)).flatten(0, 1)


def random_ids(rows, length, vocab_size, device):
    return torch.randint(vocab_size, (rows, length)).to(device)


def random_episode(vocab_size, device):
    """An Episode of random tokens, in the shape of a meta step."""
    words = torch.arange(WAY, device=device)
    return data.Episode(
        support_ids=random_ids(WAY * SHOT, ROW, vocab_size, device),
        support_labels=words.repeat_interleave(SHOT),
        query_ids=random_ids(WAY * QUERY, ROW, vocab_size, device),
        query_labels=words.repeat_interleave(QUERY),
        words=words)


def papers_tokens_as_episode(paper_ids):
    """An Episode made of the tokens (PAPER_ROWS, PAPER_LENGTH): rows of ROW tokens, of which half
    are support rows and the others query rows."""
    rows = paper_ids.reshape(-1, ROW)
    half = PAPER_WAY * PAPER_SHOT
    words = torch.arange(PAPER_WAY, device=paper_ids.device)
    labels = words.repeat_interleave(PAPER_SHOT)
    return data.Episode(rows[:half], labels, rows[half:], labels, words)


def update(models, loss):
    loss.backward()
    models.optimizer.step()
    models.optimizer.zero_grad()


def next_token_step(models, batch):
    """A next-token step on batch (B, T+1), as training performs it."""
    with precision(models.device):
        loss = models.decoder.loss(batch[:, :-1], batch[:, 1:], models.backbone)
    update(models, loss)


def plain_twin_step(models, batch):
    """The same in float32, with PyTorch's own attention and all logits at once."""
    with mock.patch("plumbing.kernels.KEPT_ATTENTION", 0):
        logits = models.decoder(batch[:, :-1])  # (B, T, V)
        update(models, F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))


def meta_step(models, episode, inner):
    """A meta step, as training performs it. Only a backbone that is not adapted is compiled."""
    backbone = models.backbone if inner == "head" else models.decoder.model
    with precision(models.device):
        loss, _ = meta_loss(backbone, models.meta_head, episode, inner, INNER_STEPS, INNER_LR)
    update(models, loss)


def backbone_step(models, episode):
    """The backbone's part of a meta step: the support rows forward, the query rows forward and
    backward."""
    with precision(models.device):
        with torch.no_grad():
            models.backbone(episode.support_ids)
        loss = models.backbone(episode.query_ids)[:, -1].sum()
    update(models, loss)


def papers_step(models, learner, paper_ids):
    """A meta step the paper's way: every inner step runs the backbone again."""
    targets = paper_ids.flatten()
    start = {f"head.{name}": p for name, p in learner.head.named_parameters()}
    with mock.patch("plumbing.kernels.KEPT_ATTENTION", 0):
        fast = adapt(learner, start, paper_ids, targets, INNER_STEPS, PAPER_LR)
        scores = torch.func.functional_call(learner, fast, (paper_ids,))  # (B * T, V)
        update(models, F.cross_entropy(scores, targets))
    learner.head.zero_grad()


def probe_step(models, batch):
    """A probe of training's size: four windows of 128 tokens."""
    with precision(models.device):
        probe.measure(models.decoder, batch[:probe.PROBE_WINDOWS, :129])


# ---- the report --------------------------------------------------------------------------------

@dataclass
class Row:
    """A row of the table: the name of a step, a function that performs it, the tokens that it
    processes, and its model FLOPs, 0 if they are not counted."""
    name: str
    step: Callable
    tokens: int
    flops: int = 0


def print_rows(rows, repeats, device, peak):
    """Time the steps of rows side by side and print them. The others are compared with the first.
    The peak is in FLOP/s. Returns {name: seconds}."""
    took = {}
    times = median_seconds([row.step for row in rows], repeats, device)
    for row, seconds in zip(rows, times):
        name = f"  {row.name}" if took else row.name
        line = f"{name:<32} {seconds:>8.3f} {row.tokens / seconds:>9,.0f}"
        if row.flops:
            flops_per_second = row.flops / seconds
            line += f" {flops_per_second / 1e9:>8.0f}  {flops_per_second / peak:.0%}"
        print(line, flush=True)
        took[row.name] = seconds
    return took


def next_token_rows(models, batch):
    """The next-token step and its plain twin."""
    tokens, flops = BATCH * LENGTH, lm_flops(models.decoder.config, BATCH, LENGTH)
    return [Row("next-token step", partial(next_token_step, models, batch), tokens, flops),
            Row("the plain twin", partial(plain_twin_step, models, batch), tokens, flops)]


def meta_row(models, episode, inner):
    """A meta step with one kind of inner loop."""
    flops = meta_flops(models.decoder.config, models.meta_head, WAY, SHOT, QUERY, ROW, inner,
                       INNER_STEPS, second_order=False)
    return Row(f"meta step, inner {inner}", partial(meta_step, models, episode, inner),
               WAY * (SHOT + QUERY) * ROW, flops)


def backbone_row(models, episode):
    config = models.decoder.config
    support_flops = backbone_flops(config, WAY * SHOT, ROW)
    query_flops = 3 * backbone_flops(config, WAY * QUERY, ROW)
    return Row("backbone work of its tokens", partial(backbone_step, models, episode),
               WAY * (SHOT + QUERY) * ROW, support_flops + query_flops)


def papers_rows(models, paper_ids):
    """Our meta step and the paper's on the same tokens."""
    config = models.decoder.config
    learner = PapersLearner(models.decoder.model, config.d_model, config.vocab_size)
    learner.to(models.device)
    episode, tokens = papers_tokens_as_episode(paper_ids), paper_ids.numel()
    return [Row("meta step, 4 x 256 tokens", partial(meta_step, models, episode, "head"), tokens),
            Row("the paper's way", partial(papers_step, models, learner, paper_ids), tokens)]


def print_table(models, batch, repeats, peak):
    """Time all steps and print them. Returns {name: seconds}."""
    vocab_size, device = models.decoder.config.vocab_size, models.device
    episode = random_episode(vocab_size, device)
    paper_ids = random_ids(PAPER_ROWS, PAPER_LENGTH, vocab_size, device)
    print(f"{'':<32} {'seconds':>8} {'tokens/s':>9} {'GFLOP/s':>8}  of float32 peak")
    took = print_rows(next_token_rows(models, batch), repeats, device, peak)
    rows = [meta_row(models, episode, "head"), backbone_row(models, episode)]
    took |= print_rows(rows, repeats, device, peak)
    took |= print_rows([meta_row(models, episode, "all")], 1, device, peak)
    took |= print_rows(papers_rows(models, paper_ids), 2, device, peak)
    return took


def print_ratios(models, took):
    """What the table says, in words."""
    next_token, meta = took["next-token step"], took["meta step, inner head"]
    times = took["the plain twin"] / next_token
    print(f"next-token step: {times:.1f} times the plain twin's tokens per second")
    achieved = lm_flops(models.decoder.config, BATCH, LENGTH) / next_token
    possible = matmul_peak(models.device)
    print(f"  {achieved / possible:.0%} of the {possible / 1e9:,.0f} GFLOP/s of a plain matrix "
          "product in the precision of training")
    print(f"meta step: {meta / took['backbone work of its tokens']:.2f} times the backbone work "
          f"of its tokens, {meta / next_token:.2f} times a next-token step")
    slower = took["the paper's way"] / took["meta step, 4 x 256 tokens"]
    note = ""
    if models.backbone is not models.decoder.model:
        note = " (ours is compiled; it and the plain twin are not)"
    print(f"the paper's way: {slower:.0f} times slower on the same tokens{note}")


def print_shares(models, batch, took):
    """What else a run does, as shares of its steps: probes, drawing episodes and batches."""
    next_token, meta = took["next-token step"], took["meta step, inner head"]
    probes = median_seconds([partial(probe_step, models, batch)], 3, models.device)
    steps = probes[0] / next_token
    print(f"a probe: the time of {steps:.1f} next-token steps; one in 100 updates adds "
          f"{steps / 100:.1%}")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        made_up_text(text, 2)
        corpus = data.load(text, vocab_size=8192, cache=Path(folder) / "cache", quiet=True)
        sampler = data.EpisodeSampler(corpus, WAY, SHOT, QUERY, ROW)
        draws = [partial(sampler.draw, 0, 0),
                 partial(data.lm_batch, corpus.train, 0, BATCH, LENGTH, 0)]
        episode_seconds, batch_seconds = median_seconds(draws, 20, models.device)
    print(f"drawing an episode: {episode_seconds / meta:.1%} of a meta step; drawing a batch: "
          f"{batch_seconds / next_token:.1%} of a next-token step")


def print_steps(size, vocab_size, repeats, device):
    """The report without --grow."""
    torch.manual_seed(0)
    models = build_models(size, vocab_size, device)
    batch = random_ids(BATCH, LENGTH + 1, vocab_size, device)
    with precision(device):
        in_bf16 = torch.is_autocast_enabled(device.type)
    peak = product_flops(torch.float32, device)
    bf16_peak = product_flops(torch.bfloat16, device)
    print(f"{size}, vocabulary {vocab_size}, {device.type}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, steps in {'bf16' if in_bf16 else 'float32'}")
    print(f"matrix products of {PRODUCT}: {peak / 1e9:.0f} GFLOP/s in float32, "
          f"{bf16_peak / 1e9:.0f} in bf16")
    took = print_table(models, batch, repeats, peak)
    print_ratios(models, took)
    print_shares(models, batch, took)
    print(peak_memory(device))


# ---- growth ------------------------------------------------------------------------------------

def made_up_text(path, megabytes):
    """Write text with 50,000 words, as frequent as in a natural language (Zipf), with sentences
    and numbers."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = []
    for _ in range(50_000):
        words.append(" " + "".join(rng.choice(syllables, rng.integers(2, 5))))
    words = np.array(words)
    words[::50] = [f" {i}" for i in range(1000)]
    words[7::300] = ".\n"
    size = 0
    with open(path, "w") as file:
        while size < megabytes * 1e6:
            ranks = rng.zipf(1.2, 100_000) - 1
            size += file.write("".join(words[ranks % len(words)]))


def print_one_step(size, length):
    """In a process of its own: tokens per second of next-token steps, and peak memory."""
    device = pick_device()
    models = build_models(size, Config.vocab_size, device)
    batch = random_ids(GROW_TOKENS // length, length + 1, Config.vocab_size, device)
    times = [seconds_of_one(partial(next_token_step, models, batch), device) for _ in range(3)]
    rate = GROW_TOKENS / min(times[1:])
    print(f"{size:>6} {length:>8} {rate:>10,.0f}{peak_memory(device):>24}", flush=True)


def print_one_text(megabytes):
    """In a process of its own: megabytes of text prepared per second, and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        made_up_text(path, megabytes)
        started = time.perf_counter()
        corpus = data.load(path, cache=Path(folder) / "cache", quiet=True)
        took = time.perf_counter() - started
        tokens = len(corpus.train) + len(corpus.val)
        memory = peak_memory(torch.device("cpu"))
        print(f"{megabytes:>6,} {took:>8.1f} {megabytes / took:>10.2f} {tokens / took:>12,.0f}"
              f"{memory:>24}", flush=True)


def grow():
    """Tokens per second and memory over sizes and contexts, and over megabytes of text."""
    script = [sys.executable, __file__]
    print(f"  size  context   tokens/s{'':>24}   next-token steps of {GROW_TOKENS} tokens, "
          f"{pick_device().type}, {torch.get_num_threads()} threads", flush=True)
    for size in ("11m", "65m", "181m"):
        for length in (256, 512, 1024, 2048):
            subprocess.run([*script, "--one-step", size, str(length)], check=True)
    print("    MB  seconds       MB/s     tokens/s   preparing text: tokenizer, tokens",
          flush=True)
    for megabytes in (1, 10, 100, 1000):
        subprocess.run([*script, "--one-text", str(megabytes)], check=True)


# ---- the command -------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--grow", action="store_true",
        help="measure tokens/s and memory for sizes, contexts, and megabytes of text instead")
    add("--one-step", nargs=2, help=argparse.SUPPRESS)
    add("--one-text", type=int, help=argparse.SUPPRESS)
    add("--size", choices=SIZES, default="11m", help="size of the decoder (default: 11m)")
    add("--device", help="cuda, mps or cpu (default: the first of these that is available)")
    add("--vocab-size", type=int, default=Config.vocab_size,
        help="size of the vocabulary; a smaller one makes all steps faster (default: %(default)s)")
    add("--repeats", type=int, default=5,
        help="rounds in which the main steps are timed; the median is shown (default: %(default)s)")
    args = parser.parse_args()
    if args.grow:
        grow()
    elif args.one_step:
        size, length = args.one_step
        print_one_step(size, int(length))
    elif args.one_text:
        print_one_text(args.one_text)
    else:
        print_steps(args.size, args.vocab_size, args.repeats, pick_device(args.device))


if __name__ == "__main__":
    main()
