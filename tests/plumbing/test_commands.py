"""Mistakes in one line, with the right exit code."""
import pytest

from plumbing.commands import Parser, UserError, errors_in_one_line

ADVICE = "Go on with --resume."


@pytest.mark.parametrize("error, bad_path, code, said", [
    (UserError("no such text"), OSError, 2, "t.py: error: no such text"),
    (PermissionError(13, "Permission denied", "runs"), PermissionError, 2,
     "t.py: error: runs: Permission denied"),
    # Once a run is open, a path that fails is no mistake of the user's.
    (PermissionError(13, "Permission denied", "runs"), (), 1,
     f"t.py: error: runs: Permission denied. {ADVICE}"),
    (OSError(28, "No space left on device"), PermissionError, 1,
     f"t.py: error: No space left on device. {ADVICE}"),
    (KeyboardInterrupt(), (), 130, f"stopped. {ADVICE}")])
def test_an_error_is_one_line_and_its_exit_code(error, bad_path, code, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        with errors_in_one_line(Parser(prog="t.py"), ADVICE, bad_path):
            raise error
    assert stopped.value.code == code
    assert capsys.readouterr().err == said + "\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        with errors_in_one_line(Parser(prog="t.py")):
            1 / 0
