import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import model
import text
from conftest import toy_text
from model import Config, Decoder


@pytest.mark.parametrize("size, count", [("11m", 11_282_784), ("65m", 64_595_328), ("181m", 181_095_168), ("570m", 569_808_384)])
def test_parameter_counts(size, count):
    with torch.device("meta"):
        decoder = Decoder(Config(model.SIZES[size]))
    assert sum(p.numel() for p in decoder.parameters()) == count


def test_compiles_where_a_gpu_and_triton_are(monkeypatch, tiny):
    asked, here = [], ["triton"]
    monkeypatch.setattr(torch, "compile", lambda module, **flags: asked.append((module, flags)) or "compiled")
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: name in here or None)
    assert model.compiled(tiny.model) is tiny.model and not asked
    on_gpu = SimpleNamespace(cos=SimpleNamespace(device=torch.device("cuda", 1)))
    assert model.compiled(on_gpu) == "compiled" and asked == [(on_gpu, {"dynamic": False})]
    here.clear()
    assert model.compiled(on_gpu) is on_gpu


def test_parameter_names_are_hugging_faces(tiny):
    layer = "model.layers.1."
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", layer + "input_layernorm.weight",
                layer + "post_attention_layernorm.weight", *(f"{layer}self_attn.{p}_proj.weight" for p in "qkvo"),
                *(f"{layer}mlp.{p}_proj.weight" for p in ("gate", "up", "down"))}
    assert {name for name in tiny.state_dict() if ".layers.0." not in name} == expected


def test_rms_norm_twin():
    x, norm = torch.randn(3, 5, 8), model.RMSNorm(8, 1e-6)
    norm.weight.data = torch.randn(8)
    expected = torch.stack([row / ((row ** 2).sum() / 8 + 1e-6).sqrt() for row in x.view(-1, 8)]).view_as(x) * norm.weight
    assert torch.allclose(norm(x), expected, atol=1e-6)


def test_rope_twin_by_complex_numbers():
    """Pair i of position t is a complex number turned by t * theta^(-2i/d)."""
    config = Config(d_model=96)
    cos, sin = model.rope_tables(config)
    x = torch.randn(2, 40, 3, 8)
    turned = model.rotate(x, cos[:40, None], sin[:40, None])
    frequency = 10000.0 ** (-torch.arange(4) * 2 / 8)
    turn = torch.polar(torch.ones(40, 4), torch.arange(40)[:, None] * frequency)[None, :, None]
    expected = torch.complex(x[..., :4], x[..., 4:]) * turn
    assert torch.allclose(turned, torch.cat([expected.real, expected.imag], dim=-1), atol=1e-5)


