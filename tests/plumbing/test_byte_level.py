"""Tokenizers from elsewhere: by hand, against a naive twin, and against Hugging Face's own."""
import json
import random

import pytest

from plumbing import byte_level
from plumbing.byte_level import END, LETTERS, byte_letters, merge, read_tokenizer
from plumbing.commands import UserError

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def split(pattern, **changes):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
            "invert": False} | changes


def added(i, content, special=False, normalized=False, **changes):
    return {"id": i, "content": content, "special": special, "normalized": normalized,
            "single_word": False, "lstrip": False, "rstrip": False} | changes


def tokenizer(merges=(), added_tokens=(), normalizer=None, pre_tokenizer=BYTE_LEVEL, **model):
    """A tokenizer.json, as a dict: the bytes have their own ids, and merges follow."""
    vocabulary = {letter: i for i, letter in LETTERS.items()}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    return {"added_tokens": list(added_tokens), "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": list(map(list, merges))}
            | model}


@pytest.fixture
def read(tmp_path):
    """read(a tokenizer.json as a dict, a config.json as a dict) -> encoding."""
    def write_and_read(file, config=()):
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        (tmp_path / "config.json").write_text(json.dumps(dict(config)))
        return read_tokenizer(tmp_path)
    return write_and_read


def pieces(encoding, text):
    """The tokens of a text, as text."""
    return [encoding.decode([i]) for i in encoding.encode_ordinary(text)]


def naive_merge(letters, place):
    tokens = list(letters)
    while True:
        listed = [(place[pair], i) for i, pair in enumerate(zip(tokens, tokens[1:]))
                  if pair in place]
        if not listed:
            return tokens
        _, i = min(listed)
        tokens[i:i + 2] = [tokens[i] + tokens[i + 1]]


def test_merges_equal_those_of_a_naive_twin():
    rng = random.Random(0)
    for _ in range(300):
        tokens = ["a", "b", "c"]
        for _ in range(rng.randint(0, 12)):
            tokens.append(rng.choice(tokens) + rng.choice(tokens))
        pairs = [(left, right) for left in tokens for right in tokens if left + right in tokens]
        rng.shuffle(pairs)  # in any order, even before what they are made of
        place = {pair: i for i, pair in enumerate(pairs)}
        for _ in range(5):
            letters = "".join(rng.choice("abc") for _ in range(rng.randint(0, 30)))
            assert merge(letters, place) == naive_merge(letters, place)


def test_a_long_pretoken_takes_no_square_of_its_length():
    place = {("a", "a"): 0, ("aa", "aa"): 1, ("aaaa", "aaaa"): 2}
    assert merge("a" * 100_003, place) == ["a" * 8] * 12_500 + ["aa", "a"]


def test_the_list_of_merges_decides_and_not_the_ids(read):
    file = tokenizer(merges=[("a", "b"), ("b", "c")])
    assert pieces(read(file), "abc") == ["ab", "c"]
    # The same ids; older files write a pair as one string.
    for merges in ([["b", "c"], ["a", "b"]], ["b c", "a b"]):
        file["model"]["merges"] = merges
        assert pieces(read(file), "abc") == ["a", "bc"]


def test_a_pretoken_that_is_a_token_may_stay_whole(read):
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]
    assert pieces(read(tokenizer(merges)), "abc xabc") == ["ab", "c", " ", "x", "ab", "c"]
    whole = read(tokenizer(merges, ignore_merges=True))
    assert pieces(whole, "abc xabc") == ["abc", " ", "x", "ab", "c"]


