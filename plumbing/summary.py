"""What a run came to: the status line while it goes on, and the report at its end."""

# key in the log -> what it measures, key of its standard error
ACCURACIES = {
    "fewshot_prototype": ("nearest prototype", "fewshot_stderr"),
    "fewshot_before": ("meta head before adapting", None),
    "fewshot_after": ("meta head after adapting", "fewshot_after_stderr"),
}


def status(lines):
    """The newest figures in the last lines of a log, on one line."""
    newest, rate, skipped = {}, None, None
    for line in lines:
        kind = line.get("kind", "evaluation")
        loss = line.get("val_loss" if kind == "evaluation" else "loss")
        if loss is not None:  # neither a probe nor skipped
            newest[kind] = line
        rate = line.get("tokens_per_second", rate)
        skipped = line.get("skipped", skipped)
    parts = []
    if "lm" in newest:
        parts.append(f"loss {newest['lm']['loss']:.2f}")
    if "evaluation" in newest:
        parts.append(f"val {newest['evaluation']['val_loss']:.2f}")
    if "meta" in newest:
        meta = newest["meta"]
        parts.append(f"query {meta['query_accuracy']:.0%} (chance {meta['chance']:.0%})")
    if skipped:
        parts.append(f"{skipped} skipped")
    if rate:
        parts.append(f"{rate:,.0f} tok/s")
    return ", ".join(parts)


def summary(folder, lines, settings, sample, memory):
    """The report at the end of a run: what was reached, what it cost, a sample of its text, and
    what to do next."""
    evaluations = [line for line in lines if "val_loss" in line]
    first, final = evaluations[0], evaluations[-1]
    report = ["", f"validation loss {final['val_loss']:.3f} nats per token "
                  f"({final['bits_per_byte']:.3f} bits per byte); "
                  f"unigram {settings['unigram']:.3f}, "
                  f"smoothed bigram {settings['bigram']:.3f}"]
    report += fewshot_report(first, final, settings)
    skipped = max(line.get("skipped") or 0 for line in lines)
    if skipped:
        report.append(f"{skipped} updates were skipped: their loss or gradient was not finite")
    minutes = final["seconds"] / 60
    report += [
        f"cost: {final['tokens']:,} tokens, {final['flops']:.3g} model FLOPs, {minutes:.1f} "
        f"minutes of training on {settings['device_name']}" + (f", {memory}" if memory else ""),
        f"sample: {sample!r}",
        f"files in {folder}: config.json, metrics.jsonl, ckpt.pt, dynamics.png",
        f'next: python model.py {folder} --prompt "Returns the"   or   python probe.py {folder}']
    return "\n".join(report)


def fewshot_report(first, final, settings):
    """Lines on few-shot accuracy, from the first and the final evaluation line."""
    if "fewshot_chance" not in final:
        return ["no few-shot accuracy: the validation text has too few held-out words for "
                f"{settings['n_way']}-way episodes"]
    lines = [f"few-shot accuracy on held-out words, {settings['n_way']}-way "
             f"{settings['k_shot']}-shot, chance {final['fewshot_chance']:.1%}:"]
    for key, (name, error) in ACCURACIES.items():
        if key in final:
            spread = f" +- {final[error]:.1%}" if error else ""
            row = f"  {name:<26} {final[key]:6.1%}{spread}"
            if first.get(key) is not None:  # as it is in a log that nobody has edited
                row += f"   (untrained {first[key]:.1%})"
            lines.append(row)
    note = "prototypes are scored only where the previous token appears before no support word"
    if "fewshot_after_new" in final:
        note += f"; there the meta head has {final['fewshot_after_new']:.1%}"
    lines.append(f"  {'previous-token look-up':<26} {final['fewshot_lookup']:6.1%}   ({note})")
    return lines
