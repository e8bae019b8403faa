"""The exported folder, read by the rules of its formats."""
import json
import random

import numpy as np
import regex
import torch

from conftest import toy_text
from model import Config, Decoder
from plumbing.huggingface import byte_letters, export
from plumbing.tokenizer import END, MASK, PATTERN


def read_safetensors(path):
    """By the format's own description: a length, a JSON header, raw bytes."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:8 + size]), raw[8 + size:]
    assert header.pop("__metadata__") == {"format": "pt"}
    assert (8 + size) % 8 == 0
    assert all(entry["dtype"] == "F32" for entry in header.values())
    offsets = sorted(entry["data_offsets"] for entry in header.values())
    assert offsets[-1][1] == len(body)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(body[start:end], dtype="<f4").reshape(entry["shape"])
    return tensors


def merge_by_list(pieces, merges):
    """Hugging Face's rule: of the neighbours that stand in the list, merge the pair that stands
    first, the leftmost of its kind. merges is {pair: its place in the list}."""
    while True:
        neighbours = list(zip(pieces, pieces[1:]))
        listed = [pair for pair in neighbours if pair in merges]
        if not listed:
            return pieces
        first = min(listed, key=merges.get)
        at = neighbours.index(first)
        pieces = pieces[:at] + [pieces[at] + pieces[at + 1]] + pieces[at + 2:]


def test_byte_letters_are_gpt2s():
    letters = byte_letters()
    assert letters[ord(" ")] == "Ġ"
    assert letters[ord("\n")] == "Ċ"
    assert letters[ord("a")] == "a"
    assert len(letters) == 256
    assert len(set(letters)) == 256


def test_export_holds_the_weights_of_the_run(corpus, tmp_path):
    decoder = Decoder(Config(24, corpus.vocab_size, n_layer=2), torch.Generator().manual_seed(0))
    export(decoder, corpus.encoding, tmp_path / "hf")
    weights = read_safetensors(tmp_path / "hf" / "model.safetensors")
    assert weights.keys() == decoder.state_dict().keys()
    for name, tensor in decoder.state_dict().items():
        assert np.array_equal(weights[name], tensor.numpy())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["hidden_size"] == 24
    assert config["intermediate_size"] == 96
    assert config["num_hidden_layers"] == 2
    assert config["head_dim"] == 2


def test_export_holds_the_tokens_of_the_run(corpus, tmp_path):
    decoder = Decoder(Config(24, corpus.vocab_size, n_layer=2), torch.Generator().manual_seed(0))
    export(decoder, corpus.encoding, tmp_path / "hf")
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    assert tokenizer["model"]["ignore_merges"] is True
    assert tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == PATTERN
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert added == {END: corpus.encoding.n_vocab - 2, MASK: corpus.mask_id}

    vocab, letters = tokenizer["model"]["vocab"], byte_letters()
    merges = {tuple(pair): i for i, pair in enumerate(tokenizer["model"]["merges"])}
    rng = random.Random(0)
    noise = "".join(rng.choice("abdeiou kt'1 \n") for _ in range(3000))
    words = regex.findall(PATTERN, toy_text(300) + " naïve 日本語 🙂 x" + noise)
    for word in set(words):
        pieces = [letters[byte] for byte in word.encode()]
        whole = "".join(pieces)
        if whole in vocab:  # as ignore_merges says
            tokens = [vocab[whole]]
        else:
            tokens = [vocab[piece] for piece in merge_by_list(pieces, merges)]
        assert tokens == corpus.encoding.encode_ordinary(word), word
