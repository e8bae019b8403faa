"""The folder of a run during training: opening or resuming it, its log, its checkpoints.

    config.json    every flag, and what was trained on
    metrics.jsonl  the log, one JSON object per line
    ckpt.pt        the newest checkpoint; ckpt-previous.pt is the one before
"""
import contextlib
import itertools
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import processes, tokenizer
from plumbing.checkpoints import load_checkpoint, save_checkpoint
from plumbing.commands import Failure, UserError, in_words
from plumbing.files import (append, holds_files, locked, open_to_append, read_file,
                            write_atomically)
from plumbing.logs import LARGEST_FIGURE, read_metrics, read_settings
from plumbing.summary import status

# These flags may change when a run is resumed. The tokenizer depends on the text, whose SHA-256
# must be the same.
FREE_FLAGS = {"runs", "name", "resume", "device", "quiet", "cache", "steps", "tokenizer"}
# Losses are read once in this many updates. On a GPU, reading them waits for the device.
FLUSH_EVERY = 10
# A run stops after this many updates in a row whose loss or gradient is not finite.
PATIENCE = 10
# The status line is computed from this many lines at the end of the log.
STATUS_LINES = 1000
LOG = "metrics.jsonl"


class Diverged(Failure):
    """Training cannot continue. The message says what to try."""


# ---- opening -----------------------------------------------------------------------------------

@contextlib.contextmanager
def open_run(args):
    """The Run for these flags (argparse's namespace): a new one, or one that continues from its
    checkpoint. Nothing is written before Run.begin. Raises UserError if the run's folder cannot
    be used."""
    folder = Path(args.runs) / args.name
    is_new = not (folder / "config.json").exists()
    if is_new and folder.is_dir() and holds_files(folder):
        raise UserError(f"{folder} holds files but no run: choose another --name")
    if not is_new:
        check_flags(folder, args)
    lock = contextlib.nullcontext()
    if processes.is_first():
        lock = locked(folder, "choose another --name or --runs", doing="training in")
    with lock, contextlib.closing(Run(folder, args)) as run:
        if not is_new:
            run.find_checkpoint()
        try:
            yield run
        except (OSError, KeyboardInterrupt) as error:
            if run.log_file is None or isinstance(error, BrokenPipeError):
                raise  # nothing was written yet, or the reader of the output has gone
            advice = "What was saved before is intact: add --resume to continue."
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(advice) from None
            raise Failure(f"error: {in_words(error)}. {advice}") from error


def check_flags(folder, args):
    """Raise UserError unless the run in the folder was made with the same flags."""
    old = read_settings(folder)
    if "model_type" in old:
        raise UserError(f"{folder} holds an imported model, which cannot be trained further: "
                        "choose another --name")
    changes = []
    for flag, value in vars(args).items():
        if flag not in FREE_FLAGS and old.get(flag) != value:
            name = "--" + flag.replace("_", "-")
            changes.append(f"{name} {str(old.get(flag))[:40]} there, {value} now")
    if changes:
        raise UserError(f"{folder} holds a run with other flags ({', '.join(changes)}): give the "
                        "same flags, or choose another --name")


# ---- training ----------------------------------------------------------------------------------

