"""The decoder: a Llama-style transformer in four sizes, its next-token loss, and sampling.

    python model.py                                      # the table of sizes
    python model.py runs/11m-meta --prompt "Returns the" # a sample from a trained run
    python model.py runs/11m-meta --export FOLDER        # for Hugging Face's transformers

Architecture after Touvron et al. 2023 (arXiv 2302.13971) as the paper configures it: 12 layers, 12 query heads
that share 4 key/value heads (GQA, arXiv 2305.13245), rotary positions (arXiv 2104.09864), RMSNorm, SwiGLU, no
biases, untied embeddings. Parameter names and the rotary convention are those of Hugging Face's LlamaForCausalLM.
"""
import argparse
import codecs
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import export, load_checkpoint, read_settings
from kernels import attend, cross_entropy
from text import END, DataError, load_encoding

SIZES = {"11m": 96, "65m": 384, "181m": 768, "570m": 1536}  # name -> d_model


@dataclass
class Config:
    """Everything that fixes the decoder's shape; the defaults are the paper's, at 11m."""
    d_model: int = 96
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12       # query heads
    n_kv_head: int = 4     # key/value heads, each shared by n_head / n_kv_head query heads
    context: int = 2048    # longest sequence, in tokens
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    @property
    def head_dim(self):
        return self.d_model // self.n_head

    @property
    def d_ff(self):
        return 4 * self.d_model


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019). The residual stream is float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_tables(config, device=None):
    """Cosines and signed sines of the rotary angles, each (context, head_dim), float32; both halves of a head repeat
    the same head_dim / 2 frequencies (the "rotate-half" convention), and the first half's sines are negated."""
    half = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    angles = torch.arange(config.context, device=device).float()[:, None] * config.rope_theta ** -half
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + head_dim/2]) of x (B, T, heads, head_dim) by its position's angle, in the tables' precision."""
    x = x.to(cos.dtype)
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, kv = config.d_model, config.n_kv_head * config.head_dim
        self.head_dim, self.n_head, self.n_kv_head = config.head_dim, config.n_head, config.n_kv_head
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def qkv(self, x, cos, sin):
        """x (B, T, D) -> queries (B, n_head, T, head_dim), keys and values (B, n_kv_head, T, head_dim)."""
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])  # one product instead of three
        heads = F.linear(x, weight).unflatten(-1, (-1, self.head_dim))
        turned, v = heads.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        q, k = rotate(turned, cos, sin).to(v.dtype).split([self.n_head, self.n_kv_head], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, cos, sin, cache=None):
        B, T, D = x.shape
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:  # a dict of the keys and values of the tokens before x, for sampling
            if cache:
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
            cache.update(k=k, v=v)
        causal = T == k.shape[2]  # otherwise x is the one newest token, which may see everything
        out = attend(q, k, v, causal and T > 1)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache).to(x.dtype)  # a sum of two types would be slower
        return x + self.mlp(self.post_attention_layernorm(x)).to(x.dtype)


class Backbone(nn.Module):
    """Token ids (B, T) -> final hidden states (B, T, D), float32: all that a meta step needs of the decoder."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)  # (context, head_dim)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids, caches=None):
        start = caches[0]["k"].shape[2] if caches and caches[0] else 0  # tokens already in the cache
        cos, sin = (table[start:start + ids.shape[1], None] for table in (self.cos, self.sin))  # (T, 1, head_dim)
        x = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, caches[i] if caches else None)
        return self.norm(x)


class Decoder(nn.Module):
    """The language model: `model`, the backbone, and `lm_head`, which scores the vocabulary.

    Weights are drawn from `generator`: N(0, 1 / inputs), the two projections that write to the residual stream scaled
    by 1 / sqrt(2 n_layer) after GPT-2, embeddings N(0, 0.5^2), output rows N(0, 0.02^2). With the customary 0.02
    throughout, a narrow model's first large steps drown its words: all states are alike and the loss stays unigram."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2 and not p.is_meta:
                std = {"model.embed_tokens.weight": 0.5, "lm_head.weight": 0.02}.get(name, p.shape[1] ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= (2 * config.n_layer) ** -0.5
                nn.init.normal_(p, std=std, generator=generator)

    def forward(self, ids, caches=None):
        """Logits (B, T, V) of the token after each of ids (B, T). Training uses `loss`, which never holds them all."""
        return self.lm_head(self.model(ids, caches))

    def loss(self, ids, targets, backbone=None):
        """Mean next-token cross-entropy in nats of ids (B, T) against targets (B, T), as a scalar tensor; through `backbone`,
        if given, which `compiled` made of model."""
        hidden = (self.model if backbone is None else backbone)(ids)  # (B, T, D)
        return cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())


def compiled(backbone):
    """The backbone, compiled if it is on a GPU and Triton is here, once for each shape it meets: for training steps, which have
    few, and first derivatives. Evaluation and sampling, whose shapes are many, go through the backbone itself."""
    on_gpu = backbone.cos.device.type == "cuda" and importlib.util.find_spec("triton")
    return torch.compile(backbone, dynamic=False) if on_gpu else backbone


# ---- runs --------------------------------------------------------------------------------------------------

def load_run(folder, device="cpu"):
    """(decoder, config.json as a dict) of a trained run. Raises ValueError if the folder holds none."""
    settings = read_settings(folder)
    try:
        decoder = Decoder(Config(SIZES[settings["size"]], min(settings["vocab_size"], 65536)))
        decoder.load_state_dict(load_checkpoint(Path(folder))["model"])
    except (KeyError, TypeError, RuntimeError):
        raise ValueError(f"the checkpoint in {folder} does not fit its config.json") from None
    return decoder.to(device), settings


# ---- cost --------------------------------------------------------------------------------------------------

def backbone_flops(config, rows, length):
    """Model FLOPs of one forward pass over rows x length tokens: two for each weight and token in the layers'
    matrix products, and four for each pair of positions and channel in attention (the mask is not deducted)."""
    d, kv = config.d_model, config.n_kv_head * config.head_dim
    weights = config.n_layer * (2 * d * d + 2 * d * kv + 3 * d * config.d_ff)
    return rows * length * (2 * weights + 4 * config.n_layer * length * d)


def lm_flops(config, rows, length):
    """Model FLOPs of a next-token training step: forward once, backward twice, the output layer included."""
    return 3 * (backbone_flops(config, rows, length) + 2 * rows * length * config.d_model * config.vocab_size)


# ---- where it runs -----------------------------------------------------------------------------------------

def pick_device(name=None):
    """torch.device: the named one, or the best that is here (cuda, then mps, then cpu). Raises ValueError."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name or best)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {name} cannot be used ({str(error).splitlines()[0][:80]}): try --device {best}") from None
    return device


