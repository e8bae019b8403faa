"""What all commands share: help that states defaults, and errors in one line."""
import argparse
import difflib
import errno
import functools
import io
import os
import signal
import sys
from pathlib import Path

# Errors of a path that the user gave, and what to do about each. Other errors of the system, such
# as a full disk, are not the user's mistake.
BAD_PATH = {
    errno.ENOENT: "check the name", errno.ENOTDIR: "check the name", errno.ENXIO: "check the name",
    errno.EISDIR: "name a file", errno.EEXIST: "choose another name",
    errno.ENOTEMPTY: "choose another name", errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "check where the links lead", errno.EROFS: "choose another place",
    errno.EACCES: "check its permissions, or choose another place",
    errno.EPERM: "check its permissions, or choose another place"}
NO_ROOM = {errno.ENOSPC: "make room on the disk", errno.EDQUOT: "make room on the disk",
           errno.EFBIG: "allow larger files (ulimit -f)"}
# The largest whole number that a seed or an optimizer's count of steps can hold.
LARGEST_NUMBER = 2 ** 63 - 1


class UserError(ValueError):
    """The user's input cannot be used. The message says what is wrong and what to do."""


class Failure(Exception):
    """The job cannot continue, although the user's input is right. The message says why."""


# ---- flags -------------------------------------------------------------------------------------

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text, unless there is none or the text states it."""

    def _get_help_string(self, action):
        no_default = action.default is None or action.default is False
        if no_default or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that states defaults. An error is one line and ends with exit code 2."""

    def __init__(self, *args, formatter_class=HelpFormatter, **kwargs):
        # Without abbreviations: the typing error --step would start a run as --steps.
        super().__init__(*args, formatter_class=formatter_class, allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
            advice = f"did you mean {near[0]}?" if near else "--help lists all flags"
            self.error(f"{unknown[0][:80]} is unknown: {advice}")
        return args

    def error(self, message):
        leave(2, f"error: {message}")


def number(kind, low, high=LARGEST_NUMBER):
    """A type for argparse: an int or a float from low to high, inclusive. NaN is refused."""
    limits = f"at least {low}" if high == LARGEST_NUMBER else f"between {low} and {high}"

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]} is not {limits}")
        return value

    # argparse prints this name if the text is not a number at all
    convert.__name__ = "whole number" if kind is int else "number"
    return convert


def filled(text):
    """A type for argparse: a string that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def path(text):
    """A type for argparse: a Path. An empty one is refused, as it would be the working folder."""
    return Path(filled(text))


# ---- the frame around every main() -------------------------------------------------------------

def command(main):
    """Decorate a main() so that an error ends it with one line and the right exit code.

    The code is 2 for a user's mistake or an unusable path, 1 for a Failure or another error of
    the system, and 130 for Ctrl-C. If the reader of the output has gone, it ends silently. Any
    other exception is a bug in this project and keeps its traceback."""
    @functools.wraps(main)
    def framed():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see plumbing/__init__.py
        # Output to a closed stream (>&-) is discarded.
        sys.stdout = sys.stdout or open(os.devnull, "w")
        sys.stderr = sys.stderr or open(os.devnull, "w")
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal may lack some characters.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            try:
                main()
            finally:
                sys.stdout.flush()
        except UserError as error:
            leave(2, f"error: {error}")
        except Failure as error:
            leave(1, str(error))
        except BrokenPipeError:
            # Python flushes stdout again at exit. This gives it somewhere to write.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        except OSError as error:
            leave(2 if error.errno in BAD_PATH else 1, f"error: {in_words(error)}")
        except KeyboardInterrupt as error:
            leave(128 + signal.SIGINT, f"stopped. {error}".rstrip())
    return framed


def in_words(error):
    """An OSError in words: the file, the problem, and advice."""
    place = f"{error.filename}: " if error.filename else ""
    advice = (BAD_PATH | NO_ROOM).get(error.errno)
    return f"{place}{error.strerror or error}" + (f": {advice}" if advice else "")


def leave(code, message):
    """End the process with an exit code and one line. Under torchrun all processes meet the same
    user error, and only the first prints it."""
    rank = os.environ.get("RANK", "") if "WORLD_SIZE" in os.environ else ""
    if code != 2 or rank in ("", "0"):
        line = " ".join(f"{Path(sys.argv[0]).name}: {message}".splitlines())
        print(line, file=sys.stderr)
    sys.exit(code)
