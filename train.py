"""Pretrain a small language model, with or without meta-learning.

    python train.py --size 11m --meta          # hybrid: next-token steps and first-order MAML steps, by a coin
    python train.py --size 11m                 # vanilla: next-token steps only
    torchrun --standalone --nproc_per_node=2 train.py --size 65m --meta    # on two GPUs, or two processes of a CPU

Writes runs/<name>/: config.json, metrics.jsonl (a JSON object a line), ckpt.pt, dynamics.png. Every random choice
is a function of --seed and a step number, so a vanilla and a hybrid run see the same text in the same order.
"""
import argparse
import json
import math
import os
import platform
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import probe
from checkpoint import load_checkpoint, lock_run, read_settings, save_checkpoint, without_nan, write_atomically
from meta import FEWSHOT_QUERIES, MetaHead, evaluate_fewshot, fewshot_rows, meta_flops, meta_loss
from model import SIZES, Config, Decoder, Parser, compiled, lm_flops, pick_device, precision
from report import in_words, status, summary

FREE_FLAGS = {"runs", "name", "resume", "device", "quiet", "cache", "steps"}  # these may differ when a run is resumed
FLUSH_EVERY = 10  # updates between looks at the losses: on a GPU a look waits for the device
HEAD_SHARE = 0.1  # the meta head's part of the learning rate: at all of it the inner loop lost its grip on the head
META_STEPS = "hybrid_ratio", "meta_start", "n_query", "inner", "inner_steps", "inner_lr", "head", "second_order"  # flags without effect on a vanilla run
EVAL_TOKENS, EVAL_BATCH = 16_384, 2048  # validation tokens, and of these at a time
PATIENCE = 10  # updates in a row whose loss or gradient is not finite, after which a run is given up
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # torchrun's


class Diverged(Exception):
    """Training cannot go on; the message says what to try."""


def parse(argv=None):
    parser = Parser(description="Pretrain a small decoder on next-token prediction, mixed with meta-learning (--meta).")

    def number(kind, low, high=math.inf):
        def convert(text):
            value = kind(text)
            if not low <= value <= high or value == math.inf:  # NaN fails too
                raise argparse.ArgumentTypeError(f"{text} is not {'at least ' + str(low) if high == math.inf else f'in {low} to {high}'}")
            return value
        convert.__name__ = "whole number" if kind is int else "number"
        return convert

    run = parser.add_argument_group("run")
    run.add_argument("--name", help="folder of the run (default: SIZE-meta or SIZE-vanilla, then -sN for seed N > 0)")
    run.add_argument("--runs", default="runs", help="folder that holds the runs")
    run.add_argument("--seed", type=number(int, 0), default=0, help="source of every random choice")
    run.add_argument("--resume", action="store_true", help="continue a stopped run; --steps may be raised")
    run.add_argument("--device", help="cuda, mps or cpu (default: the best that is here)")
    run.add_argument("--quiet", action="store_true", help="no progress bars")
    run.add_argument("--eval-every", type=number(int, 1), default=200, help="updates between evaluations and checkpoints")
    run.add_argument("--probe-every", type=number(int, 1), default=100, help="updates between probes, after a dense start (1, 2, 4, ...)")

    model = parser.add_argument_group("model and text")
    model.add_argument("--size", choices=SIZES, default="11m", help="parameters of the decoder with 50304 words")
    model.add_argument("--data", help="text: a .txt, .jsonl or .jsonl.gz file or a folder of them; GPT-2 ids: .bin files of nanoGPT or llm.c; "
                       "or a folder that data.py --out made (default: the documentation on this machine)")
    model.add_argument("--tokenizer", choices=["bpe", "gpt2"], default="bpe", help="bpe is learnt from the text; gpt2 is fetched once")
    model.add_argument("--vocab-size", type=number(int, 260, 65536), default=50304, help="4096 makes a laptop several times faster")
    model.add_argument("--cache", help="folder of prepared texts (default: nanomaml under $XDG_CACHE_HOME or ~/.cache)")

    fit = parser.add_argument_group("training")
    fit.add_argument("--steps", type=number(int, 1), default=2000, help="updates")
    fit.add_argument("--batch-size", type=number(int, 1), default=8, help="sequences per next-token update, over all processes and micro-batches")
    fit.add_argument("--seq-len", type=number(int, 2, 2048), default=128, help="tokens per sequence")
    fit.add_argument("--grad-accum", type=number(int, 1), default=WORLD, help="micro-batches per update (an episode each in a meta step), "
                     "over all processes: a multiple of their number")
    fit.add_argument("--lr", type=number(float, 0), help="peak learning rate of AdamW (default: 0.75 / d_model)")
    fit.add_argument("--warmup", type=number(float, 0, 1), default=0.15, help="share of the updates in which lr rises; then it falls to 0")

    meta = parser.add_argument_group("meta-learning")
    meta.add_argument("--meta", action="store_true", help="mix in meta steps")
    meta.add_argument("--hybrid-ratio", type=number(float, 0, 1), default=0.5, help="probability that an update is a meta step, from --meta-start on")
    meta.add_argument("--meta-start", type=number(float, 0, 1), default=0.25, help="share of the updates before the first meta step: "
                      "until then the states tell nothing, and adapting to them does harm")
    meta.add_argument("--n-way", type=number(int, 2), default=32, help="words per episode")
    meta.add_argument("--k-shot", type=number(int, 1), default=4, help="support examples per word")
    meta.add_argument("--n-query", type=number(int, 1), default=2, help="query examples per word")
    meta.add_argument("--episode-len", type=number(int, 2, 2048), default=32, help="tokens per example; the last is the masked word")
    meta.add_argument("--inner", choices=["head", "all"], default="head", help="what the inner loop adapts")
    meta.add_argument("--inner-steps", type=number(int, 0), default=10, help="SGD steps on the support set")
    meta.add_argument("--inner-lr", type=number(float, 0), default=0.1, help="their learning rate")
    meta.add_argument("--head", choices=["slots", "words"], default="slots", help="fresh labels in each episode, or a row per word")
    meta.add_argument("--second-order", action="store_true", help="full MAML: differentiate through the inner loop")
    args = parser.parse_args(argv)

    unused = [flag for flag in META_STEPS if getattr(args, flag) != parser.get_default(flag) and not args.meta]
    if unused:
        parser.error(f"--{unused[0].replace('_', '-')} is about meta steps: add --meta")
    if args.batch_size % args.grad_accum:
        parser.error(f"--batch-size {args.batch_size} must be a multiple of --grad-accum {args.grad_accum}")
    if args.grad_accum % WORLD:
        parser.error(f"--grad-accum {args.grad_accum} must be a multiple of the {WORLD} processes")
    if args.lr is None:
        args.lr = 0.75 / SIZES[args.size]
    if args.name is None:
        args.name = f"{args.size}-{'meta' if args.meta else 'vanilla'}" + (f"-s{args.seed}" if args.seed else "")
    if Path(args.name).name != args.name or args.name in (".", ".."):
        parser.error(f"--name {args.name} must be a plain folder name; --runs says where it lies")
    return args, parser