def precision(device):
    """Autocast to bf16 where the hardware computes in it: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX (four
    times float32 in matrix products there, where other CPUs emulate it slowly). Else float32, everywhere."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        native = features.get("avx512_bf16", False) or features.get("amx_bf16", False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=native)


# ---- sampling ----------------------------------------------------------------------------------------------

@torch.no_grad()
def generate(decoder, ids, n_tokens, temperature=0.8, top_k=50, n_ids=None, generator=None, stop=None):
    """Continue ids (list of int) by up to n_tokens and yield each new id. temperature 0 takes the likeliest; ids of
    n_ids and above (padding) are never drawn; `stop` ends the text. A cache of keys and values makes each token cost
    one position; where the context is full, the older half is forgotten."""
    device, context = decoder.lm_head.weight.device, decoder.config.context
    ids, caches = list(ids), None
    for _ in range(n_tokens):
        if caches is None or caches[0]["k"].shape[2] >= context:
            caches = [{} for _ in decoder.model.layers]
            seen = ids[-context:] if len(ids) <= context else ids[-context // 2:]
        else:
            seen = ids[-1:]
        logits = decoder(torch.tensor([seen], device=device), caches)[0, -1, :n_ids].float().cpu()
        if temperature > 0:
            if top_k:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -float("inf")
            new = torch.multinomial((logits / temperature).softmax(dim=0), 1, generator=generator).item()
        else:
            new = logits.argmax().item()
        if new == stop:
            return
        ids.append(new)
        yield new


# ---- the command -------------------------------------------------------------------------------------------

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """States each default once, and none where there is none."""

    def _get_help_string(self, action):
        plain = action.default is None or action.default is False or "default" in action.help
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser that states defaults and whose errors are one line, with exit code 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def table_of_sizes():
    lines = [f"{'size':>5} {'d_model':>8} {'head_dim':>9} {'layers':>7} {'parameters':>12}  of these in the layers"]
    for name, d_model in SIZES.items():
        with torch.device("meta"):
            decoder = Decoder(Config(d_model))
        total, layers = (sum(p.numel() for p in m.parameters()) for m in (decoder, decoder.model.layers))
        lines.append(f"{name:>5} {d_model:>8} {decoder.config.head_dim:>9} {decoder.config.n_layer:>7} {total:>12,}  {layers / total:.0%}")
    return "\n".join(lines)


def write_sample(decoder, encoding, args, device):
    """Print the prompt and what the model makes of it, as it comes."""
    end = encoding.encode_single_token(END)
    ids = encoding.encode_ordinary(args.prompt) or [end]
    pieces = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span two tokens
    print(args.prompt, end="", flush=True)
    with precision(device):
        for token in generate(decoder.eval(), ids, args.tokens, args.temperature, args.top_k, end + 1,
                              torch.Generator().manual_seed(args.seed), stop=end):
            print(pieces.decode(encoding.decode_single_token_bytes(token)), end="", flush=True)
    print(pieces.decode(b"", final=True))


def main():
    parser = Parser(description="Print the table of model sizes, or a sample from a trained run, or export it.")
    parser.add_argument("run", nargs="?", help="folder of a trained run, such as runs/11m-meta (default: print the sizes)")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the model for Hugging Face's transformers, to a new folder")
    parser.add_argument("--prompt", default="Returns the", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add at most; the end of a document ends the text")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the k likeliest tokens; 0: among all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best that is here)")
    args = parser.parse_args()
    if args.run is None:
        return print(table_of_sizes())
    if args.tokens < 0 or args.top_k < 0 or args.seed < 0 or not 0 <= args.temperature < float("inf"):
        parser.error("--tokens, --temperature, --top-k and --seed must not be negative")
    if args.export and args.export.exists():
        parser.error(f"{args.export} is there already: choose another folder")
    try:
        device = pick_device(args.device)
        decoder, _ = load_run(args.run, device)
        encoding = load_encoding(args.run)
        if args.export:
            export(decoder, encoding, args.export)
            print(f'written: {args.export}; next: transformers.AutoModelForCausalLM.from_pretrained("{args.export}")')
        else:
            write_sample(decoder, encoding, args, device)
    except (ValueError, DataError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write {error.filename or args.export} ({error.strerror})")
    except KeyboardInterrupt:
        parser.exit(130)


if __name__ == "__main__":
    main()
