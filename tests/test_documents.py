"""The README and the other documents: their commands exist, their links lead somewhere, and they
stay short and narrow. The help of train.py, which begins with commands, is read like a document."""
import importlib
import re
import shlex
import sys

import pytest

from conftest import ROOT
from plumbing import train_flags

DOCUMENTS = ["README.md", "docs/results.md", "docs/teaching.md"]
SCRIPTS = ["data", "model", "meta", "probe", "train", "ner", "experiments"]
README_LINES, README_WORDS = 380, 3800
WIDEST_LINE = 100


def commands_in(text):
    """The indented command lines of a document that run one of our scripts, as lists of words. A
    backslash at the end of a line continues it. Commands in `backticks` count as well."""
    text = re.sub(r"\\\n *", "", text)
    lines = re.findall(r"^ {2,}(.+)$", text, re.MULTILINE)
    lines += re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in lines:
        line = line.strip().lstrip("!").split("  ")[0].split("#")[0]
        match = re.search(r"(?:^python |^torchrun .*?)(\w+)\.py(?= |$)(.*)", line)
        if match and match[1] in SCRIPTS:
            found.append([match[1], *shlex.split(match[2])])
    return found


def anchors_of(text):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def parse(monkeypatch, script, flags):
    """Let a script read its flags, and do nothing else."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    monkeypatch.syspath_prepend(ROOT / "docs")  # for experiments.py
    importlib.import_module(script).parse()


@pytest.mark.parametrize("document, at_least", list(zip(DOCUMENTS, (25, 8, 5))))
def test_commands_have_only_flags_that_exist(document, at_least, monkeypatch):
    commands = commands_in((ROOT / document).read_text())
    assert len(commands) >= at_least
    for script, *flags in commands:
        flags = [flag.replace("$seed", "0") for flag in flags]
        removed = "--joint" in flags  # docs/results.md tells at which commit it was there
        if not removed and flags != ["--help"]:
            parse(monkeypatch, script, flags)


def test_a_flag_that_does_not_exist_is_noticed(monkeypatch, capsys):
    [(script, *flags)] = commands_in("text\n\n    python train.py --size 11m \\\n        --metta\n")
    with pytest.raises(SystemExit):
        parse(monkeypatch, script, flags)
    assert "--metta" in capsys.readouterr().err


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    for target in targets:
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors_of(file.read_text()), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_are_narrow(document):
    """Tables and links may be wide."""
    for line in (ROOT / document).read_text().splitlines():
        assert len(line) <= WIDEST_LINE or line.startswith("|") or "](" in line, line


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= README_LINES
    assert len(text.split()) <= README_WORDS


def test_help_of_train_begins_with_three_commands(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(monkeypatch, "train", ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    before_flags = text[:text.index("options:")]
    assert [command[0] for command in commands_in(before_flags)] == ["train"] * 3
    assert before_flags.count(" minutes") >= 3
    for name, *flags in commands_in(before_flags):
        parse(monkeypatch, name, flags)
    groups = re.findall(r"^(\w[\w ]+):$", text, re.MULTILINE)
    assert groups == ["options", "start here", "the task", "inner loop", "mixing", "optimizer",
                      "text", "machine"]


def test_help_states_the_papers_value_wherever_the_default_differs(monkeypatch, capsys):
    parser = train_flags.parse({"11m": 96}, [])[1]
    differs = ["steps", "lr", "warmup", "batch_size", "seq_len", "episode_len", "inner_lr", "head",
               "meta_start"]
    helps = {action.dest: action.help for action in parser._actions}
    assert [name for name in differs if "the paper: " not in helps[name]] == []
