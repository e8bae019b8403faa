"""The status line of a run that goes on, and the report at its end."""
from plumbing.summary import status, summary


def test_status_holds_the_newest_of_each_kind():
    """After an evaluation and a probe, whose lines hold no losses and no rate."""
    lines = [{"kind": "lm", "loss": 5.0, "tokens_per_second": 10.0},
             {"kind": "meta", "loss": 3.0, "query_accuracy": 0.25, "chance": 0.125,
              "tokens_per_second": 2000.0},
             {"kind": "lm", "loss": 4.0, "skipped": 2, "tokens_per_second": 3000.0},
             {"head_entropy": {}},
             {"val_loss": 4.5}]
    expected = "loss 4.00, val 4.50, query 25% (chance 12%), 2 skipped, 3,000 tok/s"
    assert status(lines) == expected
    assert status(lines[-1:]) == "val 4.50"


def test_summary_tells_the_end_the_start_and_the_cost():
    settings = {"n_way": 8, "k_shot": 4, "device_name": "a computer", "unigram": 7.0,
                "bigram": 6.5}
    before = {"val_loss": 8.0, "bits_per_byte": 4.0, "fewshot_prototype": 0.15,
              "fewshot_stderr": 0.02, "fewshot_lookup": 0.1, "fewshot_chance": 0.125}
    after = before | {"val_loss": 5.5, "bits_per_byte": 2.25, "fewshot_prototype": 0.4,
                      "fewshot_stderr": 0.01, "tokens": 12_000, "flops": 3.21e9,
                      "seconds": 90.0}
    lines = [before, {"kind": "lm", "loss": 6.0}, {"kind": "lm", "loss": None, "skipped": 3}, after]
    text = summary("runs/mine", lines, settings, "some text", "peak memory 0.5 GiB")
    assert "validation loss 5.500 nats per token (2.250 bits per byte)" in text
    assert "unigram 7.000, smoothed bigram 6.500" in text
    assert "8-way 4-shot, chance 12.5%" in text
    row, = [line for line in text.splitlines() if "nearest prototype" in line]
    assert row.split() == ["nearest", "prototype", "40.0%", "+-", "1.0%", "(untrained", "15.0%)"]
    assert "3 updates were skipped" in text
    assert ("cost: 12,000 tokens, 3.21e+09 model FLOPs, 1.5 minutes of training on a computer, "
            "peak memory 0.5 GiB") in text
    assert "sample: 'some text'" in text
    assert "python probe.py runs/mine" in text


def test_status_keeps_the_last_loss_after_a_skipped_update():
    lines = [{"kind": "lm", "loss": 4.0}, {"kind": "lm", "loss": None, "skipped": 1}]
    assert status(lines) == "loss 4.00, 1 skipped"
