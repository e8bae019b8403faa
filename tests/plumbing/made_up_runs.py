"""Runs whose curves are known exactly, for the tests of comparison, logs and pictures."""
import math


def made_up_run(name, speed, seed=0, corpus="a", flops_per_step=10):
    """(settings, lines) of a run whose held-out loss is 10 - ln(1 + speed * step): of two such
    runs the second needs as many times less steps for a loss as its speed is higher."""
    settings = {"name": name, "steps": 1000, "size": "11m", "seed": seed, "corpus_sha256": corpus,
                "vocab_size": 99, "tokenizer": "bpe", "meta": speed > 1}
    lines = []
    for step in range(0, 1001, 10):
        loss = 10 - math.log(1 + speed * step)
        costs = {"step": step, "tokens": 5 * step, "flops": flops_per_step * step,
                 "seconds": 2.0 * step}
        lines.append(costs | {"val_loss": loss, "bits_per_byte": loss / 4,
                              "fewshot_prototype": 0.2, "fewshot_stderr": 0.01,
                              "fewshot_chance": 0.1})
        lines.append(costs | {"kind": "lm", "loss": loss})
    return settings, lines
