"""How fast is a step? Prints ratios measured side by side, in one run, on this machine.

    python tests/bench.py [--size 11m]     # steps: under two minutes
    python tests/bench.py --grow           # how speed and memory grow with size, context and text: five to ten minutes

The plain twin is the same decoder in float32, with PyTorch's own attention and all logits at once. The paper's way is a
meta step as its own code performs it: the backbone runs again in every inner step, and a head scores the whole
vocabulary at every position.
"""
import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import probe  # noqa: E402
import report  # noqa: E402
from meta import HIDDEN, MetaHead, meta_flops, meta_loss  # noqa: E402
from model import SIZES, Config, Decoder, backbone_flops, compiled, lm_flops, pick_device, precision  # noqa: E402

BATCH, LENGTH = 8, 256                                    # a next-token step
WAY, SHOT, QUERY, ROW, INNER_STEPS = 32, 4, 2, 32, 10     # a meta step
PAPER_ROWS, PAPER_LENGTH = 4, 256                         # the meta step performed the paper's way


def made_up_text(path, megabytes):
    """Write text in which 50,000 words stand as often as in a language (Zipf), with sentences and numbers."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = np.array([" " + "".join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(50_000)])
    words[::50] = [f" {i}" for i in range(1000)]
    words[7::300] = ".\n"
    size = 0
    with open(path, "w") as file:
        while size < megabytes * 1e6:
            size += file.write("".join(words[(rng.zipf(1.2, 100_000) - 1) % len(words)]))


def one_step(size, length):
    """In a process of its own: tokens per second of next-token steps of 2048 tokens, and peak memory."""
    device = pick_device()
    decoder = Decoder(Config(SIZES[size]), torch.Generator().manual_seed(0)).to(device)
    optimizer, backbone = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True), compiled(decoder.model)
    batch = torch.randint(50304, (2048 // length, length + 1), device=device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with precision(device):
            decoder.loss(batch[:, :-1], batch[:, 1:], backbone).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    print(f"{size:>6} {length:>8} {2048 / min(times[1:]):>10,.0f}{report.peak_memory(device).removeprefix(', peak'):>24}", flush=True)


def one_text(megabytes):
    """In a process of its own: megabytes of text prepared per second, and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        made_up_text(path, megabytes)
        started = time.perf_counter()
        corpus = data.load(path, cache=Path(folder) / "cache", quiet=True)
        took = time.perf_counter() - started
        print(f"{megabytes:>6,} {took:>8.1f} {megabytes / took:>10.2f} {(len(corpus.train) + len(corpus.val)) / took:>12,.0f}"
              f"{report.peak_memory(torch.device('cpu')).removeprefix(', peak'):>24}", flush=True)


