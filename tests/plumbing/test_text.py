"""Where text comes from: docstrings, text files and JSON lines."""
import ast
import gzip
import json
import textwrap
from pathlib import Path

from plumbing import text

LINES = ["First line, naïve.", "Zweite Zeile 日本語 🙂", "third\nwith a break\r\n",
         "x" * 40_000, " "]


def read(path):
    """The texts of the documents that path names."""
    documents = text.documents(text.text_files([path]), "reading", quiet=True)
    return [piece for _, piece in documents]


def test_installed_docs_are_docstrings_of_this_machine():
    path = Path(ast.__file__).parent / "textwrap.py"
    texts = text.docstrings(path)
    assert texts[0] == textwrap.__doc__.strip()
    assert any("dedent" in found or "leading whitespace" in found for found in texts)


def test_json_lines_plain_and_gzipped_give_their_texts(tmp_path):
    lines = []
    for i, line in enumerate(LINES):
        lines.append(json.dumps({"id": i, "text": line}, ensure_ascii=i % 2 == 0))
    content = "\n".join(lines) + "\n\n"
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    pieces = read(tmp_path / "a.jsonl")
    assert pieces[:3] == LINES[:3]
    assert "".join(pieces[3:]) == LINES[3]
    assert max(map(len, pieces)) <= text.PIECE
    assert read(tmp_path / "b.jsonl.gz") == pieces


def test_pieces_of_one_document_have_one_name(tmp_path):
    """So they are on one side of the split."""
    lines = [json.dumps({"text": line}) for line in LINES]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    documents = list(text.documents([tmp_path / "a.jsonl"], "reading", quiet=True))
    assert len(documents) > 4
    assert len({name for name, _ in documents}) == 4


def test_half_of_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "half a pair: \\ud83d"}')
    assert read(tmp_path / "c.jsonl") == ["half a pair: ?"]


def test_a_folder_is_read_in_order_and_cut_at_line_ends(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("".join(f"line {i} ü\r\n" for i in range(5000)))
    (tmp_path / "sub" / "a.txt").write_text("last")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    (tmp_path / "notes.md").write_text("not read")
    pieces = read(tmp_path)
    assert pieces[0] == "first"
    assert pieces[-1] == "last"
    assert all(piece.endswith("\n") for piece in pieces[1:-1])
    assert "".join(pieces[1:-1]) == "".join(f"line {i} ü\n" for i in range(5000))
