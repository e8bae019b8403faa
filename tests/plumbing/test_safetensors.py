"""The safetensors reader: what it reads, and what it says of files that lie."""
import json
import random
import tracemalloc

import pytest
import torch

from plumbing.commands import UserError
from plumbing.safetensors import find_tensors, read_header, read_tensor, write_safetensors

LITTLE_MEMORY = 1_000_000


def write(path, header, body=b"", length=None):
    """A file of this header (anything JSON, or bytes) and body, which may lie about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + body)
    return path


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_all_types_are_read_from_odd_places(tmp_path):
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    header, body, expected = {"__metadata__": {"format": "pt", "x": "y" * 3}}, b"", {}
    for name, tensor in (("a", values.bfloat16()), ("b", values), ("c", values.half()),
                         ("d", values[0, 0].bfloat16()), ("e", torch.zeros(0, 4))):
        dtype = {2: "F16", 4: "F32"}[tensor.itemsize]
        if tensor.dtype == torch.bfloat16:
            dtype = "BF16"
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = entry(dtype, tensor.shape, (len(body), len(body) + len(content)))
        body += content
        expected[name] = tensor.float()
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)  # an odd place, which no number may begin at in memory
    stored = read_header(write(tmp_path / "model.safetensors", text, body))
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        found = read_tensor(stored[name])
        assert found.dtype == torch.float32
        assert torch.equal(found, tensor)


def test_what_is_written_is_read(tmp_path):
    state = {"x": torch.arange(6.0).view(2, 3), "y": torch.tensor([0.5]).bfloat16()}
    write_safetensors(tmp_path / "model.safetensors", state)
    stored = find_tensors(tmp_path)
    assert {name: read_tensor(place).tolist() for name, place in stored.items()} == {
        "x": [[0, 1, 2], [3, 4, 5]], "y": [0.5]}


# name -> header, body, length of the header as the file states it, what is said
LIES = {
    "empty": (b"", b"", None, "damaged"),
    "long header": ({}, b"", 2 ** 63, "too long"),
    "header beyond the file": ({"a": entry()}, bytes(24), 200, "too long"),
    "header as long as a file may be": ({}, bytes(5_000_000), 4_000_001, "too long"),
    "truncated": ({"a": entry()}, bytes(23), None, "do not fit"),
    "no JSON": (b"{'a'}", b"", None, "damaged"),
    "no UTF-8": (b"\xff\xfe{}", b"", None, "damaged"),
    "deep": (b"[" * 100_000, b"", None, "damaged"),
    "a list": ([], b"", None, "damaged"),
    "an entry that is a number": ({"a": 5}, b"", None, "no type, shape and offsets"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), None, "no type, shape"),
    "three offsets": ({"a": entry(offsets=(0, 24, 24))}, bytes(24), None, "no type, shape"),
    "a type that is a list": ({"a": entry(dtype=[])}, bytes(24), None, "no type, shape"),
    "unknown type": ({"a": entry(dtype="I64")}, bytes(24), None, "'I64', not F32"),
    "shape of text": ({"a": entry(shape="23")}, bytes(24), None, "do not fit"),
    "negative shape": ({"a": entry(shape=(-2, -3))}, bytes(24), None, "do not fit"),
    "true as a number": ({"a": entry(shape=(True, 6))}, bytes(24), None, "do not fit"),
    "huge shape": ({"a": entry(shape=(10 ** 9, 10 ** 9))}, bytes(24), None, "do not fit"),
    "a shape of huge numbers": ({"a": entry(shape=[10 ** 4000] * 500)}, bytes(24), None,
                                "do not fit"),
    "many dimensions": ({"a": entry(shape=[1] * 9 + [6])}, bytes(24), None, "do not fit"),
    "shape and offsets differ": ({"a": entry(shape=(2, 4))}, bytes(24), None, "do not fit"),
    "offsets beyond the file": ({"a": entry(offsets=(8, 32))}, bytes(24), None, "do not fit"),
    "offsets backwards": ({"a": entry(offsets=(24, 0))}, bytes(24), None, "do not fit"),
    "negative offsets": ({"a": entry(offsets=(-24, 0))}, bytes(24), None, "do not fit"),
    "overlap": ({"a": entry(), "b": entry(offsets=(12, 36))}, bytes(36), None, "overlap"),
    "the same place": ({"a": entry(), "b": entry()}, bytes(24), None, "overlap"),
    "a gap": ({"a": entry(), "b": entry(offsets=(28, 52))}, bytes(52), None, "belong to none"),
    "bytes at the end": ({"a": entry()}, bytes(25), None, "longer than its tensors"),
    "a name of two lines": ({"a\nb": entry(dtype="I64")}, bytes(24), None, r"'a\\nb' is of type"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_file_is_refused_in_a_line_and_in_little_memory(lie, tmp_path):
    header, body, length, said = LIES[lie]
    path = write(tmp_path / "model.safetensors", header, body, length)
    tracemalloc.start()
    with pytest.raises(UserError, match=said) as error:
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert peak < LITTLE_MEMORY + 20 * len(json.dumps(str(header)))


def test_random_damage_gives_tensors_of_the_file_or_a_message(tmp_path):
    rng = random.Random(0)
    header = {"a": entry(), "b": entry("BF16", (4,), (24, 32)), "c": entry("F16", (), (32, 34))}
    good = write(tmp_path / "good", header, bytes(34)).read_bytes()
    path, refused = tmp_path / "model.safetensors", 0
    for _ in range(1500):
        content = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(content))
            kind = rng.random()
            if kind < 0.6:
                content[place] = rng.choice(b'0123456789"[]{},:-eFB\x00\xff')
            elif kind < 0.8:
                del content[place:place + rng.randint(1, 9)]
            else:
                content[place:place] = rng.choice([b"9" * 30, b"[", b'"', b"{}", bytes(4)])
        path.write_bytes(content)
        try:
            for stored in read_header(path).values():
                assert stored.end <= len(content)
                read_tensor(stored)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 1000 < refused < 1500


def shards(folder, files, weight_map):
    for name, names in files.items():
        write_safetensors(folder / name, {tensor: torch.ones(2) for tensor in names})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_one_folder_of_tensors(tmp_path):
    shards(tmp_path, {"1.safetensors": "ab", "2.safetensors": "c"},
           {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    stored = find_tensors(tmp_path)
    assert {name: place.path.name for name, place in stored.items()} == {
        "a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}


@pytest.mark.parametrize("weight_map, said", [
    ({"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors"}, "not those in its files"),
    ({"a": "1.safetensors"}, "not those in its files"),
    ({"a": "1.safetensors", "b": "3.safetensors"}, "3.safetensors is missing"),
    ({"a": "../1.safetensors"}, "does not say which file"),
    ({"a": 5}, "does not say which file"),
    (["a"], "does not say which file"),
    (None, "does not say which file")])
def test_a_lying_index_is_refused(weight_map, said, tmp_path):
    shards(tmp_path, {"1.safetensors": "ab", "2.safetensors": "c"}, weight_map)
    write_safetensors(tmp_path.parent / "1.safetensors", {"a": torch.ones(2)})
    with pytest.raises(UserError, match=said):
        find_tensors(tmp_path)


def test_a_folder_of_pickled_weights_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="never from pickled ones"):
        find_tensors(tmp_path)
