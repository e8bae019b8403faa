"""The doors: what may be read, how files are replaced, and one process at a time in a folder."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from plumbing import files
from plumbing.commands import UserError
from plumbing.files import (LOCK, MARK, append, lock_folder, locked, new_folder, open_regular,
                            parse_json, read_file, replacing, write_atomically)


# ---- in ----------------------------------------------------------------------------------------

def test_pipes_devices_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", "/dev/zero", "/dev/null"):
        with pytest.raises(UserError, match="not a regular file"):
            open_regular(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_a_file_is_measured_before_it_is_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_file(path, most=5) == b"12345"
    with pytest.raises(UserError, match="larger than 4 bytes"):
        read_file(path, most=4)
    with open(path, "wb") as file:
        file.truncate(10 ** 12)  # a hole, which takes no room on the disk
    with pytest.raises(UserError, match="larger than"):
        read_file(path)


@pytest.mark.parametrize("text, message", [
    ("", "here is not valid JSON"),
    ("[1, 2", "not valid JSON"),
    ("[" * 200_000, "not valid JSON"),
    ('{"a": ' * 200_000, "not valid JSON"),
    (b'{"a": "\xff"}', "not valid JSON"),
    ('{"a": ' + "9" * 400 + "}", "not valid JSON"),
    ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ("[]", "not a JSON object"),
    ("null", "not a JSON object"),
    ("{}", "no 'a' of the right type"),
    ('{"a": "1"}', "no 'a' of the right type"),
    ('{"a": null}', "no 'a' of the right type"),
])
def test_json_of_the_wrong_kind_is_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_json(text, "here", {"a": int})
    assert "\n" not in str(error.value)


def test_json_is_a_value():
    assert parse_json('{"a": 1, "b": [2.5]}', "here", {"a": int, "c": str | None}) == {
        "a": 1, "b": [2.5]}
    assert parse_json(b"[1]", "here") == [1]


# ---- out ---------------------------------------------------------------------------------------

def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt):
        with replacing(path) as file:
            file.write(b"half")
            assert path.read_text() == "old"
            raise KeyboardInterrupt
    assert path.read_text() == "old"
    write_atomically(path, "näw")
    assert path.read_bytes() == "näw".encode()
    assert names_in(tmp_path) == ["a.txt"]


def test_the_replaced_file_may_be_kept(tmp_path):
    path, kept = tmp_path / "a", tmp_path / "kept"
    for content in (b"1", b"2", b"3"):
        with replacing(path, keep=kept) as file:
            file.write(content)
    assert path.read_bytes() == b"3"
    assert kept.read_bytes() == b"2"
    assert names_in(tmp_path) == ["a", "kept"]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    write_atomically(tmp_path / ("x" * 255), "")
    assert names_in(tmp_path) == ["x" * 255]


def test_append_goes_on_after_a_part_was_written():
    class Slow:
        """A file that takes three bytes at a time."""
        content = b""

        def write(self, content):
            self.content += content[:3]
            return len(content[:3])

    file = Slow()
    append(file, b"one line\n")
    assert file.content == b"one line\n"


# ---- one process at a time ---------------------------------------------------------------------

def test_a_folder_has_one_writer_and_nothing_but_ours_is_cleaned_up(tmp_path):
    torn = tmp_path / f"ckpt.pt.77{MARK}"
    torn.write_text("torn")
    (tmp_path / f"folder{MARK}").mkdir()
    (tmp_path / f"link{MARK}").symlink_to(tmp_path)
    for name in ("thesis.docx.tmp", "ckpt.pt.tmp", f"{MARK}.txt"):
        (tmp_path / name).write_text("the user's")
    with lock_folder(tmp_path):
        assert names_in(tmp_path) == sorted(["thesis.docx.tmp", "ckpt.pt.tmp", f"{MARK}.txt", LOCK])
        with pytest.raises(UserError, match="another process is writing to .* or do that"):
            lock_folder(tmp_path, advice="do that")
    lock_folder(tmp_path).close()


def test_a_lock_on_what_has_been_moved_away_is_none(tmp_path, monkeypatch):
    def has_lock(file, folder):
        (tmp_path / LOCK).unlink()
        return True

    monkeypatch.setattr(files, "has_lock", has_lock)
    with pytest.raises(UserError, match="another process"):
        lock_folder(tmp_path)


def test_a_locked_folder_is_as_before_if_nothing_is_written(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    for folder in (new, old):
        with locked(folder, "choose"):
            assert names_in(folder) == [LOCK]
    assert not new.exists()
    assert names_in(old) == []
    with locked(new, "choose"):
        (new / "a").write_text("")
    assert names_in(new) == [LOCK, "a"]


def test_a_folder_that_cannot_be_made_or_locked_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / LOCK)
    for name in ("file", "file/in", "folder"):
        with pytest.raises(UserError, match="cannot write to .*: choose another"):
            with locked(tmp_path / name, "choose another"):
                pytest.fail("it is locked")


# ---- new folders -------------------------------------------------------------------------------

def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "new"
    with pytest.raises(OSError):
        with new_folder(folder) as temporary:
            (temporary / "a").write_text("half")
            raise OSError
    assert names_in(folder.parent) == []
    with new_folder(folder) as temporary:
        (temporary / "a").write_text("whole")
        assert not folder.exists()
    assert names_in(folder) == ["a"]
    assert names_in(folder.parent) == ["new"]


def test_a_new_folder_takes_nobodys_place(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as temporary:
        (temporary / "a").write_text("")
    (tmp_path / "file").write_text("mine")
    for name in ("empty", "file"):
        with pytest.raises(UserError, match="already exists"):
            with new_folder(tmp_path / name):
                pytest.fail("it is taken")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_in_the_place_of_the_temporary_folder_is_not_followed(tmp_path):
    """Else all that it leads to would be cleaned up."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.docx").write_text("mine")
    (tmp_path / f"new{MARK}").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link"):
        with new_folder(tmp_path / "new"):
            pytest.fail("it is a link")
    assert names_in(tmp_path / "mine") == ["thesis.docx"]


