"""The exported folder, read by the rules of its formats, and folders that are imported."""
import json
import random

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F

import model
import ner
import probe
from conftest import toy_text
from model import Config, Decoder
from plumbing.byte_level import LETTERS, ByteLevelEncoding
from plumbing.commands import UserError
from plumbing.huggingface import byte_letters, config_fields, export, import_folder
from plumbing.safetensors import find_tensors, read_tensor, write_safetensors
from plumbing.tokenizer import END, MASK, PATTERN, load_encoding


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


# ---- models in ---------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "vocab_size": 300,
         "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
         "hidden_act": "silu", "tie_word_embeddings": False}
PICO = {"model_type": "pico_decoder", "d_model": 24, "activation_hidden_dim": 40,
        "vocab_size": 300, "n_layers": 2, "attention_n_heads": 3, "attention_n_kv_heads": 1,
        "max_seq_len": 64, "norm_eps": 1e-5, "position_emb_theta": 5000.0, "batch_size": 1024}
# The bytes and one token that ends a text, in Unicode's form NFC.
TOKENIZER = {
    "added_tokens": [{"id": 256, "content": END, "special": True}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "model": {"type": "BPE", "vocab": {letter: i for i, letter in LETTERS.items()},
              "merges": []}}


def write_folder(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def import_run(folder, out):
    """The decoder of a folder, by way of a run."""
    import_folder(folder, out, lambda fields: model.shapes(Config(**fields)))
    return model.load_run(out)[0]


def random_tensors(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            for name, shape in shapes.items()}


def llama_tensors(config):
    """Random weights of a Llama of this config.json, by the names of its parts."""
    d, ff, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or d // config["num_attention_heads"]
    queries = config["num_attention_heads"] * head_dim
    kv = config["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, d)
    parts = {"self_attn.q_proj": (queries, d), "self_attn.k_proj": (kv, d),
             "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, queries),
             "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff),
             "input_layernorm": (d,), "post_attention_layernorm": (d,)}
    for layer in range(config["num_hidden_layers"]):
        for part, shape in parts.items():
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
    return random_tensors(shapes)


def pico_tensors():
    shapes = {"pico_decoder.embedding_proj.weight": (300, 24),
              "pico_decoder.output_norm.weight": (24,),
              "pico_decoder.de_embedding_proj.weight": (300, 24)}
    parts = {"attention.q_proj": (24, 24), "attention.k_proj": (8, 24), "attention.v_proj": (8, 24),
             "attention.o_proj": (24, 24), "swiglu.w_0": (40, 24), "swiglu.w_1": (40, 24),
             "swiglu.w_2": (24, 40), "attention_norm": (24,), "swiglu_norm": (24,)}
    for layer in range(2):
        for part, shape in parts.items():
            shapes[f"pico_decoder.layers.{layer}.{part}.weight"] = shape
    return random_tensors(shapes)


def turned(x):
    """x (T, heads, 8), each pair (x[2i], x[2i + 1]) as a complex number that turns."""
    T = len(x)
    angles = torch.outer(torch.arange(T).float(), 5000.0 ** (-torch.arange(0, 8, 2) / 8))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones(T, 4), angles)[:, None]).flatten(2)


def pico_logits(tensors, ids):
    """Logits (T, V) of ids (T,): what a pico_decoder computes, written out."""
    weight = {name.removeprefix("pico_decoder."): tensor for name, tensor in tensors.items()}

    def norm(x, name):
        return F.rms_norm(x, (24,), weight[f"{name}.weight"], 1e-5)

    x = weight["embedding_proj.weight"][ids]
    for layer in ("layers.0.", "layers.1."):
        h = norm(x, layer + "attention_norm")
        q, k, v = [(h @ weight[f"{layer}attention.{name}_proj.weight"].T).unflatten(-1, (-1, 8))
                   for name in "qkv"]
        q, k = turned(q), turned(k).expand(-1, 3, -1)
        scores = torch.einsum("thd,shd->hts", q, k) / 8 ** 0.5
        future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        attention = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        out = torch.einsum("hts,shd->thd", attention, v.expand(-1, 3, -1)).flatten(1)
        x = x + out @ weight[layer + "attention.o_proj.weight"].T
        h = norm(x, layer + "swiglu_norm")
        gate, up = [h @ weight[f"{layer}swiglu.{name}.weight"].T for name in ("w_0", "w_1")]
        x = x + (F.silu(gate) * up) @ weight[layer + "swiglu.w_2.weight"].T
    return norm(x, "output_norm") @ weight["de_embedding_proj.weight"].T


def some_ids(*shape):
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(1))


