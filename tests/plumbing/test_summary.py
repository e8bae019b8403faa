"""The status line of a run that goes on, and the report at its end."""
import pytest

from plumbing.summary import last_losses, status, summary

SETTINGS = {"n_way": 8, "k_shot": 4, "device_name": "a computer", "unigram": 7.0, "bigram": 6.5}


def test_status_holds_the_newest_of_each_kind():
    """After an evaluation and a probe, whose lines hold no losses and no rate."""
    lines = [{"kind": "lm", "loss": 5.0, "tokens_per_second": 1000.0},
             {"kind": "meta", "loss": 3.0, "query_accuracy": 0.25, "chance": 0.125,
              "tokens_per_second": 80_000.0},
             {"kind": "lm", "loss": 4.0, "skipped": 2, "tokens_per_second": 3000.0},
             {"head_entropy": {}},
             {"val_loss": 4.5}]
    expected = "loss 4.00, val 4.50, query 25% (chance 12%), 2 skipped, 2,000 tok/s"
    assert status(lines) == expected
    assert status(lines[-1:]) == "val 4.50"


def test_the_last_losses_show_whether_they_still_fell():
    lines = [{"step": 1000 * i, "val_loss": 9.0 - i} for i in range(5)]
    lines.insert(3, {"step": 2500, "loss": 1.0})
    assert last_losses(lines, most=2) == (
        "validation loss, nats per token: 6.000 at update 3,000, 5.000 at update 4,000")
    assert last_losses(lines[:1]) == "validation loss, nats per token: 9.000 at update 0"


def test_status_averages_recent_updates_of_a_kind():
    """The newest 50 of each kind, whatever stands between them."""
    lines = []
    for number in range(100):
        # 0 and 100 % in turn, after fifty updates at 10 %
        accuracy = number % 2 if number >= 50 else 0.1
        rate = 2000 + 1000 * (number % 2) if number >= 50 else 9.0
        lines.append({"kind": "meta", "loss": 3.0, "query_accuracy": accuracy, "chance": 0.25,
                      "tokens_per_second": 70_000.0})
        lines.append({"kind": "lm", "loss": 4.0, "tokens_per_second": rate})
    assert status(lines) == "loss 4.00, query 50% (chance 25%), 2,500 tok/s"


def test_status_keeps_the_last_loss_after_a_skipped_update():
    lines = [{"kind": "lm", "loss": 4.0, "tokens_per_second": 10.0},
             {"kind": "lm", "loss": None, "skipped": 1, "tokens_per_second": 99.0}]
    assert status(lines) == "loss 4.00, 1 skipped, 10 tok/s"


def test_summary_tells_the_end_the_start_and_the_cost():
    settings = SETTINGS
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
    assert text.endswith('python model.py runs/mine --prompt "Returns the"')


# ---- what was found, and what to look at next --------------------------------------------------

def evaluation(**figures):
    """An evaluation line of a meta run that beats the bigram and learns to adapt."""
    return {"val_loss": 5.5, "bits_per_byte": 2.25, "tokens": 1, "flops": 1, "seconds": 1.0,
            "fewshot_chance": 0.125, "fewshot_prototype": 0.2, "fewshot_stderr": 0.01,
            "fewshot_lookup": 0.1, "fewshot_before": 0.13, "fewshot_after": 0.3,
            "fewshot_after_stderr": 0.01} | figures


def report(line, question=None, untrained=0.125, **settings):
    """The summary of a run whose meta head was right in so many of the queries, after adapting,
    when it was untrained."""
    lines = [line | {"fewshot_after": untrained}, line]
    return summary("runs/mine", lines, SETTINGS | settings, "", "", question)


def test_summary_says_whether_the_run_beat_the_bigram():
    better = report(evaluation(val_loss=6.3))
    assert "The model beats the bigram" in better
    assert "0.20 nats lower" in better
    worse = report(evaluation(val_loss=6.75))
    assert "does not beat the bigram" in worse
    assert "0.25 nats higher" in worse
    assert worse.splitlines()[-1].endswith("python probe.py runs/mine")


@pytest.mark.parametrize("after, said", [
    (0.159, "Adapting helps"), (0.157, "no difference beyond noise"),
    (0.103, "no difference beyond noise"), (0.101, "Adapting hurts")])
def test_summary_says_whether_adapting_helped_beyond_noise(after, said):
    """Two standard errors of a difference of figures that have 0.01 each: 0.0283."""
    text = report(evaluation(fewshot_after=after))
    verdicts = [said for said in ("Adapting helps", "no difference beyond noise",
                                  "Adapting hurts") if said in text]
    assert verdicts == [said]
    assert f"{after:.1%}" in text.splitlines()[-2]


@pytest.mark.parametrize("untrained, no_more", [(0.271, False), (0.273, True), (0.4, True)])
def test_adapting_that_helps_no_more_than_without_training_is_called_so(untrained, no_more):
    """As when nearly all labels are 0: see the exercise of the README."""
    text = report(evaluation(), untrained=untrained)
    assert "Adapting helps" in text
    assert ("no more than without training" in text) == no_more
    assert (f"reaches {untrained:.1%}" in text) == no_more


def test_summary_of_a_meta_run_ends_with_the_game():
    assert report(evaluation()).splitlines()[-1].endswith("python meta.py runs/mine --play")
    # Where the meta head has too few slots for the usual game, the command says so.
    last = report(evaluation(fewshot_chance=0.5), n_way=2).splitlines()[-1]
    assert last.endswith("python meta.py runs/mine --play --n-way 2")


def test_summary_says_how_many_ways_the_words_allowed():
    assert "8-way 4-shot, chance 12.5%" in report(evaluation())
    assert "not 8-way" not in report(evaluation())
    fewer = report(evaluation(fewshot_chance=1 / 5))
    assert "5-way 4-shot, chance 20.0%" in fewer
    assert "not 8-way: only 5 held-out words" in fewer
    none = evaluation()
    for key in [key for key in none if key.startswith("fewshot")]:
        del none[key]
    text = summary("runs/mine", [none], SETTINGS, "", "")
    assert "no few-shot accuracy" in text
    assert "Adapting" not in text


def test_summary_shows_one_query_in_words():
    text = report(evaluation(), ("returns a <mask>", "list", "tuple", "dict"))
    assert "one of the queries: returns a <mask>" in text
    assert "answers 'list' before adapting and 'tuple' after it; 'dict' is right" in text
    assert "one of the queries" not in report(evaluation())
