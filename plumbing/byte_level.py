"""Imported tokenizers: a byte-level BPE, read from Hugging Face's tokenizer.json.

GPT-2, GPT-NeoX, OLMo and Llama 3 have such a file. It says how to normalise text, which strings
are always single tokens, which regular expressions split the rest into pre-tokens, and in which
order adjacent tokens are merged. tiktoken merges by rank instead, which can give other tokens, so
this module follows the list of merges exactly. A file that uses any other feature is refused.
"""
import functools
import heapq
import unicodedata

import regex  # tiktoken uses it, too, so both read \p{...} in the same way

from plumbing.commands import UserError
from plumbing.files import read_json

END, MASK = "<|endoftext|>", "<|mask|>"
FILE = "tokenizer.json"
# GPT-2's rule for splitting text into pre-tokens. No token spans two of them.
PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# Llama 3's file is 9 MB long and has 128,256 tokens.
LARGEST_FILE, LARGEST_VOCABULARY = 64_000_000, 2 ** 20
# The number of pre-tokens whose ids are cached.
REMEMBERED = 2 ** 17
# Matches the regular expressions that Python's `regex` and Hugging Face's Oniguruma read alike:
# general categories, white space, sets that are not nested, groups, lookaround, usual quantifiers.
ESCAPE = r"\\[pP]\{[A-Z][a-z]?\}|\\[sSrnt]|\\[^\w\s]"
PORTABLE = regex.compile(
    rf"(?:{ESCAPE}|\[\^?(?:{ESCAPE}|[^][\\&])+\]|\((?:\?(?:i?:|<?[=!])|(?!\?))|[)|]"
    r"|[*+?][+?]?|\{\d+(?:,\d*)?\}(?![+?])|[^][\\(){}|*+?.^$])*+")


# ---- bytes and letters -------------------------------------------------------------------------

def byte_letters():
    """256 strings: the printable letter that stands for each byte in GPT-2's tokenizer files
    (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, others = [], 0
    for byte in range(256):
        if byte in printable:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + others))
            others += 1
    return letters


LETTERS = dict(enumerate(byte_letters()))
BYTES = {ord(letter): byte for byte, letter in LETTERS.items()}


def in_letters(text):
    return text.encode().decode("latin-1").translate(LETTERS)


def in_bytes(token):
    try:
        return token.translate(BYTES).encode("latin-1")
    except UnicodeEncodeError:  # a special token, which is stored as it is
        return token.encode()


# ---- the encoding ------------------------------------------------------------------------------

class ByteLevelEncoding:
    """The methods of tiktoken.Encoding that this project uses, for a tokenizer.json.

    As in tiktoken, encode_ordinary treats special tokens in the text as ordinary text. It
    normalises the text first, so its tokens decode to what `normalise` returns."""

    def __init__(self, file, end=None):
        """file is a tokenizer.json, a dict in which `unsupported` finds nothing. end is the id of
        the end-of-text token, or None."""
        self.file, self.eot_token = file, end
        model, added = file["model"], file.get("added_tokens") or []
        self.vocabulary = model["vocab"]
        self.ignore_merges = model.get("ignore_merges", False)
        self.place = {pair: i for i, pair in enumerate(merge_list(model))}
        self.is_nfc = bool(steps(file.get("normalizer")))
        self.patterns = [regex.compile(text) for text in patterns(file)]
        self.special_tokens_set = {token["content"] for token in added if token["special"]}
        plain = [token for token in added if not token["special"] and token["content"]]
        # Raw tokens are found before the text is normalised, the others after.
        raw = {token["content"]: token["id"] for token in plain if not token.get("normalized")}
        later = {self.in_form(token["content"]): token["id"]
                 for token in plain if token.get("normalized")}
        self.raw, self.later, self.added_ids = any_of(raw), any_of(later), later | raw
        self.pieces = token_pieces(self.vocabulary, added)
        for content, i in self.added_ids.items():
            self.pieces[i] = content.encode()
        self.n_vocab = len(self.pieces)
        self.id_of = {piece: i for i, piece in enumerate(self.pieces)}
        self.ids_of_pretoken = functools.lru_cache(REMEMBERED)(self.merged)

    def in_form(self, text):
        return unicodedata.normalize("NFC", text) if self.is_nfc else text

    def normalised_parts(self, text):
        """Yield (part of the normalised text, whether it is a raw added token)."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for part, is_token in cut(text, self.raw):
            yield (part if is_token else self.in_form(part)), is_token

    def normalise(self, text):
        """The text to which its tokens decode."""
        return "".join(part for part, _ in self.normalised_parts(text))

    def encode_ordinary(self, text):
        ids = []
        for part, is_token in self.normalised_parts(text):
            pieces = [(part, True)] if is_token else cut(part, self.later)
            for piece, is_added in pieces:
                if is_added:
                    ids.append(self.added_ids[piece])
                    continue
                for pretoken in self.pretokens(piece):
                    ids += self.ids_of_pretoken(pretoken)
        return ids

    def encode_ordinary_batch(self, texts, num_threads=1):
        return [self.encode_ordinary(text) for text in texts]

    def encode_single_token(self, token):
        """The id of a token, str or bytes. Raises KeyError."""
        return self.id_of[token.encode() if isinstance(token, str) else token]

    def decode_single_token_bytes(self, token):
        return self.pieces[token]

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def pretokens(self, text):
        parts = [text]
        for pattern in self.patterns:
            parts = [piece for part in parts for piece, _ in cut(part, pattern)]
        return parts

    def merged(self, pretoken):
        """The ids of a pre-token."""
        letters = in_letters(pretoken)
        if self.ignore_merges and letters in self.vocabulary:
            return [self.vocabulary[letters]]
        return [self.vocabulary[token] for token in merge(letters, self.place)]


