"""The flags of train.py: what each one does, and what should change when it does."""
import argparse
from pathlib import Path

from plumbing import processes
from plumbing.commands import HelpFormatter, Parser, filled, number

DESCRIPTION = """\
Pretrain a small decoder on next-token prediction, with or without meta-learning.

Three commands to begin with, and the minutes they take on two CPU cores:

  python train.py --meta --vocab-size 4096 --steps 300 --name quick    3 minutes
  python train.py --size 11m --meta                              15 to 25 minutes
  python train.py --size 11m                                     15 to 25 minutes

The first is a short run that shows the machinery at work. The second is the run that the README
describes, and the third is the same without meta-learning. Each run writes a folder, runs/NAME.
"The paper" below is arXiv 2508.02189."""
# These flags are an error without --meta.
META_FLAGS = ("hybrid_ratio", "meta_start", "n_query", "inner", "inner_steps", "inner_lr", "head",
              "second_order")


class TrainHelpFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description."""


def parse(sizes, argv=None):
    """(flags, parser). sizes is {name: d_model}, as in model.SIZES."""
    parser = Parser(usage="python train.py [flags]", description=DESCRIPTION,
                    formatter_class=TrainHelpFormatter)
    add_first_flags(parser.add_argument_group("start here").add_argument, sizes)
    add_task_flags(parser.add_argument_group("the task").add_argument)
    add_inner_flags(parser.add_argument_group("inner loop").add_argument)
    add_mixing_flags(parser.add_argument_group("mixing").add_argument)
    add_optimizer_flags(parser.add_argument_group("optimizer").add_argument)
    add_text_flags(parser.add_argument_group("text").add_argument)
    add_machine_flags(parser.add_argument_group("machine").add_argument)
    args = parser.parse_args(argv)
    for flag in META_FLAGS:
        if getattr(args, flag) != parser.get_default(flag) and not args.meta:
            parser.error(f"--{flag.replace('_', '-')} only works with --meta: add --meta")
    if args.batch_size % args.grad_accum:
        parser.error(f"--batch-size {args.batch_size} must be a multiple of "
                     f"--grad-accum {args.grad_accum}")
    if args.grad_accum % processes.COUNT:
        parser.error(f"--grad-accum {args.grad_accum} must be a multiple of the "
                     f"{processes.COUNT} processes")
    if args.lr is None:
        args.lr = 0.75 / sizes[args.size]
    if args.name is None:
        args.name = f"{args.size}-{'meta' if args.meta else 'vanilla'}"
        if args.seed:
            args.name += f"-s{args.seed}"
    if Path(args.name).name != args.name or args.name == ".." or not args.name.isprintable():
        parser.error(f"--name {args.name} must be a plain folder name; --runs names the folder "
                     "around it")
    return args, parser


def add_first_flags(add, sizes):
    add("--meta", action="store_true",
        help="mix in meta steps: first-order MAML on episodes. Without this flag every update "
             "predicts the next token, which is the baseline of all comparisons")
    add("--size", choices=sizes, default="11m",
        help="parameters of the decoder, with the default vocabulary. The time grows with it")
    add("--vocab-size", type=number(int, 260, 65536), default=50304, metavar="V",
        help="tokens in the vocabulary. 4096 is several times faster on a CPU, but losses of "
             "different vocabularies cannot be compared")
    add("--steps", type=number(int, 1), default=2000, metavar="N",
        help="updates of both kinds together (default: %(default)s; the paper: 6,000, with 2 "
             "million tokens per next-token update, where ours have 1,024)")
    add("--seed", type=number(int, 0), default=0, metavar="S",
        help="seed of every random choice. The same seed gives the same run, and a vanilla run "
             "and a meta run with one seed read the same text in the same order")
    add("--name", type=filled,
        help="name of the run's folder (default: SIZE-meta or SIZE-vanilla, with -sS for a seed "
             "S above 0)")
    add("--resume", action="store_true",
        help="continue a run that was stopped, with the same flags. --steps may be higher than "
             "before")


def add_task_flags(add):
    add("--n-way", type=number(int, 2), default=32, metavar="N",
        help="words (classes) in an episode. Chance is 1/N: 3.1%% for 32 words, 50%% for two")
    add("--k-shot", type=number(int, 1), default=4, metavar="K",
        help="support examples per word. More of them should raise accuracy, and cost more")
    add("--n-query", type=number(int, 1), default=2, metavar="Q", help="query examples per word")
    add("--episode-len", type=number(int, 2, 2048), default=32, metavar="L",
        help="tokens per example. The last one is the masked word (default: %(default)s; the "
             "paper: 2048)")
    add("--head", choices=["slots", "words"], default="slots",
        help="output rows of the meta head. slots: an episode gives its words new labels, so only "
             "adapting can tell them apart. words: each word has the same row in all episodes, "
             "and training can memorise it (default: %(default)s; the paper: words)")


def add_inner_flags(add):
    add("--inner-steps", type=number(int, 0), default=10, metavar="N",
        help="SGD steps on the support set. With 0 steps and fresh labels, accuracy must stay at "
             "chance")
    add("--inner-lr", type=number(float, 0), default=0.1, metavar="RATE",
        help="learning rate of these steps. At 0.01 ten steps should help about as little as one "
             "at 0.1 (default: %(default)s; the paper: 0.001 to 0.01)")
    add("--inner", choices=["head", "all"], default="head",
        help="what the inner loop adapts: the meta head, or the whole decoder as well, which "
             "makes a meta step many times more expensive")
    add("--second-order", action="store_true",
        help="full MAML: differentiate through the inner loop. The gradient is exact, and a meta "
             "step costs more (default: first order, as in the paper)")


def add_mixing_flags(add):
    add("--hybrid-ratio", type=number(float, 0, 1), default=0.5, metavar="P",
        help="probability that an update is a meta step, after --meta-start. The more meta steps, "
             "the fewer next-token steps, so the validation loss should be higher")
    add("--meta-start", type=number(float, 0, 1), default=0.25, metavar="SHARE",
        help="share of the updates before the first meta step. The hidden states of a fresh "
             "decoder say little about words, and adapting to them makes the model worse "
             "(default: %(default)s; the paper: 0)")


def add_optimizer_flags(add):
    add("--lr", type=number(float, 0), metavar="RATE",
        help="peak learning rate of AdamW (default: 0.75 / d_model, which is 0.0078 for 11m; the "
             "paper: 0.0003)")
    add("--warmup", type=number(float, 0, 1), default=0.15, metavar="SHARE",
        help="share of the updates in which the learning rate rises. Then it falls to 0. A short "
             "warm-up makes the hidden states lose more of their rank (default: %(default)s; the "
             "paper: 0.42)")
    add("--batch-size", type=number(int, 1), default=8, metavar="B",
        help="sequences per next-token update, over all processes and micro-batches (default: "
             "%(default)s; the paper: 1024)")
    add("--seq-len", type=number(int, 2, 2048), default=128, metavar="T",
        help="tokens per sequence (default: %(default)s; the paper: 2048)")
    add("--grad-accum", type=number(int, 1), default=processes.COUNT, metavar="N",
        help="micro-batches per update, over all processes: a multiple of their number. Each "
             "micro-batch of a meta step is an episode")


def add_text_flags(add):
    add("--data", type=filled, metavar="PATH",
        help="text: a .txt, .jsonl or .jsonl.gz file or a folder of them; GPT-2 ids: .bin files of "
             "nanoGPT or llm.c; or a folder that data.py --out made (default: the documentation "
             "on this machine)")
    add("--tokenizer", choices=["bpe", "gpt2"], default="bpe",
        help="bpe learns a vocabulary from the text. gpt2 downloads that of GPT-2, once")
    add("--cache", type=filled, metavar="FOLDER",
        help="folder of prepared texts (default: nanomaml under $XDG_CACHE_HOME or ~/.cache)")


def add_machine_flags(add):
    add("--device", type=filled, help="cuda, mps or cpu (default: the best one available)")
    add("--runs", default="runs", type=filled, metavar="FOLDER",
        help="folder that holds the runs")
    add("--eval-every", type=number(int, 1), default=200, metavar="N",
        help="updates between evaluations. Each one also saves a checkpoint")
    add("--probe-every", type=number(int, 1), default=100, metavar="N",
        help="updates between probes of rank and entropy. The first updates are probed more often "
             "(1, 2, 4, ...)")
    add("--quiet", action="store_true", help="hide progress bars")