def learning_rate(step, args):
    """Linear warm-up, then linear decay to zero at the last update (the paper's schedule, at any length)."""
    warmup = max(1, round(args.warmup * args.steps))
    return args.lr * min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))


def is_meta_step(step, args):
    """The coin of step `step`: a function of the seed alone. It is thrown once the decoder knows something."""
    return args.meta and step >= args.meta_start * args.steps and np.random.default_rng([args.seed, step, 2]).random() < args.hybrid_ratio


@torch.no_grad()
def evaluate(decoder, head, corpus, windows, fewshot, args, device):
    """The figures of an evaluation line: next-token loss on validation windows (W, T+1), few-shot accuracy."""
    losses = [decoder.loss(w[:, :-1], w[:, 1:]).item() * len(w) for w in windows.to(device).split(max(1, EVAL_BATCH // windows.shape[1]))]
    nats = sum(losses) / len(windows)
    n_bytes = corpus.token_bytes[windows[:, 1:].numpy()].sum()
    report = {"val_loss": nats, "bits_per_byte": nats * windows[:, 1:].numel() / math.log(2) / max(1, n_bytes)}
    return report | evaluate_fewshot(decoder.model, head, fewshot, args.n_way, args.k_shot, device,
                                     args.inner, args.inner_steps, args.inner_lr)


def sum_over_processes(gradients, figures):
    """Replace gradients (a list of tensors) and figures (a dict of 0-d tensors) by their sums over all processes: one
    all-reduce of one flat tensor. (DistributedDataParallel's hooks would not see what functional_call computes.)"""
    if WORLD == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in gradients] + [torch.stack(list(figures.values())).to(gradients[0].device)])
    dist.all_reduce(flat)
    *parts, last = flat.split([tensor.numel() for tensor in gradients] + [len(figures)])
    torch._foreach_copy_(gradients, [part.view_as(tensor) for part, tensor in zip(parts, gradients)])
    figures.update(zip(figures, last))


def open_run(args, settings):
    """Make the run's folder, or check that the one that is there may be continued. Raises ValueError.

    Returns (checkpoint to continue from or None, the lock that keeps other processes out)."""
    folder = Path(args.runs) / args.name
    config = folder / "config.json"
    if not config.exists():
        if folder.exists() and [path for path in folder.iterdir() if path.name != ".lock" and path.suffix != ".tmp"]:
            raise ValueError(f"{folder} holds files but no run: choose another --name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_run(folder) if RANK == 0 else None
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose another --runs") from None
    if not config.exists():
        return None, lock
    try:
        old = read_settings(folder)
    except ValueError:
        raise ValueError(f"{config} cannot be read: choose another --name") from None
    differing = [key for key in settings if key in vars(args) and key not in FREE_FLAGS and old.get(key) != settings[key]]
    if differing:
        changes = ", ".join(f"--{key.replace('_', '-')} {old.get(key)} there, {settings[key]} now" for key in differing)
        raise ValueError(f"{folder} holds another configuration ({changes}): give the flags it was made with, or choose another --name")
    if old.get("corpus_sha256") != settings["corpus_sha256"]:
        raise ValueError(f"{folder} was trained on another text (its SHA-256 differs): choose another --name")
    if not any(folder.glob("ckpt*.pt")):
        if any("kind" in line for line in probe.read_metrics(folder / "metrics.jsonl")[0]):
            raise ValueError(f"the checkpoints of {folder} are gone, and it cannot be continued: choose another --name")
        return None, lock  # it was stopped before its first update
    checkpoint = load_checkpoint(folder)
    if checkpoint["step"] >= args.steps:
        print(f"{folder} is finished ({checkpoint['step']} updates). Look: python probe.py {folder}; "
              "go on: --resume with more --steps; start anew: --name NAME")
        sys.exit(0)
    if not args.resume:
        raise ValueError(f"{folder} has stopped at update {checkpoint['step']} of {args.steps}: add --resume to continue, or choose another --name")
    return checkpoint, lock


def open_log(path, last_step):
    """metrics.jsonl, opened to append, without a torn last line and lines after the checkpoint at last_step; and
    the lines that stay."""
    kept = [line for line in probe.read_metrics(path)[0] if line["step"] <= last_step] if path.exists() else []
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    return open(path, "ab", buffering=0), kept


def train(args):
    """Run the job that args describes and return its exit code. Raises ValueError and DataError for what a user can mend."""
    if WORLD > 1 and args.device in (None, "cuda"):  # a GPU for each process; without GPUs a CPU, which gloo knows
        args.device = f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu"
    device = pick_device(args.device)
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
        if LOCAL_RANK > 0:
            dist.barrier()  # the first process of each machine prepares the text, the others find it in the cache
    corpus = data.load(args.data, args.tokenizer, args.vocab_size, args.cache, args.quiet)
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()
    args.tokenizer = "gpt2" if corpus.encoding.name == "gpt2" else "bpe"  # files of ids bring their own
    for part, tokens, rows in (("training", corpus.train, args.batch_size), ("validation", corpus.val, 1)):
        if len(tokens) <= (rows + 1) * args.seq_len:
            raise data.DataError(f"the text is too short: its {part} part has {len(tokens)} tokens, one batch needs "
                                 f"{(rows + 1) * args.seq_len + 1}; use more text, or a smaller --batch-size or --seq-len")
    sampler = data.EpisodeSampler(corpus, args.n_way, args.k_shot, args.n_query, args.episode_len) if args.meta else None
    windows = data.validation_windows(corpus.val, args.seq_len, max(1, EVAL_TOKENS // args.seq_len))
    fewshot = fewshot_rows(corpus, args.episode_len, args.k_shot + FEWSHOT_QUERIES)

    generator = torch.Generator().manual_seed(args.seed)  # weights are drawn on the CPU: all devices start alike
    config = Config(SIZES[args.size], corpus.vocab_size)
    decoder = Decoder(config, generator)
    with torch.no_grad():
        decoder.model.embed_tokens.weight[corpus.mask_id] = 0  # the mask says nothing of its own, so that its state is all
    decoder.model.embed_tokens.padding_idx = corpus.mask_id    # context; and it learns nothing: this row gets no gradient
    decoder.to(device)
    head = MetaHead(config.d_model, args.head, args.n_way, len(corpus.index.words), generator).to(device) if args.meta else None
    parameters = [p for module in (decoder, head) if module for p in module.parameters()]
    groups = [{"params": list(decoder.parameters()), "share": 1.0}, {"params": list(head.parameters()) if head else [], "share": HEAD_SHARE}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    settings = vars(args) | {
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "head_parameters": sum(p.numel() for p in head.parameters()) if head else 0,
        "corpus": corpus.info["source"], "corpus_sha256": corpus.info["sha256"], "device_name": in_words(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
    checkpoint, lock = open_run(args, settings)
    if WORLD > 1:  # all have looked: from here the first process writes
        seen = [None] * WORLD
        dist.all_gather_object(seen, (corpus.info["sha256"], checkpoint["step"] if checkpoint else 0))
        if len(set(seen)) > 1:
            raise ValueError(f"the processes have different texts or checkpoints: put --runs {args.runs} and --data where all machines see them")
    folder = Path(args.runs) / args.name
    spent = {"step": 0, "lm_steps": 0, "tokens": 0, "flops": 0, "seconds": 0.0, "skipped": 0}
    if checkpoint:
        decoder.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if head:
            head.load_state_dict(checkpoint["head"])
        spent |= checkpoint["spent"]
    lines = []
    if RANK == 0:
        write_atomically(folder / "config.json", json.dumps(settings, indent=1))
        write_atomically(folder / "tokenizer.tiktoken", (corpus.folder / "tokenizer.tiktoken").read_bytes())
        log, lines = open_log(folder / "metrics.jsonl", spent["step"] if checkpoint else -1)
    backbone = compiled(decoder.model)
    autocast = precision(device)

    def lm_micro_batch(i):
        rows = args.batch_size // args.grad_accum
        ids, targets = data.lm_batch(corpus.train, spent["lm_steps"] * args.grad_accum + i, rows, args.seq_len, args.seed)
        loss = decoder.loss(data.to_device(ids, device), data.to_device(targets, device), backbone)
        return {"loss": loss}, ids.numel(), lm_flops(config, rows, args.seq_len)

    def meta_micro_batch(i):
        episode = sampler.draw(args.seed, spent["step"], i).to(device)
        body = backbone if args.inner == "head" else decoder.model  # adapting it may need second derivatives, which a compiled one has not
        loss, support, query = meta_loss(body, head, episode, args.inner, args.inner_steps, args.inner_lr, args.second_order)
        flops = meta_flops(config, head, args.n_way, args.k_shot, args.n_query, args.episode_len,
                           args.inner, args.inner_steps, args.second_order)
        return ({"loss": loss, "support_accuracy": support, "query_accuracy": query},
                episode.support_ids.numel() + episode.query_ids.numel(), flops)

    def update():
        """One optimizer step on `grad_accum` micro-batches of one kind. Returns its log line, still holding tensors."""
        meta_step = is_meta_step(spent["step"], args)
        figures, share = {}, args.grad_accum // WORLD
        for i in range(RANK * share, (RANK + 1) * share):  # numbered over all processes
            with autocast:
                new, tokens, flops = meta_micro_batch(i) if meta_step else lm_micro_batch(i)
            (new["loss"] / args.grad_accum).backward()
            figures = {key: figures.get(key, 0.0) + value.detach() / args.grad_accum for key, value in new.items()}
            spent["tokens"] += tokens * WORLD
            spent["flops"] += flops * WORLD
        sum_over_processes([p.grad for p in parameters if p.grad is not None], figures)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.found_inf = 1.0 - (figures["loss"] + grad_norm).isfinite().float()  # 1: the fused AdamW changes nothing
        lr = learning_rate(spent["step"], args)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        optimizer.step()
        optimizer.zero_grad()
        spent["step"] += 1
        spent["lm_steps"] += not meta_step
        kind = {"kind": "meta", "n_way": args.n_way, "chance": 1 / args.n_way} if meta_step else {"kind": "lm"}
        return costs() | kind | figures | {"lr": lr, "grad_norm": grad_norm}

    def is_evaluation(step):
        return step % args.eval_every == 0 or step == args.steps

    def is_probe(step):
        return probe.is_probe_step(step, args.probe_every, args.steps)

    def costs():
        return {key: spent[key] for key in ("step", "tokens", "flops", "seconds")}

    def write(records):
        records = [without_nan(record) for record in records]
        lines.extend(records)
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
        while RANK == 0 and text:
            text = text[log.write(text):]

    def write_updates():
        """Log the updates since the last call: here, and only here, the host waits for the device."""
        nonlocal pending, skipped_in_a_row
        for line in pending:
            line.update((key, value.item()) for key, value in line.items() if isinstance(value, torch.Tensor))
            skipped = not math.isfinite(line["loss"] + line["grad_norm"])
            skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
            if skipped:
                spent["skipped"] += 1
                line["skipped"] = spent["skipped"]
        elapsed = time.perf_counter() - mark[0]
        for i, line in enumerate(pending, 1):
            line |= {"seconds": spent["seconds"] + elapsed * i / len(pending), "tokens_per_second": (spent["tokens"] - mark[1]) / elapsed}
        spent["seconds"] += elapsed
        write(pending)
        bar.update(len(pending))
        bar.set_postfix_str(status(lines[-1000:]), refresh=False)
        pending = []

    def save():
        if RANK == 0:
            save_checkpoint(folder, {"step": spent["step"], "spent": dict(spent), "model": decoder.state_dict(),
                                     "head": head.state_dict() if head else {}, "optimizer": optimizer.state_dict()})

    def asked_to_stop():
        """Whether a signal reached any of the processes; each must call this at the same update."""
        if WORLD == 1:
            return bool(stop)
        asked = torch.tensor(float(bool(stop)), device=device)
        dist.all_reduce(asked)
        return asked.item() > 0

    stop = []  # the number of the signal that asked to stop, if one did
    def ask_to_stop(number, frame):
        stop.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)  # asked twice: at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    looked = {kind: {line["step"] for line in lines if kind in line} for kind in ("val_loss", "head_entropy")}
    artist = probe.Artist(folder)
    bar = tqdm(total=args.steps, initial=spent["step"], desc=args.name, unit="step", disable=True if args.quiet or RANK else None)
    skipped_in_a_row = 0
    what_to_try = (f": stopped; {folder / 'ckpt.pt'} is from before. Try a lower --lr (it is {args.lr:g}), a lower --inner-lr, "
                   "or a longer --warmup, with another --name")
    while True:
        step = spent["step"]
        if RANK == 0 and is_probe(step) and step not in looked["head_entropy"]:
            with autocast:
                write([costs() | probe.measure(decoder, windows[:probe.BATCH].to(device))])
        if RANK == 0 and is_evaluation(step) and step not in looked["val_loss"]:
            with autocast:
                write([costs() | evaluate(decoder, head, corpus, windows, fewshot, args, device)])
            if lines[-1]["val_loss"] is None:  # the weights are of no use: the checkpoint of before stays
                raise Diverged(f"the validation loss was not finite after update {step}{what_to_try}")
            if bar.disable and not args.quiet:
                print(f"{args.name}: update {step:,} of {args.steps:,}, {status(lines[-1000:])}", flush=True)
            save()
            if step:
                artist.draw(lines, settings, last=step == args.steps)
        if step == args.steps or skipped_in_a_row >= PATIENCE or asked_to_stop():
            break
        pending, mark = [], (time.perf_counter(), spent["tokens"])  # the clock runs in updates alone
        while not (pending and (spent["step"] % FLUSH_EVERY == 0 or is_evaluation(spent["step"]) or is_probe(spent["step"])
                                or stop and WORLD == 1)):
            pending.append(update())
        write_updates()
    bar.close()
    if step == args.steps:
        if RANK == 0:
            print(summary(folder, lines, settings, corpus, windows, decoder, device, WORLD))
        return 0
    if skipped_in_a_row >= PATIENCE:
        raise Diverged(f"the loss or its gradient was not finite in {PATIENCE} updates in a row, up to update {step}{what_to_try}")
    save()
    if RANK == 0:
        print(f"stopped after {step} of {args.steps} updates, saved; to continue: the same command with --resume", file=sys.stderr)
    return 128 + (stop or [signal.SIGTERM])[0]


def main():
    args, parser = parse()
    stop = parser.exit if RANK == 0 else lambda code, message: sys.exit(code)  # one process speaks for all
    try:
        sys.exit(train(args))
    except (ValueError, data.DataError) as error:
        stop(2, f"{parser.prog}: error: {error}\n")
    except Diverged as error:
        stop(1, f"{parser.prog}: {error}\n")
    except OSError as error:
        stop(1, f"{parser.prog}: error: {error.filename or Path(args.runs) / args.name}: {error.strerror}. What was saved before is whole: make room "
                "or mend the cause, then the same command with --resume\n")
    except KeyboardInterrupt:
        stop(130, "stopped at once; what was saved before is whole, and --resume continues it\n")
    except RuntimeError as error:
        if WORLD == 1 or RANK == 0:
            raise
        parser.exit(1, f"process {RANK} of {WORLD} lost the others ({str(error).splitlines()[0][:80]})\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
