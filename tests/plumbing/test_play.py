"""An episode in words: what is printed, asked and scored."""
import io

import pytest

from plumbing import play
from plumbing.play import EpisodeInWords, Player

# Three words with two rows each, and a query for each of them.
EPISODE = EpisodeInWords(
    words=["array", "list", "string"],
    support=[(0, "one <mask>"), (0, "two <mask>"), (1, "three <mask>"), (1, "four <mask>"),
             (2, "five <mask>"), (2, "six <mask>")],
    queries=["seven <mask>", "eight <mask>", "nine <mask>"],
    answers=[2, 0, 1])
PLAYERS = [Player("nearest prototype", [2, 0, 0]), Player("meta head", [None, 0, 1], 0.75)]


class Terminal(io.StringIO):
    """Standard input at a terminal, with what a person types."""

    def isatty(self):
        return True


@pytest.fixture
def typed(monkeypatch):
    """typed(text): a person types it at the terminal."""
    def type_it(text):
        monkeypatch.setattr("sys.stdin", Terminal(text))
    return type_it


def row_of(table, name):
    """What stands after the name in its row of a table of answers, a list of strings."""
    line, = [line for line in table.splitlines() if line.startswith(f"{name} ")]
    return line[len(name):].split()


# ---- the episode -------------------------------------------------------------------------------

def test_an_episode_names_its_words_at_the_end_alone():
    shown = play.show_episode(EPISODE)
    rows, answers = shown.split("right answers: ")
    for word in EPISODE.words:
        assert word not in rows
    for letter, row in (("A", "two"), ("B", "four"), ("C", "five")):
        assert f" {letter}  ... {row} <mask>\n" in rows
    assert "2  ... eight <mask>" in rows
    assert answers == "1 C, 2 A, 3 B\nthe words: A = array, B = list, C = string"


def test_long_rows_are_broken_at_spaces():
    row = "word " * 60 + "<mask>"
    lines = play.indented("   A  ", row).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= play.WIDTH
    assert " ".join(line[6:] for line in lines) == row


# ---- the game ----------------------------------------------------------------------------------

def test_a_person_answers_and_skips_and_is_asked_again(typed, capsys):
    typed("c\n\nd\nab\n A \n")
    assert play.play(EPISODE) == [2, None, 0]
    shown = capsys.readouterr().out
    assert shown.count("your answer") == 5
    assert shown.count("Type a letter from A to C") == 2
    assert not [word for word in EPISODE.words if word in shown]


def test_a_question_mark_shows_the_support_set_again(typed, capsys):
    typed("?\nA\n\n\n")
    assert play.play(EPISODE) == [0, None, None]
    assert capsys.readouterr().out.count("... six <mask>") == 2


def test_the_end_of_the_input_ends_the_game(typed):
    typed("b\n")
    assert play.play(EPISODE) == [1, None, None]


def test_bytes_that_are_no_text_are_asked_again(monkeypatch, capsys):
    answers = iter([b"\xff", b"B", b"B", b"B"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers).decode())
    assert play.play(EPISODE) == [1, 1, 1]
    assert "Type a letter from A to C" in capsys.readouterr().out


def test_ctrl_c_leaves_the_game(monkeypatch):
    def interrupted(prompt):
        raise KeyboardInterrupt
    monkeypatch.setattr("builtins.input", interrupted)
    with pytest.raises(KeyboardInterrupt):
        play.play(EPISODE)


# ---- the table ---------------------------------------------------------------------------------

def test_the_table_counts_right_answers():
    table = play.answer_table(EPISODE, PLAYERS)
    assert row_of(table, "nearest prototype") == "C A A 2 of 3".split()
    assert row_of(table, "meta head") == "- A B 2 of 3 0.750 nats".split()
    assert row_of(table, "right answers") == "C A B".split()
    assert "the words: A = array, B = list, C = string" in table
    assert "ln 3 = 1.099" in table
    assert "Guessing gives 1 of 3" in table


def test_the_table_of_a_run_without_meta_head_says_so():
    table = play.answer_table(EPISODE, PLAYERS[:1])
    assert "no meta head" in table
    assert "support loss" not in table


def test_at_a_terminal_the_person_is_the_first_player(typed, capsys):
    typed("C\nA\n\n")
    play.present(EPISODE, PLAYERS, asks=True)
    shown = capsys.readouterr().out
    assert row_of(shown, "you") == "C A - 2 of 3".split()
    assert shown.index("\nyou ") < shown.index("\nnearest prototype ")


def test_without_play_nothing_is_asked(typed, capsys):
    typed("")
    play.present(EPISODE, PLAYERS, asks=False)
    shown = capsys.readouterr().out
    assert "... seven <mask>" in shown
    assert "your answer" not in shown
    assert shown.endswith(play.answer_table(EPISODE, PLAYERS) + "\n")


@pytest.mark.parametrize("stdin", [io.StringIO("A\nA\nA\n"), None])
@pytest.mark.parametrize("asks", [True, False])
def test_without_a_terminal_there_is_the_table_alone(monkeypatch, capsys, stdin, asks):
    monkeypatch.setattr("sys.stdin", stdin)
    play.present(EPISODE, PLAYERS, asks)
    assert capsys.readouterr().out == play.answer_table(EPISODE, PLAYERS) + "\n"
