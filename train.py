"""Chapter 5. The training loop: a coin flip chooses the kind of each update.

    python train.py --size 11m --meta   # hybrid: next-token steps and first-order MAML steps
    python train.py --size 11m          # vanilla: next-token steps only
    torchrun --standalone --nproc_per_node=2 train.py --size 65m --meta    # two processes

Read `loop` first. A run writes to runs/<name>/: config.json, metrics.jsonl (one JSON object per
line), ckpt.pt and, at the end, dynamics.png. Every random choice in training depends only on
--seed and a counter, such as the step, so a vanilla and a hybrid run see the same text in the
same order. "The paper" is arXiv 2508.02189.
"""
import plumbing  # noqa: F401 - imported first, so that Ctrl-C during loading exits quietly

import math
import platform
import sys

import numpy as np
import torch

import data
from meta import MetaHead, evaluate_fewshot, meta_flops, meta_loss, one_question
from model import SIZES, Config, Decoder, generate, lm_flops
from plumbing import processes, train_flags
from plumbing.commands import Failure, UserError, command
from plumbing.fewshot import evaluation_rows
from plumbing.machine import compiled, device_in_words, peak_memory, precision, to_device
from plumbing.ngrams import ngram_losses
from plumbing.pictures import save_dynamics
from plumbing.runs import open_run
from plumbing.summary import summary
from probe import PROBE_WINDOWS, is_probe_step, measure

# Validation tokens that an evaluation reads: in total, and per batch.
EVAL_TOKENS, EVAL_BATCH = 16_384, 2048
# The meta head's learning rate, as a fraction of the decoder's. At the full rate, support
# accuracy fell to chance.
META_HEAD_SHARE = 0.1


# ---- the loop ----------------------------------------------------------------------------------

def loop(args, device, corpus, sampler, decoder, meta_head, optimizer, run):
    """Train from run.step to args.steps, or until a signal asks to stop. Raises Failure."""
    windows = evaluation_windows(corpus, args)
    fewshot = evaluation_rows(corpus, args.episode_len, args.n_way, args.k_shot)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    micro_batch_size = args.batch_size // args.grad_accum
    autocast = precision(device)
    backbone, seconds = compiled(decoder.model, args.steps, training_shapes(args))
    if seconds and processes.is_first():
        run.bar.write(f"compiled in {seconds:.0f} s (not counted in the log)")
    # The compiled backbone has no second derivatives, and adapting the backbone may need them.
    meta_backbone = backbone if args.inner == "head" else decoder.model
    cost = {"lm": lm_cost(args, decoder), "meta": meta_cost(args, decoder, meta_head)}

    for step in range(run.step, args.steps + 1):
        # Probe and evaluate. This is not training time, and a resumed run may have done it before.
        probing = is_probe_step(step, args.probe_every, args.steps)
        evaluating = step % args.eval_every == 0 or step == args.steps
        if probing or evaluating:
            run.flush()
        with autocast:
            if probing and run.lacks("head_entropy"):
                run.log(measure(decoder, windows[:PROBE_WINDOWS].to(device)))
            if evaluating and run.lacks("val_loss"):
                run.log(evaluate(decoder, meta_head, corpus, windows, fewshot, args, device))
                run.save(decoder, meta_head, optimizer)
        if step == args.steps or run.asked_to_stop(device):
            break

        # One update: the mean gradient of grad_accum micro-batches, all of one kind.
        run.start_clock()
        kind = "meta" if is_meta_step(step, args) else "lm"
        figures = {}
        for micro in processes.my_share(args.grad_accum):
            with autocast:
                if kind == "meta":
                    episode = sampler.draw(args.seed, step, micro).to(device)
                    loss, accuracies = meta_loss(
                        meta_backbone, meta_head, episode, args.inner, args.inner_steps,
                        args.inner_lr, args.second_order)
                else:
                    # Batches are numbered by next-token updates, so that meta steps skip no text.
                    batch_number = run.lm_steps * args.grad_accum + micro
                    batch = data.lm_batch(corpus.train, batch_number, micro_batch_size,
                                          args.seq_len, args.seed)
                    batch = to_device(batch, device)  # (B, T+1)
                    loss, accuracies = decoder.loss(batch[:, :-1], batch[:, 1:], backbone), {}
            (loss / args.grad_accum).backward()
            add_figures(figures, {"loss": loss} | accuracies, args.grad_accum)
        processes.sum_over_processes(parameters, figures)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        lr = set_learning_rate(optimizer, step, args)
        # Skip an update whose loss or gradient is not finite.
        step_if(optimizer, (figures["loss"] + grad_norm).isfinite())
        optimizer.zero_grad()
        # This counts the update: run.step is now step + 1. The figures are still tensors. Every
        # 10 updates, run.flush waits for the device, reads them and logs them.
        run.log_update(kind, *cost[kind], figures | {"lr": lr, "grad_norm": grad_norm})
    run.flush()