def grow(script):
    print(f"  size  context   tokens/s{'':>24}   next-token steps of 2048 tokens, {pick_device().type}, {torch.get_num_threads()} threads", flush=True)
    for size in ("11m", "65m", "181m"):
        for length in (256, 512, 1024, 2048):
            subprocess.run([*script, "--one-step", size, str(length)], check=True)
    print("    MB  seconds       MB/s     tokens/s   preparation of text: tokenizer, tokens", flush=True)
    for megabytes in (1, 10, 100, 1000):
        subprocess.run([*script, "--one-text", str(megabytes)], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grow", action="store_true", help="tokens/s and memory over sizes, contexts, and megabytes of text")
    parser.add_argument("--one-step", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--one-text", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, default="11m")
    parser.add_argument("--device")
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.grow:
        return grow([sys.executable, __file__])
    if args.one_step:
        return one_step(args.one_step[0], int(args.one_step[1]))
    if args.one_text:
        return one_text(args.one_text)
    device = pick_device(args.device)
    autocast = precision(device)
    generator = torch.Generator().manual_seed(0)
    config = Config(SIZES[args.size], args.vocab_size)
    decoder = Decoder(config, generator).to(device)
    head = MetaHead(config.d_model, "slots", WAY, 0, generator).to(device)
    optimizer = torch.optim.AdamW([*decoder.parameters(), *head.parameters()], lr=1e-4, fused=True)
    ids = lambda rows, length: torch.randint(args.vocab_size, (rows, length), generator=generator).to(device)
    batch = ids(BATCH, LENGTH + 1)
    labels = torch.arange(WAY, device=device)
    episode = data.Episode(ids(WAY * SHOT, ROW), labels.repeat_interleave(SHOT), ids(WAY * QUERY, ROW), labels.repeat_interleave(QUERY), labels)
    wide = torch.nn.Sequential(torch.nn.Linear(config.d_model, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.ReLU(),
                               torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, args.vocab_size)).to(device)
    paper_ids = ids(PAPER_ROWS, PAPER_LENGTH)

    def update(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    backbone = compiled(decoder.model)

    def next_token():
        with autocast:
            update(decoder.loss(batch[:, :-1], batch[:, 1:], backbone))

    plainly = mock.patch("kernels.KEPT_ATTENTION", 0)  # PyTorch's own attention

    @plainly
    def plain():
        update(F.cross_entropy(decoder(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()))

    def meta(inner):
        with autocast:
            update(meta_loss(backbone if inner == "head" else decoder.model, head, episode, inner, INNER_STEPS, 0.1)[0])

    def backbone_share(support=episode.support_ids, query=episode.query_ids):
        with autocast:
            with torch.no_grad():
                backbone(support)
            update(backbone(query)[:, -1].sum())

    @plainly
    def papers_way():
        def loss(fast):
            return F.cross_entropy(torch.func.functional_call(wide, fast, (decoder.model(paper_ids),)).flatten(0, 1), paper_ids.flatten())
        fast = dict(wide.named_parameters())
        for _ in range(INNER_STEPS):
            grads = torch.autograd.grad(loss(fast), tuple(fast.values()))
            fast = {name: p - 0.01 * g for (name, p), g in zip(fast.items(), grads)}
        update(loss(fast))
        wide.zero_grad()

    def ours_on_the_papers_tokens():
        """The same 4 x 256 tokens as rows that end at a masked word: 16 support rows, 16 query rows, 8 ways."""
        rows = paper_ids.reshape(-1, ROW)
        label = torch.arange(8, device=device).repeat_interleave(2)
        with autocast:
            update(meta_loss(backbone, head, data.Episode(rows[:16], label, rows[16:], label, label[::2]), "head", INNER_STEPS, 0.1)[0])

    def seconds(repeats, *steps):
        """The median time of each step over `repeats` rounds, in which they take turns, after one round that warms up:
        what else the machine does meanwhile then falls on all of them."""
        times = []
        for _ in range(repeats + 1):
            for step in steps:
                started = time.perf_counter()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
        return [sorted(times[i::len(steps)][1:])[repeats // 2] for i in range(len(steps))]

    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, 2048, 2048, device=device).to(dtype)
        peaks[dtype] = 2 * 2048 ** 3 / seconds(10, lambda: a @ b)[0]
    print(f"{args.size}, {args.vocab_size} words, {device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"steps in {'bf16' if autocast._enabled else 'float32'}")
    print(f"matrix products of 2048: {peaks[torch.float32] / 1e9:.0f} GFLOP/s in float32, {peaks[torch.bfloat16] / 1e9:.0f} in bf16")
    lm_tokens, meta_tokens = BATCH * LENGTH, WAY * (SHOT + QUERY) * ROW
    flops = {inner: meta_flops(config, head, WAY, SHOT, QUERY, ROW, inner, INNER_STEPS, False) for inner in ("head", "all")}
    paper_tokens = paper_ids.numel()
    groups = [(args.repeats, [("next-token step", next_token, lm_tokens, lm_flops(config, BATCH, LENGTH)),
                              ("  the plain twin", plain, lm_tokens, lm_flops(config, BATCH, LENGTH))]),
              (args.repeats, [("meta step, inner head", lambda: meta("head"), meta_tokens, flops["head"]),
                              ("  backbone work of its tokens", backbone_share, meta_tokens,
                               backbone_flops(config, WAY * SHOT, ROW) + 3 * backbone_flops(config, WAY * QUERY, ROW))]),
              (1, [("meta step, inner all", lambda: meta("all"), meta_tokens, flops["all"])]),
              (2, [("meta step, 4 x 256 tokens", ours_on_the_papers_tokens, paper_tokens, None), ("  the paper's way", papers_way, paper_tokens, None)])]
    took = {}
    print(f"{'':<32} {'seconds':>8} {'tokens/s':>9} {'GFLOP/s':>8}  of float32 peak")
    for repeats, rows in groups:
        for (name, _, tokens, count), t in zip(rows, seconds(repeats, *(row[1] for row in rows))):
            took[name.strip()] = t
            achieved = f"{count / t / 1e9:>8.0f}  {count / t / peaks[torch.float32]:.0%}" if count else ""
            print(f"{name:<32} {t:>8.3f} {tokens / t:>9,.0f} {achieved}", flush=True)
    print(f"next-token step: {took['the plain twin'] / took['next-token step']:.1f} times the plain twin's tokens per second")
    print(f"meta step: {took['meta step, inner head'] / took['backbone work of its tokens']:.2f} times the backbone work of its tokens, "
          f"{took['meta step, inner head'] / took['next-token step']:.2f} times a next-token step")
    slower = took["the paper's way"] / took["meta step, 4 x 256 tokens"]
    print(f"the paper's way: {slower:.0f} times slower on the same tokens" + " (ours compiled, it and the plain twin not)" * (backbone is not decoder.model))

    def one_probe():
        with autocast:
            probe.measure(decoder, batch[:4, :129])
    steps = seconds(3, one_probe)[0] / took["next-token step"]
    print(f"a probe: {steps:.1f} next-token steps' time; every 100 updates, {steps / 100:.1%} of them")
    with tempfile.TemporaryDirectory() as folder:
        made_up_text(Path(folder) / "text.txt", 2)
        corpus = data.load(Path(folder) / "text.txt", vocab_size=8192, cache=Path(folder) / "cache", quiet=True)
        sampler = data.EpisodeSampler(corpus, WAY, SHOT, QUERY, ROW)
        print(f"drawing an episode: {seconds(20, lambda: sampler.draw(0, 0))[0] / took['meta step, inner head']:.1%} of a meta step; "
              f"drawing a batch: {seconds(20, lambda: data.lm_batch(corpus.train, 0, BATCH, LENGTH, 0))[0] / took['next-token step']:.1%} of a next-token step")
    print(report.peak_memory(device).removeprefix(", "))


if __name__ == "__main__":
    main()