def test_text_is_cut_as_the_file_says(read):
    merges = [("1", "2"), ("12", "3"), ("a", "1"), ("Ġ", "Ġ"), ("'", "S")]
    assert pieces(read(tokenizer(merges)), "a123 'S") == ["a", "123", " ", "'", "S"]
    steps = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
    assert pieces(read(tokenizer(merges, pre_tokenizer=steps)), "a123") == ["a", "1", "2", "3"]
    steps = {"type": "Sequence", "pretokenizers": [
        split(LLAMA3), BYTE_LEVEL | {"use_regex": False}]}
    assert pieces(read(tokenizer(merges, pre_tokenizer=steps)), "a1234'S") == [
        "a", "123", "4", "'S"]
    steps["pretokenizers"][0]["pattern"] = {"String": "1"}
    assert pieces(read(tokenizer(merges, pre_tokenizer=steps)), "a123") == ["a", "1", "2", "3"]
    assert pieces(read(tokenizer(merges, pre_tokenizer=BYTE_LEVEL | {"use_regex": False})),
                  "a123") == ["a", "123"]


def test_text_is_normalised_where_the_file_says(read):
    merges = [("Ã", "©")]  # the two bytes of é
    nfc = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    assert len(read(tokenizer(merges)).encode_ordinary("e\u0301")) == 3
    encoding = read(tokenizer(merges, normalizer=nfc))
    assert encoding.encode_ordinary("e\u0301") == [256]
    assert encoding.normalise("cafe\u0301") == "café"
    # Half of a surrogate pair, as a command line may hold it.
    assert encoding.decode(encoding.encode_ordinary("a\udc80")) == "a\ufffd"


def test_added_tokens_are_found_first_and_the_longest_wins(read):
    tokens = [added(300, "  ", normalized=True), added(301, "    ", normalized=True),
              added(302, "cafe\u0301", normalized=True), added(303, "z"),
              added(304, "<|x|>", special=True, lstrip=True), added(305, END, special=True)]
    encoding = read(tokenizer([("a", "b"), ("Ġ", "a")], tokens, {"type": "NFC"}))
    assert encoding.encode_ordinary("      b") == [301, 300, ord("b")]
    assert pieces(encoding, "   ab") == ["  ", " ", "ab"]
    assert encoding.encode_ordinary("café") == encoding.encode_ordinary("cafe\u0301") == [302]
    assert encoding.decode([302]) == encoding.normalise("cafe\u0301") == "café"
    # A raw token is found before the text is normalised, and so keeps its neighbour apart.
    assert encoding.encode_ordinary("z\u0301") == [303, 0xCC, 0x81]
    assert encoding.normalise("z\u0301") == "z\u0301"
    # As with tiktoken, special tokens in a text are ordinary text.
    assert len(encoding.encode_ordinary("<|x|>")) == 5


def test_the_interface_is_tiktokens(read):
    file = tokenizer([("a", "b")], [added(300, END, True), added(299, "<|pad|>", True)])
    encoding = read(file)
    assert encoding.n_vocab == 301
    assert encoding.special_tokens_set == {END, "<|pad|>"}
    assert encoding.encode_single_token("ab") == encoding.encode_single_token(b"ab") == 256
    assert encoding.decode_single_token_bytes(256) == b"ab"
    assert encoding.decode_single_token_bytes(280) == b""  # no token has this id
    assert encoding.encode_ordinary_batch(["ab", "é"]) == [[256], [0xC3, 0xA9]]
    assert encoding.decode([0xC3, 0xA9, 300, 0xC3]) == f"é{END}\ufffd"


def test_the_end_of_a_text_is_what_config_json_says(read):
    file = tokenizer(added_tokens=[added(300, END, True), added(301, "<|eot|>", True)])
    assert read(file).eot_token == 300
    assert read(file, {"eos_token_id": 301}).eot_token == 301
    assert read(file, {"eos_token_id": [301, 300]}).eot_token == 301
    assert read(file, {"eos_token_id": 999}).eot_token == 300
    assert read(tokenizer()).eot_token is None