def test_attention_twin_with_loops(tiny):
    """Grouped-query causal attention, head by head and position by position."""
    attention, config = tiny.model.layers[0].self_attn, tiny.config
    x, dim = torch.randn(1, 5, config.d_model, dtype=torch.float64), config.head_dim
    cos, sin = tiny.model.cos[:5, None], tiny.model.sin[:5, None]
    q = model.rotate((x @ attention.q_proj.weight.T).view(1, 5, 6, dim), cos, sin)
    k = model.rotate((x @ attention.k_proj.weight.T).view(1, 5, 2, dim), cos, sin)
    v = (x @ attention.v_proj.weight.T).view(1, 5, 2, dim)
    rows = []
    for t in range(5):
        heads = []
        for h in range(6):
            weight = torch.softmax(torch.stack([q[0, t, h] @ k[0, s, h // 3] for s in range(t + 1)]) / math.sqrt(dim), dim=0)
            heads.append(sum(w * v[0, s, h // 3] for s, w in enumerate(weight)))
        rows.append(torch.cat(heads) @ attention.o_proj.weight.T)
    assert torch.allclose(attention(x, cos, sin)[0], torch.stack(rows), atol=1e-10)


def test_logits_do_not_look_ahead(tiny):
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    before, after = tiny(ids), tiny(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-12) and not torch.allclose(before[:, 7:], after[:, 7:])


def test_bf16_loss_and_gradient_are_close_to_float32():
    decoder = Decoder(Config(vocab_size=3000, n_layer=2), torch.Generator().manual_seed(0))
    ids = torch.randint(3000, (4, 71), generator=torch.Generator().manual_seed(1))
    results = []
    for enabled in (False, True):
        decoder.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = decoder.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in decoder.parameters()])))
    assert abs(results[0][0] - results[1][0]) < 0.01
    assert F.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.99


def test_cached_generation_equals_uncached(tiny):
    def uncached(ids, n, temperature, generator):
        for _ in range(n):
            logits = tiny(torch.tensor([ids]))[0, -1, :40]
            new = torch.multinomial((logits / temperature).softmax(dim=0), 1, generator=generator) if temperature else logits.argmax()
            ids = ids + [new.item()]
        return ids
    tiny.float()
    prompt = [3, 1, 4, 1, 5]
    for temperature in (0, 1.0):
        text = list(model.generate(tiny, prompt, 100, temperature, top_k=0, n_ids=40, generator=torch.Generator().manual_seed(2)))
        assert prompt + text[:59] == uncached(prompt, 59, temperature, torch.Generator().manual_seed(2))  # up to the context of 64
        assert len(text) == 100 and max(text) < 40  # and on beyond it


def test_generation_respects_top_k_and_stop(tiny):
    greedy = list(model.generate(tiny, [1], 5, temperature=0))
    assert list(model.generate(tiny, [1], 5, temperature=5.0, top_k=1, generator=torch.Generator())) == greedy
    assert list(model.generate(tiny, [1], 5, temperature=0, stop=greedy[2])) == greedy[:greedy.index(greedy[2])]


def test_flops_formula_against_pytorchs_counter():
    config = Config(vocab_size=4096, n_layer=3)
    decoder = Decoder(config)
    ids = torch.randint(4096, (2, 128))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(decoder(ids).flatten(0, 1), ids.flatten()).backward()  # the plain twin: all logits at once
    assert model.lm_flops(config, 2, 128) == pytest.approx(counter.get_total_flops(), rel=0.05)


def read_safetensors(path):
    """By the format's own description: a length, a JSON header, raw bytes."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:8 + size]), raw[8 + size:]
    assert header.pop("__metadata__") == {"format": "pt"} and (8 + size) % 8 == 0
    assert all(entry["dtype"] == "F32" for entry in header.values())
    assert sorted(entry["data_offsets"] for entry in header.values())[-1][1] == len(body)
    return {name: np.frombuffer(body[slice(*entry["data_offsets"])], dtype="<f4").reshape(entry["shape"]) for name, entry in header.items()}


def merge_by_list(pieces, merges):
    """Hugging Face's rule: of the neighbours that stand in the list, merge the pair that stands first, the leftmost of its kind."""
    while True:
        at = min(range(len(pieces) - 1), key=lambda i: (merges.get((pieces[i], pieces[i + 1]), len(merges)), i), default=None)
        if at is None or (pieces[at], pieces[at + 1]) not in merges:
            return pieces
        pieces = pieces[:at] + [pieces[at] + pieces[at + 1]] + pieces[at + 2:]


def test_export_holds_the_weights_and_tokens_of_the_run(corpus, tmp_path):
    decoder = Decoder(Config(24, corpus.vocab_size, n_layer=2), torch.Generator().manual_seed(0))
    checkpoint.export(decoder, corpus.encoding, tmp_path / "hf")
    weights = read_safetensors(tmp_path / "hf" / "model.safetensors")
    assert weights.keys() == decoder.state_dict().keys()
    assert all(np.array_equal(weights[name], tensor.numpy()) for name, tensor in decoder.state_dict().items())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"], config["head_dim"]) == (24, 96, 2, 2)
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    vocab, letters = tokenizer["model"]["vocab"], text.byte_letters()
    merges = {tuple(pair): i for i, pair in enumerate(tokenizer["model"]["merges"])}
    assert tokenizer["model"]["ignore_merges"] is True and tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == text.PATTERN
    assert letters[ord(" ")] == "Ġ" and letters[ord("\n")] == "Ċ" and letters[ord("a")] == "a" and len(set(letters)) == 256
    rng = random.Random(0)
    words = regex.findall(text.PATTERN, toy_text(300) + " naïve 日本語 🙂 x" + "".join(rng.choice("abdeiou kt'1 \n") for _ in range(3000)))
    for word in set(words):
        pieces = [letters[byte] for byte in word.encode()]
        whole = tokenizer["model"]["ignore_merges"] and "".join(pieces) in vocab
        tokens = [vocab["".join(pieces)]] if whole else [vocab[piece] for piece in merge_by_list(pieces, merges)]
        assert tokens == corpus.encoding.encode_ordinary(word), word
    assert {token["content"]: token["id"] for token in tokenizer["added_tokens"]} == {text.END: corpus.encoding.n_vocab - 2, text.MASK: corpus.mask_id}