def test_a_pico_decoder_gives_its_logits(tmp_path):
    tensors = pico_tensors()
    decoder = import_run(write_folder(tmp_path / "in", PICO, tensors), tmp_path / "run")
    ids = some_ids(50)
    expected = pico_logits(tensors, ids)
    assert expected.std() > 0.1
    assert torch.allclose(decoder(ids[None])[0], expected, atol=1e-5)


@pytest.mark.parametrize("changes", [
    {}, {"head_dim": 10}, {"num_key_value_heads": 6}, {"tie_word_embeddings": True}])
def test_a_llama_is_imported_and_exported_with_equal_tensors(changes, tmp_path):
    config = LLAMA | changes
    tensors = llama_tensors(config)
    decoder = import_run(write_folder(tmp_path / "in", config, tensors), tmp_path / "run")
    state = decoder.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    tied = decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert tied == config["tie_word_embeddings"]
    assert (decoder.config.rope_theta, decoder.config.norm_eps) == (5000, 1e-5)
    export(decoder, load_encoding(tmp_path / "run"), tmp_path / "out")
    exported = find_tensors(tmp_path / "out")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(read_tensor(exported[name]), tensors[name]) for name in tensors)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config_fields(written, "") == config_fields(config, "")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == TOKENIZER
    assert (decoder(some_ids(1, 9)) - import_run(tmp_path / "out", tmp_path / "again")(
        some_ids(1, 9))).abs().max() == 0


