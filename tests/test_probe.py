"""Chapter 4: effective rank and attention entropy of known matrices and heads, the probe line,
and the steps at which a run is probed."""
import json
import math

import numpy as np
import pytest
import torch

import probe
from model import Config, Decoder
from probe import effective_rank, head_entropy


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rank_by_svd(matrix):
    """The effective rank as its definition says."""
    singular = torch.linalg.svdvals(matrix.detach().double())
    p = singular / singular.sum()
    entropy = -(p * p.clamp_min(1e-300).log()).sum()
    return math.exp(entropy)


# ---- effective rank ----------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 3, 7])
def test_effective_rank_of_k_equal_directions(k):
    padded = torch.zeros(9, 12)
    padded[:k, :k] = torch.eye(k)
    assert effective_rank(padded) == pytest.approx(k)
    assert effective_rank(padded.T) == pytest.approx(k)


def test_effective_rank_of_known_matrices():
    generator = seeded(0)
    one_direction = torch.randn(8, 1, generator=generator) @ torch.randn(1, 5, generator=generator)
    assert effective_rank(one_direction) == pytest.approx(1, abs=1e-3)
    two_shares = torch.diag(torch.tensor([3.0, 1.0]))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert effective_rank(two_shares) == pytest.approx(math.exp(entropy))
    assert effective_rank(torch.eye(3)) == pytest.approx(3, abs=1e-6)
    assert effective_rank(torch.eye(2, 5)) == pytest.approx(2, abs=1e-6)
    assert effective_rank(torch.ones(3, 4)) == pytest.approx(1, abs=1e-6)


def test_effective_rank_of_nothing_and_of_no_number():
    assert effective_rank(torch.zeros(3, 3)) == 0
    assert effective_rank(torch.zeros(3, 7)) == 0
    assert math.isnan(effective_rank(torch.full((3, 3), math.nan)))


def test_effective_rank_is_accurate_on_a_real_layer():
    decoder = Decoder(Config(vocab_size=500), seeded(0))
    decoder.loss(*torch.randint(500, (2, 4, 32), generator=seeded(1))).backward()
    mlp = decoder.model.layers[3].mlp
    for matrix in (mlp.up_proj.weight, mlp.up_proj.weight.grad):
        assert effective_rank(matrix) == pytest.approx(rank_by_svd(matrix), rel=1e-3)


# ---- attention entropy -------------------------------------------------------------------------

def test_head_entropy_of_uniform_and_of_sharp_attention():
    q, k = torch.zeros(2, 6, 9, 4), torch.randn(2, 2, 9, 4, generator=seeded(0))
    expected = torch.arange(1, 10).float().log().expand(6, 9)  # ln t over t visible positions
    assert torch.allclose(head_entropy(q, k), expected, atol=1e-5)
    # Each position looks at itself.
    sharp = 1e3 * torch.eye(9).expand(2, 6, 9, 9)
    assert head_entropy(sharp, sharp[:, :2]).abs().max() < 1e-3


def test_head_entropy_twin_with_loops():
    """By loops over sequences, heads and positions, with the keys shared by groups of heads."""
    generator = seeded(0)
    q = torch.randn(2, 12, 6, 8, generator=generator)
    k = torch.randn(2, 4, 6, 8, generator=generator)
    ours = head_entropy(q, k)
    for head in range(12):
        for t in range(6):
            entropies = []
            for b in range(2):
                scores = [q[b, head, t] @ k[b, head // 3, s] for s in range(t + 1)]
                p = torch.softmax(torch.stack(scores) / math.sqrt(8), dim=0)
                entropies.append(-(p * p.log()).sum().item())
            assert ours[head, t] == pytest.approx(np.mean(entropies), abs=1e-5)


# ---- the probe line ----------------------------------------------------------------------------

@pytest.fixture
def decoder():
    return Decoder(Config(vocab_size=500, n_layer=3), seeded(0))


@pytest.fixture
def batch():
    return torch.randint(500, (2, 17), generator=seeded(1))


def test_measure_has_the_logs_keys_and_leaves_no_trace(decoder, batch):
    # The line goes to the log as JSON.
    line = json.loads(json.dumps(probe.measure(decoder, batch)))
    names = ("hidden", "attention", "mlp", "attention_grad", "mlp_grad")
    for key in ("effective_rank", "proportional_effective_rank"):
        lengths = {name: len(values) for name, values in line[key].items()}
        assert lengths == dict.fromkeys(names, 3)
    assert np.shape(line["head_entropy"]["nats"]) == (3, 12)
    normalised = np.array(line["head_entropy"]["normalised"])
    assert normalised.shape == (3, 12)
    # Untrained heads look everywhere.
    assert (normalised > 0.7).all()
    assert (normalised <= 1).all()
    for p in decoder.parameters():
        assert p.grad is None
    for layer in decoder.model.layers:
        assert not layer._forward_hooks
        assert not layer.self_attn._forward_pre_hooks


def test_measured_ranks_are_those_of_states_weights_and_gradients(decoder, batch):
    line = probe.measure(decoder, batch)
    ranks, shares = line["effective_rank"], line["proportional_effective_rank"]
    with torch.no_grad():
        states = decoder.model.embed_tokens(batch[:, :-1])
        cos, sin = decoder.model.cos[:16, None], decoder.model.sin[:16, None]
        states = decoder.model.layers[0](states, cos, sin).flatten(0, 1)  # (32, D)
    centred = effective_rank(states - states.mean(dim=0))
    assert ranks["hidden"][0] == pytest.approx(centred, rel=1e-4)
    assert shares["hidden"][0] == pytest.approx(centred / 32, rel=1e-4)
    decoder.loss(batch[:, :-1], batch[:, 1:]).backward()
    layer = decoder.model.layers[1]
    for name, block in (("attention", layer.self_attn), ("mlp", layer.mlp)):
        weights = list(block.parameters())
        gradients = [weight.grad for weight in weights]
        for key, matrices in ((name, weights), (f"{name}_grad", gradients)):
            found = np.array([rank_by_svd(matrix) for matrix in matrices])
            largest = np.array([min(matrix.shape) for matrix in matrices])
            assert ranks[key][1] == pytest.approx(found.mean(), rel=1e-3)
            assert shares[key][1] == pytest.approx((found / largest).mean(), rel=1e-3)


def test_probe_steps_are_dense_first_and_even_later():
    steps = [step for step in range(451) if probe.is_probe_step(step, 100, 450)]
    assert steps == [0, 1, 2, 4, 8, 16, 32, 64, 100, 200, 300, 400, 450]
