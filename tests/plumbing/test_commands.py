"""Mistakes in one line, with the right exit code."""
import subprocess
import sys

import pytest

from conftest import ROOT
from plumbing.commands import Failure, Parser, UserError, command, filled, number


def run(monkeypatch, error, **environment):
    """The exit code of a main() that raises error."""
    @command
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["folder/t.py"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


@pytest.mark.parametrize("error, code, said", [
    (UserError("no such text"), 2, "t.py: error: no such text"),
    (UserError("two\nlines"), 2, "t.py: error: two lines"),
    (Failure("it diverged"), 1, "t.py: it diverged"),
    (PermissionError(13, "Permission denied", "runs"), 2,
     "t.py: error: runs: Permission denied: check its permissions, or choose another place"),
    (OSError(36, "File name too long", "x"), 2,
     "t.py: error: x: File name too long: choose a shorter name"),
    (OSError(28, "No space left on device"), 1,
     "t.py: error: No space left on device: make room on the disk"),
    (OSError(5, "Input/output error", "x"), 1, "t.py: error: x: Input/output error"),
    (KeyboardInterrupt(), 130, "t.py: stopped."),
    (KeyboardInterrupt("Go on."), 130, "t.py: stopped. Go on.")])
def test_an_error_is_one_line_and_its_exit_code(error, code, said, monkeypatch, capsys):
    assert run(monkeypatch, error) == code
    assert capsys.readouterr().err == said + "\n"


def test_of_several_processes_the_first_tells_of_the_users_mistake(monkeypatch, capsys):
    assert run(monkeypatch, UserError("no"), RANK="1", WORLD_SIZE="2") == 2
    assert capsys.readouterr().err == ""
    assert run(monkeypatch, Failure("out of memory"), RANK="1", WORLD_SIZE="2") == 1
    assert "out of memory" in capsys.readouterr().err
    assert run(monkeypatch, UserError("no"), RANK="0", WORLD_SIZE="2") == 2
    assert "no" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    @command
    def main():
        1 / 0

    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.parametrize("kind, text, said", [
    (number(int, 1), "9" * 400, "not at least 1"), (number(int, 0), str(2 ** 64), "not at least 0"),
    (number(int, 1, 8), "9", "not between 1 and 8"), (number(float, 0), "nan", "not at least 0"),
    (number(float, 0), "inf", "not at least 0"), (number(int, 1), "1.5", "whole number"),
    (filled, "", "empty")])
def test_numbers_and_texts_are_refused_in_one_line(kind, text, said, capsys):
    parser = Parser()
    parser.add_argument("--flag", type=kind)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--flag", text])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert said in error


def test_a_mistyped_flag_is_not_taken_for_another(capsys):
    parser = Parser()
    parser.add_argument("--steps", type=int)
    for mistyped, advice in (("--step", "did you mean --steps?"), ("xyz", "--help")):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([mistyped, "3"])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert f"{mistyped} is unknown: " in error
        assert advice in error


# ---- in processes of their own -----------------------------------------------------------------

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from plumbing.commands import command
@command
def main():
    for i in range(100_000):
        print("caf\\u00e9 \\udcff \\u2212", i)
main()
"""


def start(tmp_path, content, **keywords):
    path = tmp_path / "script.py"
    path.write_text(content.format(root=str(ROOT)))
    return subprocess.Popen([sys.executable, path], text=True, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE, **keywords)


def test_a_reader_that_goes_away_ends_it_without_a_word(tmp_path):
    script = start(tmp_path, SCRIPT)
    assert "caf" in script.stdout.readline()
    script.stdout.close()
    assert script.stderr.read() == ""
    assert script.wait(20) == 141


def test_letters_that_a_terminal_does_not_know_are_written_in_another_way(tmp_path):
    script = start(tmp_path, SCRIPT, env={"PYTHONIOENCODING": "ascii"})
    output, errors = script.communicate(timeout=20)
    assert script.returncode == 0
    assert errors == ""
    assert output.startswith(r"caf\xe9 \udcff \u2212 0")


def test_output_to_closed_streams_is_lost_and_no_error(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    done = subprocess.run(f"{sys.executable} {path} >&- 2>&-", shell=True, timeout=20)
    assert done.returncode == 0


@pytest.mark.parametrize("chapter", ["data", "model", "probe", "train", "ner"])
def test_ctrl_c_while_a_script_loads_ends_it_quietly(chapter):
    """The first import of each script is interrupted where it reaches the large libraries."""
    # A module that is imported before numpy and torch, and sends the signal.
    code = (f"import os, runpy, signal, sys\n"
            f"class Interrupt:\n"
            f"    def find_spec(self, name, *rest):\n"
            f"        if name in ('numpy', 'torch'):\n"
            f"            os.kill(os.getpid(), signal.SIGINT)\n"
            f"sys.meta_path.insert(0, Interrupt())\n"
            f"sys.argv = ['{chapter}.py', '--help']\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            f"runpy.run_path({str(ROOT / chapter) + '.py'!r}, run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == ""