class Run:
    """One run, and what its updates have cost so far.

    step      updates done
    lm_steps  next-token updates among them
    tokens, flops, seconds  spent in updates, over all processes
    skipped   updates whose loss or gradient was not finite
    lines     the lines of the log, a list of dicts
    """

    def __init__(self, folder, args):
        self.folder, self.args = folder, args
        self.step = self.lm_steps = self.tokens = self.flops = self.skipped = 0
        self.seconds = 0.0
        self.skipped_in_a_row = 0
        self.lines, self.notes = [], []
        self.waiting = []        # log lines of updates that still hold tensors
        self.started = None      # the clock: when the first of these began
        self.ends = []           # when each of them ended, as far as the host knows
        self.checkpoint = None   # until `begin` has loaded it
        self.log_file = None     # once `begin` has opened it
        self.bar = tqdm(disable=True)
        self.stop_signal = None
        self.old_handlers = {}

    def close(self):
        """Close the log, so that a notebook can train in the folder again."""
        self.bar.close()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        if self.log_file:
            self.log_file.close()

    def find_checkpoint(self):
        """Read the checkpoint to continue from. There is none if the run stopped before its first.
        Raises UserError."""
        self.lines, self.notes = read_metrics(self.folder / LOG)
        if not any(self.folder.glob("ckpt*.pt")):
            if any("kind" in line for line in self.lines):
                raise UserError(f"the checkpoints of {self.folder} are gone, so it cannot be "
                                "continued: choose another --name")
            return
        self.checkpoint = load_checkpoint(self.folder, set_aside=processes.is_first())
        step = self.checkpoint["step"]
        logged = max((line["step"] for line in self.lines), default=-1)
        if not 0 <= step <= logged:
            raise UserError(f"the checkpoint in {self.folder} is from update {step}, but its log "
                            f"ends at update {logged}: choose another --name")
        if step < self.args.steps and not self.args.resume:
            raise UserError(f"{self.folder} stopped at update {step} of {self.args.steps}: "
                            "add --resume to continue, or choose another --name")
        self.step = step

    def say_finished(self):
        """Say what can be done with a run that is finished. Returns the exit code."""
        if processes.is_first():
            print(f"{self.folder} is finished ({self.step} updates). See it: python probe.py "
                  f"{self.folder}; continue: --resume with more --steps; start over: --name NAME")
        return 0

    def begin(self, settings, prepared_text, decoder, meta_head, optimizer):
        """Load the checkpoint, if there is one, and only then start to write.

        settings is the content of config.json, prepared_text the folder with the tokenizer. Raises
        UserError if they, or the models, differ from those that the run was made with."""
        config = self.folder / "config.json"
        if config.exists():
            if read_settings(self.folder).get("corpus_sha256") != settings["corpus_sha256"]:
                raise UserError(f"{self.folder} was trained on another text or tokenizer (the "
                                "SHA-256 differs): choose another --name")
        if not processes.all_agree((settings["corpus_sha256"], self.step)):
            raise UserError("the processes have different texts or checkpoints: put --runs "
                            f"{self.args.runs} and --data where all machines can read them")
        if self.checkpoint:
            self.restore(decoder, meta_head, optimizer)
        if processes.is_first():
            tokens = read_file(prepared_text / tokenizer.FILE)
            settings["tokenizer_sha256"] = tokenizer.sha256(tokens)
            # config.json comes first: a folder without it is not a run.
            write_atomically(config, json.dumps(settings, indent=1))
            write_atomically(self.folder / tokenizer.FILE, tokens)
            self.open_log()
        self.checkpoint = None  # frees its memory
        self.settings = settings
        hidden = self.args.quiet or not processes.is_first()
        self.bar = tqdm(total=self.args.steps, initial=self.step, desc=self.args.name,
                        unit="step", disable=True if hidden else None)
        for number in (signal.SIGINT, signal.SIGTERM):
            self.old_handlers[number] = signal.signal(number, self.note_signal)

    def restore(self, decoder, meta_head, optimizer):
        """Load the checkpoint into the models. Raises UserError if it does not fit them."""
        state = self.checkpoint
        try:
            decoder.load_state_dict(state["model"])
            if meta_head is not None:
                meta_head.load_state_dict(state["head"])
            # The flags set the optimizer's options. The checkpoint provides its moments.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state["optimizer"]["state"],
                                       "param_groups": groups})
            for parameter, moments in optimizer.state.items():
                for key, shape in (("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape),
                                   ("step", torch.Size())):
                    if moments[key].shape != shape:
                        raise ValueError
            spent = {"skipped": 0} | state["spent"]  # earlier versions did not count these
            if not all(0 <= figure < LARGEST_FIGURE for figure in spent.values()):
                raise ValueError
            self.lm_steps, self.skipped = int(spent["lm_steps"]), int(spent["skipped"])
            self.tokens, self.flops = int(spent["tokens"]), int(spent["flops"])
            self.seconds = float(spent["seconds"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise UserError(f"the checkpoint in {self.folder} does not fit its configuration: "
                            "choose another --name") from None

    def open_log(self):
        """Open metrics.jsonl for appending. Lines after the checkpoint are removed. So are lines
        that cannot be read; then a copy of the whole file is kept."""
        path = self.folder / LOG
        if self.notes:
            copies = (path.with_name(f"metrics-damaged-{i}.jsonl") for i in itertools.count(1))
            copy = next(copy for copy in copies if not copy.exists())
            write_atomically(copy, read_file(path))
            print(f"note: {self.notes[0]}; {copy} is a full copy", file=sys.stderr)
        last = self.step if self.checkpoint else -1
        self.lines = [line for line in self.lines if line["step"] <= last]
        write_atomically(path, "".join(map(json_line, self.lines)))
        self.log_file = open_to_append(path)

    def save(self, decoder, meta_head, optimizer):
        if not processes.is_first():
            return
        spent = {"step": self.step, "lm_steps": self.lm_steps, "tokens": self.tokens,
                 "flops": self.flops, "seconds": self.seconds, "skipped": self.skipped}
        save_checkpoint(self.folder, {
            "step": self.step, "spent": spent, "model": decoder.state_dict(),
            "head": meta_head.state_dict() if meta_head is not None else {},
            "optimizer": optimizer.state_dict()})

    # ---- the log

    def costs(self):
        return {"step": self.step, "tokens": self.tokens, "flops": self.flops,
                "seconds": self.seconds}

    def lacks(self, figure):
        """Whether this process must still log a figure, such as "val_loss", at this step."""
        same_step = [line for line in self.lines[-3:] if line["step"] == self.step]
        return processes.is_first() and not any(figure in line for line in same_step)

    def log(self, figures):
        """Log the figures of a probe or an evaluation at this step. Raises Diverged if the
        validation loss is not finite, so that such weights never replace good ones."""
        self.write([self.costs() | figures])
        # The bar estimates from the time of updates. The first evaluation alone would make the
        # first estimate ten times too long.
        self.bar.unpause()
        if "val_loss" not in figures:
            return
        if not math.isfinite(figures["val_loss"]):
            raise Diverged(f"the validation loss was not finite after update {self.step}"
                           + self.advice())
        if self.bar.disable and not self.args.quiet:
            print(f"{self.args.name}: update {self.step:,} of {self.args.steps:,}, "
                  f"{status(self.lines[-STATUS_LINES:])}", flush=True)

    def start_clock(self):
        """Start the clock unless it is running. It counts training time only."""
        if self.started is None:
            self.started = time.perf_counter()
            self.tokens_at_start = self.tokens

    def log_update(self, kind, tokens, flops, figures):
        """Count an update and remember its figures, which may be tensors, for the log."""
        self.step += 1
        self.tokens += tokens
        self.flops += flops
        line = self.costs() | {"kind": kind} | figures
        if kind == "lm":
            self.lm_steps += 1
        else:
            n_way = self.args.n_way
            line |= {"n_way": n_way, "chance": 1 / n_way}
        self.waiting.append(line)
        self.ends.append(time.perf_counter())
        if self.step % FLUSH_EVERY == 0:
            self.flush()

    def flush(self):
        """Stop the clock and log the waiting updates. Only here does the host wait for the device.
        Raises Diverged after PATIENCE updates in a row that were not finite."""
        if not self.waiting:
            return
        for line in self.waiting:
            for key, value in line.items():
                if isinstance(value, torch.Tensor):
                    line[key] = value.item()
        elapsed = time.perf_counter() - self.started
        self.add_times(elapsed)
        for line in self.waiting:
            if math.isfinite(line["loss"] + line["grad_norm"]):
                self.skipped_in_a_row = 0
            else:
                self.skipped_in_a_row += 1
                self.skipped += 1
                line["skipped"] = self.skipped
        self.seconds += elapsed
        self.started = None
        self.write(self.waiting)
        self.bar.update(len(self.waiting))
        self.bar.set_postfix_str(status(self.lines[-STATUS_LINES:]), refresh=False)
        self.waiting = []
        if self.skipped_in_a_row >= PATIENCE:
            raise Diverged(f"the loss or its gradient was not finite in {PATIENCE} updates in a "
                           f"row, up to update {self.step}" + self.advice())

    def add_times(self, elapsed):
        """Add its time and its rate to each waiting line. `elapsed` is the total time.

        On a GPU the host runs ahead of the device. So the time from one end to the next gives only
        an update's share of the total."""
        stretch = elapsed / (self.ends[-1] - self.started)
        start, tokens = self.started, self.tokens_at_start
        for line, end in zip(self.waiting, self.ends):
            line["seconds"] = self.seconds + stretch * (end - self.started)
            line["tokens_per_second"] = (line["tokens"] - tokens) / (stretch * (end - start))
            start, tokens = end, line["tokens"]
        self.ends = []

    def write(self, lines):
        self.lines += lines
        if self.log_file:
            append(self.log_file, "".join(map(json_line, lines)).encode())

    def advice(self):
        return (f": stopped; {self.folder / 'ckpt.pt'} is from before. Try a lower --lr (now "
                f"{self.args.lr:g}), a lower --inner-lr, or a longer --warmup, with another "
                "--name")

    # ---- stopping

    def note_signal(self, number, frame):
        """Ask to stop after this update. A second signal stops at once."""
        self.stop_signal = number
        at_once = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, at_once)

    def asked_to_stop(self, device):
        """Whether any process has received a signal. Several processes ask each other only when
        all updates are in the log, since asking makes them wait."""
        if processes.COUNT > 1 and self.waiting:
            return False
        return processes.any_of(self.stop_signal is not None, device)

    def stopped(self):
        """Say how to continue. Returns the exit code of a stopped run."""
        if processes.is_first():
            print(f"stopped after {self.step} of {self.args.steps} updates, and saved; "
                  "to continue: the same command with --resume", file=sys.stderr)
        return 128 + (self.stop_signal or signal.SIGTERM)


def json_line(record):
    """A line of the log. JSON has no NaN and no infinity, so they become null."""
    finite = json.loads(json.dumps(record), parse_constant=lambda name: None)
    return json.dumps(finite) + "\n"
