"""An episode in words: how it is printed, played and scored.

Letters stand for the words until the end. So a person sees what the model sees: rows of text, and
which of them belong together.
"""
import math
import string
import sys
import textwrap
from dataclasses import dataclass

LETTERS = string.ascii_uppercase
# The default number of words in an episode to play, few enough for a person to remember.
N_WAY = 4
# The largest episode that fits on a screen: words, and support rows and queries for each.
MOST_WAYS, MOST_SHOTS, MOST_QUERIES = 8, 8, 3
# Columns of a printed row of text.
WIDTH = 96


@dataclass
class EpisodeInWords:
    """An episode of data.py as text. Labels are numbers from 0 to N-1.

    words    N strings
    support  pairs (label, row), grouped by label
    queries  rows
    answers  the label of each query
    """
    words: list
    support: list
    queries: list
    answers: list


@dataclass
class Player:
    """A person or a method, and its answers to an episode. guesses holds a label or None (no
    answer) for each query. support_loss is in nats, or None if there is no such loss."""
    name: str
    guesses: list
    support_loss: float | None = None


# ---- the episode -------------------------------------------------------------------------------

def show_episode(episode):
    """All of an episode: the support set, the queries and then the answers."""
    answers = [f"{number} {letter_of(label)}" for number, label in enumerate(episode.answers, 1)]
    return "\n".join([unanswered(episode), "", "right answers: " + ", ".join(answers),
                      named_words(episode)])


def unanswered(episode):
    """The support set and the queries."""
    lines = [support_set(episode), "", query_heading(episode)]
    for number, row in enumerate(episode.queries, start=1):
        lines.append(indented(f"{number:>4}  ... ", row))
    return "\n".join(lines)


def support_set(episode):
    n_way = len(episode.words)
    lines = [f"An episode: the letters {letters_of(n_way)} stand for {n_way} hidden words. A "
             "<mask>", "takes the place of one of them, and each row ends with one.", "",
             "Support set: the letter of the word is given."]
    for label, row in episode.support:
        lines.append(indented(f"   {LETTERS[label]}  ... ", row))
    return "\n".join(lines)


def query_heading(episode):
    return f"Queries: which word, {letters_of(len(episode.words))}, does the <mask> hide?"


def letters_of(n_way):
    return f"{LETTERS[0]} to {LETTERS[n_way - 1]}"


def named_words(episode):
    named = [f"{letter} = {word}" for letter, word in zip(LETTERS, episode.words)]
    return "the words: " + ", ".join(named)


def indented(start, row):
    """A row of text after `start`, in as many lines as it takes."""
    return textwrap.fill(row, WIDTH, initial_indent=start, subsequent_indent=" " * len(start),
                         break_on_hyphens=False)


# ---- the game ----------------------------------------------------------------------------------

def play(episode):
    """Ask the person at the terminal. Returns their guesses, one for each query. Ctrl-D ends the
    game, and the guess for each remaining query is None."""
    print(support_set(episode), "", query_heading(episode), sep="\n")
    print("Type a letter and press Enter. Enter alone skips a query, ? shows the support set "
          "again, and", "Ctrl-D ends the game.", sep="\n")
    guesses = []
    try:
        for number, row in enumerate(episode.queries, start=1):
            print("\n" + indented(f"{number:>4}  ... ", row))
            guesses.append(ask(episode))
    except EOFError:
        print()
    return guesses + [None] * (len(episode.queries) - len(guesses))


def ask(episode):
    """The label that a person types, or None for a bare Enter. Asks again after anything else."""
    n_way = len(episode.words)
    while True:
        try:
            typed = input("      your answer: ").strip().upper()
        except UnicodeDecodeError:
            typed = "not a letter"
        if not typed:
            return None
        if typed == "?":
            print("", support_set(episode), "", sep="\n")
        elif typed in tuple(LETTERS[:n_way]):
            return LETTERS.index(typed)
        else:
            print(f"      Type a letter from {letters_of(n_way)}.")


# ---- the table ---------------------------------------------------------------------------------

def present(episode, players, asks):
    """Print an episode and the answers of the Players. If `asks`, the person at the terminal
    answers first. Without a terminal, print only the table."""
    if sys.stdin and sys.stdin.isatty():
        if asks:
            players = [Player("you", play(episode)), *players]
        else:
            print(unanswered(episode))
        print()
    print(answer_table(episode, players))


def answer_table(episode, players):
    """The answers: a row for each Player, a column for each query, and then the words."""
    n_way, n_queries = len(episode.words), len(episode.queries)
    has_meta_head = any(player.support_loss is not None for player in players)
    heading = row_of_table("query", range(1, n_queries + 1)) + "   right"
    lines = [heading + ("    support loss" if has_meta_head else "")]
    for player in players:
        right = sum(guess == label for guess, label in zip(player.guesses, episode.answers))
        line = row_of_table(player.name, map(letter_of, player.guesses))
        line += f"   {right:>2} of {n_queries}"
        if player.support_loss is not None:
            line += f"   {player.support_loss:.3f} nats"
        lines.append(line)
    lines += [row_of_table("right answers", map(letter_of, episode.answers)), "",
              named_words(episode)]
    guessing = f"Guessing gives {n_queries / n_way:.3g} of {n_queries}"
    if has_meta_head:
        guessing += f", and a support loss of ln {n_way} = {math.log(n_way):.3f} nats"
    lines += [guessing + ".",
              "\"-\" means no answer: the look-up only knows tokens that come right before a last "
              "<mask> of", "the support set. In averages it counts as a guess."]
    if not has_meta_head:
        lines.append("This run has no meta head: train.py --meta makes one.")
    return "\n".join(lines)


def row_of_table(name, cells):
    return f"{name:<25}" + "".join(f"{cell:>3}" for cell in cells)


def letter_of(guess):
    return "-" if guess is None else LETTERS[guess]
