"""Chapter 2: the decoder against twins that are written the slow and plain way, and sampling."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
from model import Config, Decoder
from plumbing.commands import UserError

PARAMETERS = {"11m": 11_282_784, "65m": 64_595_328, "181m": 181_095_168, "570m": 569_808_384}


# ---- the decoder -------------------------------------------------------------------------------

@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts(size):
    with torch.device("meta"):
        decoder = Decoder(Config(model.SIZES[size]))
    assert sum(p.numel() for p in decoder.parameters()) == PARAMETERS[size]


def test_parameter_names_are_hugging_faces(tiny):
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    layer = "model.layers.1"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        expected.add(f"{layer}.{norm}.weight")
    for projection in "qkvo":
        expected.add(f"{layer}.self_attn.{projection}_proj.weight")
    for projection in ("gate", "up", "down"):
        expected.add(f"{layer}.mlp.{projection}_proj.weight")
    assert {name for name in tiny.state_dict() if ".layers.0." not in name} == expected


def test_rms_norm_twin():
    generator = torch.Generator().manual_seed(0)
    x, norm = torch.randn(3, 5, 8, generator=generator), model.RMSNorm(8, 1e-6)
    norm.weight.data = torch.randn(8, generator=generator)
    rows = [row / ((row ** 2).sum() / 8 + 1e-6).sqrt() for row in x.view(-1, 8)]
    expected = torch.stack(rows).view_as(x) * norm.weight
    assert torch.allclose(norm(x), expected, atol=1e-6)


def test_rope_twin_by_complex_numbers():
    """Pair i of position t is a complex number turned by t * theta^(-2i/d)."""
    config = Config(d_model=96)
    cos, sin = model.rope_tables(config)
    x = torch.randn(2, 40, 3, 8, generator=torch.Generator().manual_seed(0))
    turned = model.rotate(x, cos[:40, None], sin[:40, None])
    frequency = 10000.0 ** (-torch.arange(4) * 2 / 8)
    angles = torch.arange(40)[:, None] * frequency  # (T, head_dim / 2)
    turn = torch.polar(torch.ones(40, 4), angles)[None, :, None]
    expected = torch.complex(x[..., :4], x[..., 4:]) * turn
    expected = torch.cat([expected.real, expected.imag], dim=-1)
    assert torch.allclose(turned, expected, atol=1e-5)


def test_attention_twin_with_loops(tiny):
    """Grouped-query causal attention, head by head and position by position."""
    attention, config = tiny.model.layers[0].self_attn, tiny.config
    dim = config.head_dim
    x = torch.randn(1, 5, config.d_model, dtype=torch.float64,
                    generator=torch.Generator().manual_seed(0))
    cos, sin = tiny.model.cos[:5, None], tiny.model.sin[:5, None]
    q = model.rotate((x @ attention.q_proj.weight.T).view(1, 5, 6, dim), cos, sin)[0]
    k = model.rotate((x @ attention.k_proj.weight.T).view(1, 5, 2, dim), cos, sin)[0]
    v = (x @ attention.v_proj.weight.T).view(5, 2, dim)
    rows = []
    for t in range(5):
        heads = []
        for h in range(6):
            shared = h // 3  # three query heads share a key head
            scores = torch.stack([q[t, h] @ k[s, shared] for s in range(t + 1)])
            weights = torch.softmax(scores / math.sqrt(dim), dim=0)
            heads.append(sum(weight * v[s, shared] for s, weight in enumerate(weights)))
        rows.append(torch.cat(heads) @ attention.o_proj.weight.T)
    assert torch.allclose(attention(x, cos, sin)[0], torch.stack(rows), atol=1e-10)


def test_logits_do_not_look_ahead(tiny):
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    before, after = tiny(ids), tiny(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-12)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_bf16_loss_and_gradient_are_close_to_float32():
    decoder = Decoder(Config(vocab_size=3000, n_layer=2), torch.Generator().manual_seed(0))
    ids = torch.randint(3000, (4, 71), generator=torch.Generator().manual_seed(1))
    losses, gradients = [], []
    for enabled in (False, True):
        decoder.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = decoder.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in decoder.parameters()]))
    assert abs(losses[0] - losses[1]) < 0.01
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


def test_flops_formula_against_pytorchs_counter():
    config = Config(vocab_size=4096, n_layer=3)
    decoder = Decoder(config)
    ids = torch.randint(4096, (2, 128))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        # The plain twin: all logits at once.
        F.cross_entropy(decoder(ids).flatten(0, 1), ids.flatten()).backward()
    assert model.lm_flops(config, 2, 128) == pytest.approx(counter.get_total_flops(), rel=0.05)


# ---- sampling ----------------------------------------------------------------------------------

def uncached(decoder, ids, n_tokens, temperature, generator):
    """What generate should add to ids (a list of int), of the first 40 ids and without a cache."""
    for _ in range(n_tokens):
        logits = decoder(torch.tensor([ids]))[0, -1, :40]
        if temperature:
            probs = (logits / temperature).softmax(dim=0)
            new = torch.multinomial(probs, 1, generator=generator)
        else:
            new = logits.argmax()
        ids = ids + [new.item()]
    return ids


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_cached_generation_equals_uncached(temperature, tiny):
    tiny.float()
    prompt = [3, 1, 4, 1, 5]
    generator = torch.Generator().manual_seed(2)
    new = list(model.generate(tiny, prompt, 100, temperature, top_k=0, n_ids=40,
                              generator=generator))
    # They agree up to the context of 64.
    expected = uncached(tiny, prompt, 59, temperature, torch.Generator().manual_seed(2))
    assert prompt + new[:59] == expected
    # Generation goes on beyond it.
    assert len(new) == 100
    assert max(new) < 40


def test_generation_respects_top_k_and_stop(tiny):
    greedy = list(model.generate(tiny, [1], 5, temperature=0))
    one_choice = model.generate(tiny, [1], 5, temperature=5.0, top_k=1,
                                generator=torch.Generator())
    assert list(one_choice) == greedy
    stopped = model.generate(tiny, [1], 5, temperature=0, stop=greedy[2])
    assert list(stopped) == greedy[:greedy.index(greedy[2])]


def test_weights_whose_logits_overflow_are_refused(tiny):
    tiny.float()
    with torch.no_grad():
        tiny.lm_head.weight.fill_(3e38)
    with pytest.raises(UserError, match="not finite"):
        list(model.generate(tiny, [1], 1))