def any_of(contents):
    """A pattern that matches any of some strings, and prefers the longest."""
    longest_first = sorted(contents, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest_first)) or r"(?!)")


def cut(text, pattern):
    """Yield (piece, whether it is a match): the matches of pattern and the text between them."""
    start = 0
    for match in pattern.finditer(text):
        if match.start() > start:
            yield text[start:match.start()], False
        if match.end() > match.start():
            yield match.group(), True
        start = match.end()
    if start < len(text):
        yield text[start:], False


def merge(letters, place):
    """The tokens of a pre-token, a list of strings.

    place is {(left, right): its position in the list of merges}. While any adjacent pair is in
    the list, the one that comes first in it is merged, leftmost occurrence first. A heap finds
    this pair. Heap entries whose tokens have changed since are skipped."""
    tokens = list(letters)  # None once merged into the token before
    n = len(tokens)
    right_of = list(range(1, n + 1))
    left_of = list(range(-1, n - 1))
    heap = []
    new_neighbours = list(zip(range(n - 1), range(1, n)))
    while True:
        for left, right in new_neighbours:
            pair = tokens[left], tokens[right]
            if pair in place:
                heapq.heappush(heap, (place[pair], left, right, pair))
        if not heap:
            return [token for token in tokens if token is not None]
        _, left, right, pair = heapq.heappop(heap)
        new_neighbours = []
        if (tokens[left], tokens[right]) == pair:
            tokens[left], tokens[right] = pair[0] + pair[1], None
            before, after = left_of[left], right_of[right]
            right_of[left] = after
            if before >= 0:
                new_neighbours.append((before, left))
            if after < n:
                left_of[after] = left
                new_neighbours.append((left, after))


# ---- reading the file --------------------------------------------------------------------------

def read_tokenizer(folder):
    """The ByteLevelEncoding of a model folder, or of an imported run, which has the same files.
    Raises UserError."""
    path = folder / FILE
    if not path.exists():
        raise UserError(f"{path} is missing: add it to the folder (a byte-level BPE; a "
                        "SentencePiece tokenizer.model cannot be read)")
    file = read_json(path, LARGEST_FILE)
    try:
        problem = unsupported(file)
        encoding = None if problem else ByteLevelEncoding(file)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, regex.error) as error:
        problem = f"the file is damaged ({type(error).__name__})"
    if problem:
        raise UserError(f"{path} cannot be used: {problem}")
    end = read_json(folder / "config.json", LARGEST_FILE).get("eos_token_id")
    if isinstance(end, list) and end:  # several tokens may end a text
        end = end[0]
    if type(end) is not int or not 0 <= end < encoding.n_vocab:
        end = encoding.id_of[END.encode()] if END in encoding.special_tokens_set else None
    encoding.eot_token = end
    return encoding


def unsupported(file):
    """Why a tokenizer.json is not supported here, in words; None if it is."""
    model = file["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        return "it is not a byte-level BPE (SentencePiece and WordPiece cannot be read)"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"its BPE uses {key}"
    for step in steps(file.get("normalizer")):
        if step["type"] != "NFC":
            return f"its normalizer {step['type']} is not supported (only NFC is)"
    *splits, last = steps(file.get("pre_tokenizer")) or [{"type": "none"}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return "its pre-tokenizer does not end with ByteLevel with add_prefix_space false"
    for step in splits:
        is_isolated = step.get("behavior") == "Isolated" and not step.get("invert")
        if step["type"] != "Digits" and not (step["type"] == "Split" and is_isolated):
            return f"its pre-tokenizer {step['type']} has options that are not supported"
    for pattern in patterns(file):
        if not PORTABLE.fullmatch(pattern):
            return f"its regular expression {pattern!r:.80} may match other text here"
    for token in file.get("added_tokens") or []:
        trims = any(token.get(key) for key in ("single_word", "lstrip", "rstrip"))
        if trims and not token["special"]:
            return f"its added token {token['content']!r:.40} absorbs text around it"
    return damage(model, file.get("added_tokens") or [])


def damage(model, added):
    """What is wrong with the tokens or the merges, in words; None if nothing is."""
    vocabulary = model["vocab"]
    ids = [*vocabulary.values(), *(token["id"] for token in added)]
    if not all(type(i) is int and 0 <= i < LARGEST_VOCABULARY for i in ids):
        return f"ids must be whole numbers below {LARGEST_VOCABULARY:,}"
    if not set(LETTERS.values()) <= vocabulary.keys():
        return "it lacks a byte, so it cannot encode all text"
    for left, right in merge_list(model):
        if left + right not in vocabulary:
            return "one of its merges gives a string that is not a token"
    return None


def steps(component):
    """The normalizers or pre-tokenizers of a component of the file, in order."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    members = component.get("normalizers") or component.get("pretokenizers") or []
    return [step for member in members for step in steps(member)]


def patterns(file):
    """The regular expressions that split text into pre-tokens, in order of use."""
    found = []
    for step in steps(file.get("pre_tokenizer")):
        if step["type"] == "Digits":
            found.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif step["type"] == "Split":
            kind, text = next(iter(step["pattern"].items()))
            found.append(text if kind == "Regex" else regex.escape(text))
        elif step.get("use_regex", True):
            found.append(PATTERN)
    return found


def merge_list(model):
    """[(left, right)]; older files write a pair as one string."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(left, right) for left, right in pairs]


def token_pieces(vocabulary, added):
    """A list with the bytes of each id; empty where an id has no token."""
    ids = [*vocabulary.values(), *(token["id"] for token in added)]
    pieces = [b""] * (max(ids) + 1)
    for token, i in vocabulary.items():
        pieces[i] = in_bytes(token)
    for token in added:
        pieces[token["id"]] = token["content"].encode()
    return pieces