MAKE_SLOWLY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from plumbing.files import new_folder
with new_folder(sys.argv[1], wait=len(sys.argv) > 2) as temporary:
    if temporary is None:
        sys.exit(3)
    (temporary / "a").write_text("by another process")
    print("begun", flush=True)
    input()
"""


def make_slowly(folder, *wait):
    """Another process that makes a folder, and ends when it is told to."""
    return subprocess.Popen([sys.executable, "-c", MAKE_SLOWLY, folder, *wait], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_that_make_one_folder(tmp_path):
    """Who does not wait is refused, and who waits finds what the first one made."""
    folder = tmp_path / "new"
    first = make_slowly(folder)
    assert first.stdout.readline() == "begun\n"
    with pytest.raises(UserError, match="another process is writing"):
        with new_folder(folder):
            pytest.fail("two make it")
    second = make_slowly(folder, "wait")
    assert "waiting for another process" in second.stderr.readline()
    first.communicate("\n", timeout=20)
    second.communicate(timeout=20)
    assert [first.returncode, second.returncode] == [0, 3]
    assert names_in(folder) == ["a"]
    assert names_in(tmp_path) == ["new"]


def test_a_killed_process_leaves_its_place_to_the_next(tmp_path):
    folder = tmp_path / "new"
    first = make_slowly(folder)
    assert first.stdout.readline() == "begun\n"
    second = make_slowly(folder, "wait")
    assert "waiting" in second.stderr.readline()
    first.kill()
    first.communicate()
    assert second.stdout.readline() == "begun\n"
    second.kill()
    second.communicate()
    assert not folder.exists()
    with new_folder(folder) as temporary:
        assert names_in(temporary) == [LOCK]
        (temporary / "b").write_text("")
    assert names_in(Path(folder)) == ["b"]