def test_shards_and_harmless_tensors(tmp_path):
    """Two files of a Llama with tied weights, one of which holds them twice, as old ones may."""
    config = LLAMA | {"tie_word_embeddings": True, "vocab_size": 70_000}
    tensors = llama_tensors(config)
    folder = write_folder(tmp_path / "in", config, {})
    (folder / "model.safetensors").unlink()
    more = {"lm_head.weight": torch.zeros(70_000, 24),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    weight_map = {}
    for number, part in enumerate((tensors, more)):
        write_safetensors(folder / f"{number}.safetensors", part)
        weight_map |= {name: f"{number}.safetensors" for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    decoder = import_run(folder, tmp_path / "run")
    assert torch.equal(decoder.lm_head.weight, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("changes", [
    {}, {"head_dim": 10}, {"num_key_value_heads": 6}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_equal_those_of_transformers(changes, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{key: value for key, value in LLAMA.items()
                                         if key != "model_type"} | changes)
    theirs = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    (tmp_path / "in" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    decoder = import_run(tmp_path / "in", tmp_path / "run")
    with torch.no_grad():
        expected = theirs.float()(some_ids(2, 50)).logits
        assert torch.allclose(decoder(some_ids(2, 50)), expected, atol=1e-5)


REFUSED_CONFIGS = {
    "mistral": ({"model_type": "mistral"}, "'mistral'"),
    "no type": ({"model_type": None}, "of type None"),
    "a list as type": ({"model_type": ["llama"]}, "of type"),
    "scaled": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scaled rotary"),
    "scaled, older": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rotary"),
    "scaled, newer": ({"rope_parameters": {"rope_type": "yarn"}}, "scaled rotary"),
    "rope text": ({"rope_scaling": "yes"}, "scaled rotary"),
    "partial": ({"partial_rotary_factor": 0.5}, "part of each head"),
    "biases": ({"attention_bias": True}, "biases"),
    "MLP biases": ({"mlp_bias": True}, "biases"),
    "activation": ({"hidden_act": "gelu"}, "'gelu'"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantized"),
    "no width": ({"hidden_size": None}, "no hidden_size"),
    "text as width": ({"hidden_size": "24"}, "hidden_size is '24'"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "many layers": ({"num_hidden_layers": 10 ** 6}, "num_hidden_layers is 1000000"),
    "huge context": ({"max_position_embeddings": 10 ** 30}, "max_position_embeddings is"),
    "NaN": ({"rope_theta": float("nan")}, "rope_theta is nan"),
    "tied in words": ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    "heads": ({"num_attention_heads": 5, "num_key_value_heads": 5}, "do not fit together"),
    "key heads": ({"num_key_value_heads": 4}, "do not fit together"),
    "odd heads": ({"head_dim": 9}, "do not fit together")}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_what_the_decoder_lacks_is_refused(case):
    changes, said = REFUSED_CONFIGS[case]
    with pytest.raises(UserError, match=said) as error:
        config_fields(LLAMA | changes, "here")
    assert "\n" not in str(error.value)


def test_a_long_context_is_cut_and_defaults_are_llamas():
    short = {key: LLAMA[key] for key in ("model_type", "hidden_size", "intermediate_size",
                                         "vocab_size", "num_hidden_layers", "num_attention_heads")}
    fields = config_fields(short | {"max_position_embeddings": 10 ** 6}, "here")
    assert fields["context"] == 131_072
    assert (fields["n_kv_head"], fields["rope_theta"], fields["tied"]) == (6, 10_000, False)
    newer = short | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert config_fields(newer, "here")["rope_theta"] == 7


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    tensors = llama_tensors(LLAMA)
    name = "model.layers.1.mlp.up_proj.weight"
    without = {key: value for key, value in tensors.items() if key != name}
    cases = [("lacks tensor 'model.layers.1.mlp.up_proj.weight'", LLAMA, without),
             ("has the unknown tensor 'x'", LLAMA, tensors | {"x": torch.ones(1)}),
             ("has the shape", LLAMA, tensors | {name: torch.ones(40, 25)}),
             ("has the shape", LLAMA | {"vocab_size": 2 ** 31}, tensors),
             ("lacks tensor", LLAMA | {"num_hidden_layers": 3}, tensors),
             ("lacks tensor 'pico_decoder.*and 20 more", PICO, tensors),
             ("ids up to 256", LLAMA | {"vocab_size": 256}, tensors)]
    for i, (said, config, state) in enumerate(cases):
        folder = write_folder(tmp_path / str(i), config, state)
        with pytest.raises(UserError, match=said):
            import_run(folder, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_an_altered_run_is_refused_before_it_takes_memory(tmp_path, monkeypatch):
    tensors = llama_tensors(LLAMA)
    import_run(write_folder(tmp_path / "in", LLAMA, tensors), tmp_path / "run")
    built = []

    class Recorded(Decoder):
        def __init__(self, config):
            super().__init__(config)
            built.append(self.lm_head.weight.is_meta)

    monkeypatch.setattr(model, "Decoder", Recorded)
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    for changes in ({"vocab_size": 301}, {"intermediate_size": 41}, {"head_dim": 6}):
        path.write_text(json.dumps(settings | changes))
        with pytest.raises(UserError, match="does not fit its config.json"):
            model.load_run(tmp_path / "run")
    assert built == [True] * 3  # shapes without values


# ---- an imported run is a run ------------------------------------------------------------------

@pytest.fixture
def imported(tmp_path):
    """Two imported runs, runs/pico and runs/llama, in an empty folder."""
    (tmp_path / "runs").mkdir()
    for name, config, tensors in (("pico", PICO, pico_tensors()),
                                  ("llama", LLAMA, llama_tensors(LLAMA))):
        import_run(write_folder(tmp_path / name, config, tensors), tmp_path / "runs" / name)
    return tmp_path


@pytest.fixture
def command(imported, monkeypatch, capsys):
    """command(chapter, *flags) -> (exit code, stdout, stderr), in the folder of the runs."""
    monkeypatch.chdir(imported)

    def call(chapter, *flags):
        monkeypatch.setattr("sys.argv", [f"{chapter.__name__}.py", *map(str, flags)])
        try:
            chapter.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return call


def test_the_command_imports_and_never_overwrites(command, imported):
    code, out, _ = command(model, "--import", "pico", "--out", "runs/new")
    assert code == 0
    assert "python ner.py runs/new" in out
    settings = model.load_run("runs/new")[1]
    assert (settings["name"], settings["size"], settings["imported_from"]) == (
        "new", "pico-0m", "pico")
    assert isinstance(load_encoding("runs/new"), ByteLevelEncoding)
    before = (imported / "runs" / "new" / "ckpt.pt").read_bytes()
    for flags, said in ((("--import", "llama", "--out", "runs/new"), "already exists"),
                        (("--import", "llama"), "only work together"),
                        (("--out", "runs/x"), "only work together"),
                        (("runs/pico", "--import", "llama", "--out", "runs/x"),
                         "only work together"),
                        (("--import", "nothing", "--out", "runs/x"), "config.json: No such file")):
        code, _, err = command(model, *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err
    assert (imported / "runs" / "new" / "ckpt.pt").read_bytes() == before


def test_a_damaged_file_is_one_line(command, imported):
    path = imported / "llama" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, _, err = command(model, "--import", "llama", "--out", "runs/x")
    assert (code, err.count("\n")) == (2, 1)
    assert "damaged or not a safetensors file" in err
    assert sorted(path.name for path in (imported / "runs").iterdir()) == ["llama", "pico"]


def test_it_samples(command):
    flags = ("--tokens", 5, "--top-k", 3, "--device", "cpu")
    code, out, _ = command(model, "runs/pico", "--prompt", "café", *flags)
    assert code == 0
    assert out.startswith("café")
    assert command(model, "runs/pico", "--prompt", "", *flags)[0] == 0


def test_it_may_have_no_token_that_ends_a_text(command, imported):
    run = imported / "runs" / "pico"
    (run / "tokenizer.json").write_text(json.dumps(TOKENIZER | {"added_tokens": []}))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    code, _, err = command(model, run, "--prompt", "")
    assert (code, err.count("\n")) == (2, 1)
    assert "give a --prompt" in err
    assert command(model, run, "--prompt", "a", "--tokens", 3)[0] == 0
    assert command(model, run, "--export", "out")[0] == 0
    assert json.loads((imported / "out" / "config.json").read_text())["eos_token_id"] is None


def test_training_refuses_to_continue_it(imported, train_here):
    for flags in ((), ("--resume",)):
        with pytest.raises(UserError, match="imported model, which cannot be trained"):
            train_here("--name", "pico", *flags)


def test_it_is_tagged_next_to_decoders_that_were_not_trained(command, imported):
    code, _, err = command(
        ner, "runs/pico", "runs/llama", "--scratch", "--train", "toy", "--test", "toy", "--mode",
        "head", "full", "--epochs", 1, "--max-len", 200, "--quiet", "--predictions")
    assert code == 0, err
    cells = json.loads((imported / "ner" / "ner.json").read_text())
    assert {cell["run"] for cell in cells} == {"pico", "llama", "scratch-pico-0m",
                                               "scratch-llama-0m"}
    assert len(cells) == 8
    assert len(list((imported / "ner").glob("*.tsv"))) == 8


def test_decoders_of_other_shapes_are_not_taken_for_one(imported):
    """Three models of one size and vocabulary, that differ in their heads alone."""
    runs = [imported / "runs" / name for name in ("llama", "x", "y")]
    for run, heads in zip(runs[1:], (2, 4)):
        config = LLAMA | {"num_attention_heads": heads}
        import_run(write_folder(imported / run.name, config, llama_tensors(config)), run)
    models, groups = ner.load_models(runs, True)
    untrained = [name for name in models if name.startswith("scratch")]
    assert [models[name][0].config.n_head for name in untrained] == [6, 2, 4]
    assert len(groups) == 6


def test_the_tagger_counts_the_bytes_of_normalised_words(imported):
    encoding = load_encoding(imported / "runs" / "pico")
    words = ["cafe\u0301", "x", "e\u0301"]
    [sentence] = ner.encode([(words, ["O"] * 3)], encoding)
    assert encoding.decode(sentence.ids.tolist()) == "café x é"
    assert sentence.position.tolist() == [0, 6, 8]


def test_it_is_probed_once(command, corpus, monkeypatch):
    monkeypatch.setattr(probe.data, "load", lambda cache: corpus)
    code, out, _ = command(probe, "runs/pico")
    rows = out.splitlines()
    assert code == 0
    assert [row.split()[0] for row in rows[1:]] == ["layer", "0", "1"]
    encoding, ids = load_encoding("runs/pico"), []
    for document in corpus.encoding.decode(corpus.val.tolist()).split(END):
        ids += [*encoding.encode_ordinary(document), 256]
    windows = probe.data.validation_windows(np.array(ids), 64, 4)  # of its context
    figures = probe.measure(model.load_run("runs/pico")[0], windows)
    rank, entropy = float(rows[3].split()[1]), float(rows[3].split()[6])
    assert rank == pytest.approx(figures["effective_rank"]["hidden"][1], abs=0.01)
    assert entropy == pytest.approx(np.mean(figures["head_entropy"]["nats"][1]), abs=0.01)
    for flags in (["runs/pico", "runs/llama"], ["runs/pico", "--live"]):
        code, _, err = command(probe, *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert "has no log" in err
