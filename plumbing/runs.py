"""A run's folder while it is trained: opening or resuming it, its log, its checkpoints.

    config.json    every flag, and what was trained on
    metrics.jsonl  the log, a JSON object a line
    ckpt.pt        the newest checkpoint; ckpt-previous.pt is the one before
"""
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
from plumbing.commands import UserError
from plumbing.files import TEMPORARY, lock_folder, write_atomically
from plumbing.logs import read_metrics, read_settings
from plumbing.summary import status

# These flags may differ when a run is resumed.
FREE_FLAGS = {"runs", "name", "resume", "device", "quiet", "cache", "steps"}
# Updates between two looks at the losses. On a GPU a look waits for the device.
FLUSH_EVERY = 10
# After this many updates in a row whose loss or gradient is not finite, a run is given up.
PATIENCE = 10
# The status line is made of the last lines of the log.
STATUS_LINES = 1000


class Diverged(Exception):
    """Training cannot go on. The message says what to try."""


# ---- opening -----------------------------------------------------------------------------------

def open_run(args, settings, prepared_text):
    """The Run of these flags (argparse's namespace) and settings (the future config.json): a new
    one, or one that goes on from its last checkpoint. prepared_text is the folder of its
    tokenizer. Raises UserError if the run's folder cannot be used."""
    folder = Path(args.runs) / args.name
    config = folder / "config.json"
    if folder.exists() and not config.exists() and holds_files(folder):
        raise UserError(f"{folder} holds files but no run: choose another --name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder) if processes.is_first() else None
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): "
                        "choose another --runs") from None
    checkpoint = None
    if config.exists():
        check_settings(folder, args, settings)
        checkpoint = find_checkpoint(folder, args)
    step = checkpoint["step"] if checkpoint else 0
    if not processes.all_agree((settings["corpus_sha256"], step)):
        raise UserError("the processes have different texts or checkpoints: put "
                        f"--runs {args.runs} and --data where all machines see them")
    return Run(folder, settings, checkpoint, lock, prepared_text)


def holds_files(folder):
    """Whether a folder holds anything but what a run killed while starting leaves."""
    return any(path.name != ".lock" and path.suffix != TEMPORARY for path in folder.iterdir())


def check_settings(folder, args, settings):
    """Raise UserError unless the run in the folder was made with the same flags and text."""
    try:
        old = read_settings(folder)
    except UserError:
        raise UserError(f"{folder / 'config.json'} cannot be read: "
                        "choose another --name") from None
    if "model_type" in old:
        raise UserError(f"{folder} holds an imported model, which cannot be trained further: "
                        "choose another --name")
    changes = []
    for flag in vars(args):
        if flag not in FREE_FLAGS and old.get(flag) != settings[flag]:
            name = "--" + flag.replace("_", "-")
            changes.append(f"{name} {old.get(flag)} there, {settings[flag]} now")
    if changes:
        raise UserError(f"{folder} holds another configuration ({', '.join(changes)}): give the "
                        "flags it was made with, or choose another --name")
    if old.get("corpus_sha256") != settings["corpus_sha256"]:
        raise UserError(f"{folder} was trained on another text (its SHA-256 differs): "
                        "choose another --name")


def find_checkpoint(folder, args):
    """The checkpoint to go on from; None if the run was stopped before its first. Ends the
    process if the run is finished. Raises UserError."""
    if not any(folder.glob("ckpt*.pt")):
        lines, _ = read_metrics(folder / "metrics.jsonl")
        if any("kind" in line for line in lines):
            raise UserError(f"the checkpoints of {folder} are gone, and it cannot be continued: "
                            "choose another --name")
        return None
    checkpoint = load_checkpoint(folder)
    step = checkpoint["step"]
    if step >= args.steps:
        if processes.is_first():
            print(f"{folder} is finished ({step} updates). Look: python probe.py {folder}; "
                  "go on: --resume with more --steps; start over: --name NAME")
        sys.exit(0)
    if not args.resume:
        raise UserError(f"{folder} has stopped at update {step} of {args.steps}: "
                        "add --resume to continue, or choose another --name")
    return checkpoint


# ---- training ----------------------------------------------------------------------------------