def training_shapes(args):
    """[(rows, length, needs a gradient)] of the batches that the compiled backbone receives."""
    shapes = [(args.batch_size // args.grad_accum, args.seq_len, True)]
    if args.meta and args.inner == "head":
        shapes += [(args.n_way * args.k_shot, args.episode_len, args.second_order),
                   (args.n_way * args.n_query, args.episode_len, True)]
    return shapes


def is_meta_step(step, args):
    """Flip the coin for update `step`. It depends only on --seed and the step. There are no meta
    steps in the first --meta-start fraction of the updates."""
    if not args.meta or step < args.meta_start * args.steps:
        return False
    # Stream 2 belongs to the coin alone: no episode draws from it (data.EpisodeSampler.draw).
    rng = np.random.default_rng([args.seed, step, 2])
    return rng.random() < args.hybrid_ratio


def set_learning_rate(optimizer, step, args):
    """Set the learning rate of update `step` and return it."""
    lr = learning_rate(step, args)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
    return lr


def step_if(optimizer, is_finite):
    """Call optimizer.step(), but change nothing unless is_finite, a bool tensor, is true.

    The fused AdamW changes nothing if found_inf is 1, so the host need not wait for the value. On
    Apple's GPUs it may ignore found_inf, so there the host waits."""
    if is_finite.device.type == "mps":
        if is_finite.item():
            optimizer.step()
        return
    optimizer.found_inf = (~is_finite).float()
    optimizer.step()


def learning_rate(step, args):
    """Linear warm-up, then linear decay that would reach zero one update after the last. This is
    the paper's schedule, scaled to --steps."""
    warmup = max(1, round(args.warmup * args.steps))
    rising = (step + 1) / warmup
    falling = (args.steps - step) / max(1, args.steps - warmup)
    return args.lr * min(rising, falling)


def add_figures(total, new, grad_accum):
    """Add a micro-batch's figures, scalar tensors, to the means over all micro-batches."""
    for name, value in new.items():
        total[name] = total.get(name, 0.0) + value.detach() / grad_accum


# ---- evaluation and cost -----------------------------------------------------------------------

def evaluation_windows(corpus, args):
    """The validation windows of an evaluation, (W, T+1)."""
    return data.validation_windows(corpus.val, args.seq_len, max(1, EVAL_TOKENS // args.seq_len))


@torch.no_grad()
def evaluate(decoder, meta_head, corpus, windows, fewshot, args, device):
    """The values of an evaluation line: next-token loss on validation windows (W, T+1), and
    few-shot accuracy on held-out words."""
    total = 0.0
    for batch in windows.to(device).split(max(1, EVAL_BATCH // windows.shape[1])):
        total += decoder.loss(batch[:, :-1], batch[:, 1:]).item() * len(batch)
    loss = total / len(windows)  # nats per token
    targets = windows[:, 1:].numpy()
    bits = loss * targets.size / math.log(2)
    n_bytes = corpus.token_bytes[targets].sum()
    figures = {"val_loss": loss, "bits_per_byte": bits / max(1, n_bytes)}
    return figures | evaluate_fewshot(decoder.model, meta_head, fewshot, args.n_way, args.k_shot,
                                      device, args.inner, args.inner_steps, args.inner_lr)


def lm_cost(args, decoder):
    """(tokens, model FLOPs) of a next-token update."""
    flops = lm_flops(decoder.config, args.batch_size // args.grad_accum, args.seq_len)
    return args.batch_size * args.seq_len, args.grad_accum * flops


def meta_cost(args, decoder, meta_head):
    """(tokens, model FLOPs) of a meta update; None without a meta head."""
    if meta_head is None:
        return None
    tokens = args.n_way * (args.k_shot + args.n_query) * args.episode_len
    flops = meta_flops(decoder.config, meta_head, args.n_way, args.k_shot, args.n_query,
                       args.episode_len, args.inner, args.inner_steps, args.second_order)
    return args.grad_accum * tokens, args.grad_accum * flops


# ---- before and after the loop -----------------------------------------------------------------

def train(args):
    """Train a run as args describes, and return the exit code. Raises UserError for what the user
    can fix."""
    device = processes.start(args.device)
    with open_run(args) as run:
        if run.step >= args.steps:
            return run.say_finished()
        with processes.first_on_machine_goes_first():  # it prepares the text for all
            corpus = data.load(args.data, args.tokenizer, args.vocab_size, args.cache, args.quiet)
        args.tokenizer = "gpt2" if corpus.encoding.name == "gpt2" else "bpe"
        check_length(corpus, args)
        sampler = None
        if args.meta:
            sampler = data.EpisodeSampler(corpus, args.n_way, args.k_shot, args.n_query,
                                          args.episode_len)
        decoder, meta_head = build_models(args, corpus, device)
        optimizer = build_optimizer(decoder, meta_head)
        settings = describe(args, corpus, decoder, meta_head, device)
        run.begin(settings, corpus.folder, decoder, meta_head, optimizer)
        if processes.is_first() and not args.quiet:
            run.bar.write(f"watch: python probe.py {run.folder} --live")
        loop(args, device, corpus, sampler, decoder, meta_head, optimizer, run)
        run.bar.close()
        if run.step < args.steps:
            run.save(decoder, meta_head, optimizer)
            return run.stopped()
        if processes.is_first():
            report(run, corpus, decoder, meta_head, args, device)
    return 0


def report(run, corpus, decoder, meta_head, args, device):
    """Draw dynamics.png and print the summary of a finished run."""
    save_dynamics(run.folder, run.lines, run.settings)
    text = sample_text(decoder, corpus, device)
    fewshot = evaluation_rows(corpus, args.episode_len, args.n_way, args.k_shot)
    with precision(device):
        question = one_question(decoder.model, meta_head, corpus, fewshot, args.n_way, args.k_shot,
                                device, args.inner, args.inner_steps, args.inner_lr)
    print(summary(run.folder, run.lines, run.settings, text, peak_memory(device), question))


def check_length(corpus, args):
    for part, tokens, rows in (("training", corpus.train, args.batch_size),
                               ("validation", corpus.val, 1)):
        # One batch, one window for the epoch's offset, and the last target.
        needed = (rows + 1) * args.seq_len + 1
        if len(tokens) < needed:
            raise UserError(f"the text is too short: its {part} part has {len(tokens)} tokens, "
                            f"but one batch needs {needed}: use more text, or lower --batch-size "
                            "or --seq-len")


def build_models(args, corpus, device):
    """(decoder, meta head or None). Weights are drawn on the CPU, so that runs start alike on all
    devices."""
    generator = torch.Generator().manual_seed(args.seed)
    config = Config(SIZES[args.size], corpus.vocab_size)
    decoder = Decoder(config, generator)
    # The mask's embedding is zero and gets no gradient: its state depends on the context alone.
    with torch.no_grad():
        decoder.model.embed_tokens.weight[corpus.mask_id] = 0
    decoder.model.embed_tokens.padding_idx = corpus.mask_id
    meta_head = None
    if args.meta:
        n_words = len(corpus.index.words)
        meta_head = MetaHead(config.d_model, args.head, args.n_way, n_words, generator)
        meta_head.to(device)
    return decoder.to(device), meta_head


def build_optimizer(decoder, meta_head):
    """AdamW. A group's share multiplies the learning rate (see set_learning_rate). Checkpoints
    store it under this name."""
    meta_parameters = list(meta_head.parameters()) if meta_head is not None else []
    groups = [{"params": list(decoder.parameters()), "share": 1.0},
              {"params": meta_parameters, "share": META_HEAD_SHARE}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def describe(args, corpus, decoder, meta_head, device):
    """The contents of a run's config.json: every flag, what it was trained with, and the validation
    losses of n-gram models ("unigram" and "bigram", in nats per token)."""
    meta_parameters = meta_head.parameters() if meta_head is not None else []
    by_counting = {}
    if processes.is_first():  # the process that writes config.json
        windows = evaluation_windows(corpus, args)
        by_counting = ngram_losses(corpus.train, windows, corpus.vocab_size)
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__}
    return vars(args) | {
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "head_parameters": sum(p.numel() for p in meta_parameters),
        "corpus": corpus.info["source"],
        "corpus_sha256": corpus.info["sha256"],
        "device_name": device_in_words(device),
        "versions": versions} | by_counting


def sample_text(decoder, corpus, device):
    """A prompt and the model's continuation of 40 tokens."""
    prompt = "Returns the"
    end = corpus.encoding.encode_single_token(data.END)
    generator = torch.Generator().manual_seed(0)
    with precision(device):
        ids = generate(decoder, corpus.encoding.encode_ordinary(prompt), 40, n_ids=end,
                       generator=generator)
        return prompt + corpus.encoding.decode(list(ids))


# ---- the command -------------------------------------------------------------------------------

def parse(argv=None):
    """(flags, parser). plumbing/train_flags.py explains each flag, and so does --help."""
    return train_flags.parse(SIZES, argv)


def out_of_memory(args):
    """One line: what the device's memory was too small for, and which flags need less."""
    rows = args.batch_size // args.grad_accum
    message = (f"error: out of memory on the device with --size {args.size} and {rows} sequences "
               f"of {args.seq_len} tokens at a time: lower --batch-size or --seq-len, or raise "
               "--grad-accum")
    if args.meta:
        rows = args.n_way * (args.k_shot + args.n_query)
        message += (f"; if it was an episode of {rows} rows of {args.episode_len} tokens, lower "
                    "--n-way, --k-shot or --episode-len")
    return message


@command
def main():
    args, _ = parse()
    with processes.left_in_the_end():
        try:
            sys.exit(train(args))
        except torch.OutOfMemoryError:
            raise Failure(out_of_memory(args)) from None


if __name__ == "__main__":
    main()
