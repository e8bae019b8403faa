"""The status line of a run during training, and the report at its end."""
import math

from plumbing.fewshot import FEWEST_WAYS
from plumbing.logs import series
from plumbing.play import N_WAY

# The status line averages over this many updates of a kind.
RECENT = 50
# key in the log -> what it measures, key of its standard error
ACCURACIES = {
    "fewshot_prototype": ("nearest prototype", "fewshot_stderr"),
    "fewshot_before": ("meta head before adapting", None),
    "fewshot_after": ("meta head after adapting", "fewshot_after_stderr"),
}


def last_losses(lines, most=4):
    """The last validation losses of a log in words, which show whether they were still falling."""
    steps, losses = series(lines, "val_loss")
    found = [f"{loss:.3f} at update {step:,.0f}"
             for step, loss in zip(steps[-most:], losses[-most:])]
    return f"validation loss, nats per token: {', '.join(found)}"


def status(lines):
    """The state of a run on one line, from the last lines of its log. It has the newest losses, the
    mean query accuracy of recent meta updates, and the mean tokens per second of recent next-token
    updates."""
    recent = {"lm": [], "meta": [], "evaluation": []}
    skipped = None
    for line in lines:
        skipped = line.get("skipped", skipped)
        kind = line.get("kind", "evaluation")
        loss = line.get("val_loss" if kind == "evaluation" else "loss")
        if loss is not None:  # neither a probe nor skipped
            recent[kind].append(line)
    parts = []
    if recent["lm"]:
        parts.append(f"loss {recent['lm'][-1]['loss']:.2f}")
    if recent["evaluation"]:
        parts.append(f"val {recent['evaluation'][-1]['val_loss']:.2f}")
    if recent["meta"]:
        accuracy = recent_mean(recent["meta"], "query_accuracy")
        parts.append(f"query {accuracy:.0%} (chance {recent['meta'][-1]['chance']:.0%})")
    if skipped:
        parts.append(f"{skipped} skipped")
    rate = recent_mean(recent["lm"], "tokens_per_second")
    if rate:
        parts.append(f"{rate:,.0f} tok/s")
    return ", ".join(parts)


def recent_mean(lines, key):
    """The mean over those of the last RECENT lines that have the key; None if there are none."""
    values = [line[key] for line in lines[-RECENT:] if line.get(key) is not None]
    return sum(values) / len(values) if values else None


def summary(folder, lines, settings, sample, memory, question=None):
    """The report at the end of a run: its losses and accuracies, its cost, a sample of its text,
    the findings, and what to look at next. question is the result of meta.one_question."""
    evaluations = [line for line in lines if "val_loss" in line]
    first, final = evaluations[0], evaluations[-1]
    report = ["", f"validation loss {final['val_loss']:.3f} nats per token "
                  f"({final['bits_per_byte']:.3f} bits per byte); "
                  f"unigram {settings['unigram']:.3f}, "
                  f"smoothed bigram {settings['bigram']:.3f}"]
    report += fewshot_report(first, final, settings)
    if question:
        row, before, after, right = question
        report += [f"  one of the queries: {row}",
                   f"    The meta head answers {before!r} before adapting and {after!r} after it; "
                   f"{right!r} is right."]
    skipped = max(line.get("skipped") or 0 for line in lines)
    if skipped:
        report.append(f"{skipped} updates were skipped: their loss or gradient was not finite")
    minutes = final["seconds"] / 60
    report += [
        f"cost: {final['tokens']:,} tokens, {final['flops']:.3g} model FLOPs, {minutes:.1f} "
        f"minutes of training on {settings['device_name']}" + (f", {memory}" if memory else ""),
        f"sample: {sample!r}",
        f"files in {folder}: config.json, metrics.jsonl, ckpt.pt, dynamics.png", ""]
    report += findings(first, final, settings)
    return "\n".join([*report, next_command(folder, final, settings)])


def findings(first, final, settings):
    """Sentences: did the run beat the bigram, and did adapting help?"""
    lead = settings["bigram"] - final["val_loss"]
    if lead > 0:
        found = ["The model beats the bigram, which only counts pairs of tokens: its validation "
                 f"loss is {lead:.2f} nats lower."]
    else:
        found = ["The model does not beat the bigram, which only counts pairs of tokens: its "
                 f"validation loss is {-lead:.2f} nats higher."]
    if "fewshot_after" in final:
        found.append(adapting(first, final))
    return found


def adapting(first, final):
    """A sentence: did adapting help, and did training make it help more?"""
    before, after = final["fewshot_before"], final["fewshot_after"]
    error = final["fewshot_after_stderr"]
    # Two standard errors of a difference. The error of the other figure is not known and is
    # assumed to be as large.
    noise = 2 * math.sqrt(2) * error
    answers = (f"the meta head answers {before:.1%} of the queries correctly before it and "
               f"{after:.1%} after it")
    if before - after > noise:
        return f"Adapting hurts: {answers}."
    if after - before <= noise:
        return (f"Adapting makes no difference beyond noise: {answers}, with a standard error of "
                f"{error:.1%}.")
    untrained = first.get("fewshot_after")
    if untrained is None or after - untrained > noise:
        return f"Adapting helps: {answers}."
    return (f"Adapting helps, but no more than without training: {answers}, and an untrained model "
            f"reaches {untrained:.1%} in the same way.")


def next_command(folder, final, settings):
    """What to look at next, a line with one command."""
    if final["val_loss"] >= settings["bigram"]:
        return f"Next, see whether the loss was still falling: python probe.py {folder}"
    if "fewshot_after" not in final:
        return f'Next, read what it writes: python model.py {folder} --prompt "Returns the"'
    ways = f" --n-way {settings['n_way']}" if settings["n_way"] < N_WAY else ""
    return f"Next, answer some queries yourself: python meta.py {folder} --play{ways}"


def fewshot_report(first, final, settings):
    """Lines on few-shot accuracy, from the first and the final evaluation line."""
    if "fewshot_chance" not in final:
        return ["no few-shot accuracy: the validation text has too few held-out words, even for "
                f"{min(settings['n_way'], FEWEST_WAYS)}-way episodes"]
    ways = round(1 / final["fewshot_chance"])
    lines = [f"few-shot accuracy on held-out words, {ways}-way {settings['k_shot']}-shot, chance "
             f"{final['fewshot_chance']:.1%}:"]
    if ways < settings["n_way"]:  # see fewshot_episodes
        lines.append(f"  (not {settings['n_way']}-way: only {ways} held-out words occur often "
                     "enough in the validation text)")
    for key, (name, error) in ACCURACIES.items():
        if key in final:
            spread = f" +- {final[error]:.1%}" if error else ""
            row = f"  {name:<26} {final[key]:6.1%}{spread}"
            if first.get(key) is not None:  # always so, unless the log was edited
                row += f"   (untrained {first[key]:.1%})"
            lines.append(row)
    lines.append(f"  {'previous-token look-up':<26} {final['fewshot_lookup']:6.1%}")
    note = "  prototypes are scored on new queries only, where the look-up has to guess"
    if "fewshot_after_new" in final:
        note += f"; there the meta head gets {final['fewshot_after_new']:.1%}"
    return [*lines, note]
