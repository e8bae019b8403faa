"""What all commands share: flags that explain themselves, and mistakes answered in one line."""
import argparse
import contextlib
import math

# The user gave a path that cannot be used. Other system errors, such as a full disk, are no
# mistake of the user's.
BAD_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError,
            PermissionError)


class UserError(ValueError):
    """Something the user gave cannot be used. The message says what is wrong and what to do."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """States each default once, and none where there is none."""

    def _get_help_string(self, action):
        no_default = action.default is None or action.default is False
        if no_default or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that states defaults. Its errors are one line, with exit code 2."""
    silent = False  # with several processes, one speaks for all

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def exit(self, status=0, message=None):
        super().exit(status, None if self.silent else message)


def number(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high, both included; NaN is refused."""
    limits = f"at least {low}" if high == math.inf else f"in {low} to {high}"

    def convert(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    # argparse names the type when the text is not a number at all
    convert.__name__ = "whole number" if kind is int else "number"
    return convert


@contextlib.contextmanager
def errors_in_one_line(parser, advice="", bad_path=BAD_PATH):
    """End the command in one line and with the right exit code when the block fails.

    A user's mistake and a path that cannot be used give 2, another system error gives 1, and
    Ctrl-C gives 130; the last two are followed by advice. Any other exception is a bug of ours
    and keeps its traceback."""
    try:
        yield
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        message = f"{place}{error.strerror or error}"
        if isinstance(error, bad_path):
            parser.error(message)
        parser.exit(1, f"{parser.prog}: error: {message}. {advice}".rstrip() + "\n")
    except KeyboardInterrupt:
        parser.exit(130, f"stopped. {advice}".rstrip() + "\n")