SENTENCEPIECE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
REFUSED = [
    (tokenizer(type="Unigram"), "SentencePiece"),
    (tokenizer(byte_fallback=True), "SentencePiece"),
    (tokenizer(dropout=0.1), "dropout"),
    (tokenizer(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    (tokenizer(normalizer=SENTENCEPIECE), "normalizer Replace"),
    (tokenizer(pre_tokenizer=None), "does not end with ByteLevel"),
    (tokenizer(pre_tokenizer={"type": "Metaspace"}), "does not end with ByteLevel"),
    (tokenizer(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "add_prefix_space"),
    (tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        split(LLAMA3, behavior="Removed"), BYTE_LEVEL]}), "pre-tokenizer Split"),
    (tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        split(r"^a"), BYTE_LEVEL]}), "regular expression"),
    (tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        split(r"\p{N}{1,3}+"), BYTE_LEVEL]}), "regular expression"),
    (tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        split(r"(a"), BYTE_LEVEL]}), "damaged"),
    (tokenizer(added_tokens=[added(300, "<mask>", lstrip=True)]), "absorbs text around it"),
    (tokenizer(added_tokens=[added(2 ** 40, "x")]), "ids must be"),
    (tokenizer(added_tokens=[{"id": 3}]), "damaged"),
    (tokenizer(vocab={"a": 0}), "lacks a byte"),
    (tokenizer(vocab=[["a", 0.5]]), "damaged"),
    (tokenizer(merges=[("a", "b")]) | {"model": {"vocab": {c: i for i, c in LETTERS.items()},
                                                 "merges": [["a", "b"]]}}, "not a token"),
    ({"version": "1.0"}, "damaged")]


@pytest.mark.parametrize("file, said", REFUSED)
def test_what_is_not_known_is_refused(file, said, read):
    with pytest.raises(UserError, match=said) as error:
        read(file)
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json is missing.*SentencePiece"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{" * 5)
    with pytest.raises(UserError, match="not valid JSON"):
        read_tokenizer(tmp_path)


# ---- against Hugging Face's own ----------------------------------------------------------------

def random_text(rng):
    """Text of words, spaces, digits, accents in both forms, and other scripts."""
    parts = ["the", " cat", " Cat", "'s", "'S", "'LL", "  ", "     ", " ", "\n", "\r\n", "\t",
             "12", "3456", "½", "é", "e\u0301", "a\u0327\u0301", "日本", " 語", "🙂",
             "\u1100\u1161", "\u00a0", "\u2003", "\x1c", "\x85", "ſ", "'ſ", "ß", "...",
             "-->", "_x", "z", "|||IP|||"]
    return "".join(rng.choice(parts) for _ in range(rng.randint(0, 60)))


@pytest.mark.parametrize("style", ["gpt2", "llama3", "neox"])
def test_ids_equal_those_of_hugging_faces_tokenizers(style, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pre, rng = tokenizers.pre_tokenizers, random.Random(0)
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=style == "llama3"))
    hf.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    if style == "llama3":
        hf.pre_tokenizer = pre.Sequence([
            pre.Split(tokenizers.Regex(LLAMA3), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    if style == "neox":
        hf.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=[END], initial_alphabet=byte_letters(), show_progress=False)
    hf.train_from_iterator([random_text(rng) for _ in range(300)], trainer)
    if style == "neox":
        runs = [tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)]
        hf.add_tokens([*runs, tokenizers.AddedToken("|||IP|||", normalized=False)])
    hf.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    encoding = read_tokenizer(tmp_path)
    assert encoding.n_vocab == hf.get_vocab_size()
    for _ in range(1500):
        text = random_text(rng)
        assert encoding.encode_ordinary(text) == hf.encode(text, add_special_tokens=False).ids
        assert encoding.decode(encoding.encode_ordinary(text)) == encoding.normalise(text)


def test_patterns_that_regex_and_oniguruma_read_alike():
    for pattern in (byte_level.PATTERN, LLAMA3, r"[^\r\n\p{L}\p{N}]?+\p{L}++",
                    r"\p{Lu}*(?<=a)b{2}"):
        assert byte_level.PORTABLE.fullmatch(pattern), pattern
    for pattern in ("a$", ".", r"\w", r"[a&&b]", r"[[:alpha:]]", r"\p{Han}", "(?m:a)", r"a{,2}",
                    r"(?>a)", r"\1", r"\b"):
        assert not byte_level.PORTABLE.fullmatch(pattern), pattern