class Run:
    """One run, with what its updates have cost so far.

    step      updates done
    lm_steps  next-token updates among them
    tokens, flops, seconds  spent in updates, over all processes
    skipped   updates whose loss or gradient was not finite
    lines     the lines of the log, a list of dicts
    """

    def __init__(self, folder, settings, checkpoint, lock, prepared_text):
        self.folder, self.settings = folder, settings
        self.checkpoint, self.lock = checkpoint, lock
        spent = checkpoint["spent"] if checkpoint else {}
        self.step = spent.get("step", 0)
        self.lm_steps = spent.get("lm_steps", 0)
        self.tokens = spent.get("tokens", 0)
        self.flops = spent.get("flops", 0)
        self.seconds = spent.get("seconds", 0.0)
        self.skipped = spent.get("skipped", 0)
        self.skipped_in_a_row = 0
        self.lines = []
        self.waiting = []     # log lines of updates that hold tensors still
        self.started = None   # the clock: when the first of these began
        self.log_file = None
        self.tokenizer_file = prepared_text / tokenizer.FILE
        hidden = settings["quiet"] or not processes.is_first()
        self.bar = tqdm(total=settings["steps"], initial=self.step, desc=settings["name"],
                        unit="step", disable=True if hidden else None)
        self.stop_signal = None
        self.old_handlers = {number: signal.signal(number, self.note_signal)
                             for number in (signal.SIGINT, signal.SIGTERM)}

    def close(self):
        """Let go of the folder, so that a notebook can train in it again."""
        self.bar.close()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        for file in (self.log_file, self.lock):
            if file:
                file.close()

    def open_log(self):
        """Open metrics.jsonl to append, without a torn last line and without what came after the
        checkpoint."""
        path = self.folder / "metrics.jsonl"
        last = self.step if self.checkpoint else -1
        lines, _ = read_metrics(path)
        self.lines = [line for line in lines if line["step"] <= last]
        write_atomically(path, "".join(map(json_line, self.lines)))
        self.log_file = open(path, "ab", buffering=0)

    def restore(self, decoder, meta_head, optimizer):
        """Load the checkpoint, if the run goes on from one. Only then begin to write."""
        if self.checkpoint:
            decoder.load_state_dict(self.checkpoint["model"])
            optimizer.load_state_dict(self.checkpoint["optimizer"])
            if meta_head is not None:
                meta_head.load_state_dict(self.checkpoint["head"])
        if processes.is_first():
            # config.json comes first: a folder without it is no run of ours.
            write_atomically(self.folder / "config.json", json.dumps(self.settings, indent=1))
            tokens = self.tokenizer_file.read_bytes()
            write_atomically(self.folder / tokenizer.FILE, tokens)
            self.open_log()
        self.checkpoint = None  # its memory is free again

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
        """Whether this process has still to log a figure, such as "val_loss", at this step."""
        same_step = [line for line in self.lines[-3:] if line["step"] == self.step]
        return processes.is_first() and not any(figure in line for line in same_step)

    def log(self, figures):
        """Log the figures of a probe or an evaluation at this step. Raises Diverged if the
        validation loss is not finite, so that such weights are not saved over good ones."""
        self.write([self.costs() | figures])
        if "val_loss" not in figures:
            return
        if not math.isfinite(figures["val_loss"]):
            raise Diverged(f"the validation loss was not finite after update {self.step}"
                           + self.advice())
        if self.bar.disable and not self.settings["quiet"]:
            print(f"{self.settings['name']}: update {self.step:,} of {self.settings['steps']:,}, "
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
            n_way = self.settings["n_way"]
            line |= {"n_way": n_way, "chance": 1 / n_way}
        self.waiting.append(line)
        if self.step % FLUSH_EVERY == 0:
            self.flush()

    def flush(self):
        """Stop the clock and log the updates that wait. Here, and only here, the host waits for
        the device. Raises Diverged after PATIENCE updates in a row that were not finite."""
        if not self.waiting:
            return
        for line in self.waiting:
            for key, value in line.items():
                if isinstance(value, torch.Tensor):
                    line[key] = value.item()
        elapsed = time.perf_counter() - self.started
        rate = (self.tokens - self.tokens_at_start) / elapsed
        for number, line in enumerate(self.waiting, start=1):
            line["seconds"] = self.seconds + elapsed * number / len(self.waiting)
            line["tokens_per_second"] = rate
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

    def write(self, lines):
        self.lines += lines
        if self.log_file:
            content = "".join(map(json_line, lines)).encode()
            while content:  # a write to a full disk may take a part only, and then fail
                content = content[self.log_file.write(content):]

    def advice(self):
        return (f": stopped; {self.folder / 'ckpt.pt'} is from before. Try a lower --lr (it is "
                f"{self.settings['lr']:g}), a lower --inner-lr, or a longer --warmup, with another "
                "--name")

    # ---- stopping

    def note_signal(self, number, frame):
        """Ask to stop after this update. A second signal stops at once."""
        self.stop_signal = number
        at_once = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, at_once)

    def asked_to_stop(self, device):
        """Whether a signal has reached any process. Several processes ask each other only when
        all updates are in the log, since each question makes them wait."""
        if processes.COUNT > 1 and self.waiting:
            return False
        return processes.any_of(self.stop_signal is not None, device)

    def stopped(self):
        """Say how to go on; returns the exit code of a stopped run."""
        if processes.is_first():
            print(f"stopped after {self.step} of {self.settings['steps']} updates, saved; "
                  "to continue: the same command with --resume", file=sys.stderr)
        return 128 + (self.stop_signal or signal.SIGTERM)


def json_line(record):
    """A line of the log. JSON has no NaN and no infinity, so they become null."""
    finite = json.loads(json.dumps(record), parse_constant=lambda name: None)
    return json.dumps(finite) + "\n"
