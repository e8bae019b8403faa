"""Chapter 2. The decoder: a Llama-style transformer in four sizes, its loss, and sampling.

    python model.py                                       # the table of sizes
    python model.py runs/11m-meta --prompt "Returns the"  # a sample from a trained run
    python model.py runs/11m-meta --export FOLDER         # for Hugging Face's transformers
    python model.py --import FOLDER --out runs/NAME       # turn such a folder into a run

Start at `Decoder` and read down, from the whole to its parts. The architecture follows Touvron
et al. 2023 (arXiv 2302.13971) as configured in the paper (arXiv 2508.02189): 12 layers, 12 query
heads that share 4 key/value heads (GQA, arXiv 2305.13245), rotary positions (arXiv 2104.09864),
RMSNorm, SwiGLU, no biases, untied embeddings. Parameter names and the rotary convention are those
of Hugging Face's LlamaForCausalLM.
"""
# Imported first, so that Ctrl-C during loading exits quietly.
from plumbing.kernels import attend, cross_entropy

import codecs
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# name -> d_model
SIZES = {"11m": 96, "65m": 384, "181m": 768, "570m": 1536}


@dataclass
class Config:
    """The decoder's architecture. The defaults are those of the paper's smallest model."""
    d_model: int = 96
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12       # query heads
    n_kv_head: int = 4     # key/value heads, each shared by n_head / n_kv_head query heads
    context: int = 2048    # longest sequence, in tokens
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    # Imported models may differ from the paper's in these three settings, too.
    d_ff: int = None       # width of the MLP (default: 4 d_model)
    head_dim: int = None   # width of an attention head (default: d_model / n_head)
    tied: bool = False     # lm_head and the embeddings share one matrix

    def __post_init__(self):
        if self.d_ff is None:
            self.d_ff = 4 * self.d_model
        if self.head_dim is None:
            self.head_dim = self.d_model // self.n_head


# ---- the decoder -------------------------------------------------------------------------------

class Decoder(nn.Module):
    """The language model: the backbone `model`, and `lm_head`, which scores the vocabulary.

    Initial standard deviations are 1 / sqrt(inputs) for the weights of the layers, 0.5 for the
    embeddings and 0.02 for lm_head. The two projections that write to the residual stream are
    also divided by sqrt(2 n_layer), as in GPT-2. With the usual 0.02 everywhere, the first large
    steps make all hidden states of a narrow model alike, and it takes longer to learn more than
    the frequencies of tokens."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():
            if p.dim() == 1 or p.is_meta:  # norms start at 1; device "meta" stores no values
                continue
            std = p.shape[1] ** -0.5
            if name == "model.embed_tokens.weight":
                std = 0.5
            elif name == "lm_head.weight":
                std = 0.02
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= (2 * config.n_layer) ** -0.5
            nn.init.normal_(p, std=std, generator=generator)

    def forward(self, ids, caches=None):
        """Logits (B, T, V) for the token after each of ids (B, T). Training uses `loss`, which
        never holds all of them in memory."""
        return self.lm_head(self.model(ids, caches))

    def loss(self, ids, targets, backbone=None):
        """Mean next-token cross-entropy, in nats, for ids (B, T) and targets (B, T). Training
        passes the compiled form of self.model as `backbone`."""
        if backbone is None:
            backbone = self.model
        hidden = backbone(ids)  # (B, T, D)
        return cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())


class Backbone(nn.Module):
    """Token ids (B, T) -> final hidden states (B, T, D), float32. The meta steps of chapter 3 use
    only this part of the decoder."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)  # (context, head_dim)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids, caches=None):
        """caches is for sampling: for each layer, a dict with the keys and values of earlier
        tokens. It starts empty, and each call extends it."""
        start = 0
        if caches and caches[0]:
            start = caches[0]["k"].shape[2]
        positions = slice(start, start + ids.shape[1])
        cos, sin = self.cos[positions, None], self.sin[positions, None]  # (T, 1, head_dim)
        x = self.embed_tokens(ids)  # (B, T, D)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, caches[i] if caches else None)
        return self.norm(x)


class Layer(nn.Module):
    """Attention and then the MLP, each added to the residual stream x (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None):
        # x is float32. Casting a block's output first is faster than adding two types.
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache).to(x.dtype)
        return x + self.mlp(self.post_attention_layernorm(x)).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions."""

    def __init__(self, config):
        super().__init__()
        d = config.d_model
        queries, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(d, queries, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.o_proj = nn.Linear(queries, d, bias=False)

    def qkv(self, x, cos, sin):
        """x (B, T, D) -> queries (B, n_head, T, head_dim), and keys and values
        (B, n_kv_head, T, head_dim). Queries and keys are rotated by their positions."""
        # One matrix product is faster than three.
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        heads = F.linear(x, weight).unflatten(-1, (-1, self.head_dim))  # (B, T, heads, head_dim)
        qk, v = heads.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        q, k = rotate(qk, cos, sin).to(v.dtype).split([self.n_head, self.n_kv_head], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, cos, sin, cache=None):
        T = x.shape[1]
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:
            if cache:
                k = torch.cat([cache["k"], k], dim=2)
                v = torch.cat([cache["v"], v], dim=2)
            cache.update(k=k, v=v)
        # With a filled cache, x is the newest token alone, which may attend to everything.
        causal = T > 1 and T == k.shape[2]
        out = attend(q, k, v, causal)  # (B, n_head, T, head_dim)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_tables(config):
    """Cosines and sines of the rotary angles, each (context, head_dim), float32.

    Both halves of a head repeat the same head_dim / 2 frequencies (the "rotate-half" convention).
    A rotation by an angle maps (a, b) to (a cos - b sin, b cos + a sin). The sines of the first
    half are negated here, so that `rotate` gets both terms from one roll."""
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    position = torch.arange(config.context).float()
    angles = position[:, None] * config.rope_theta ** -exponent  # (context, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def rotate(x, cos, sin):
    """Rotate each pair (x[i], x[i + head_dim/2]) of x (B, T, heads, head_dim) by the angle of its
    position, in the precision of the tables."""
    x = x.to(cos.dtype)
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


# ---- cost --------------------------------------------------------------------------------------

def backbone_flops(config, rows, length):
    """Model FLOPs of one forward pass over rows x length tokens. Each token costs 2 per weight of
    the layers' matrices, plus 4 x length x (width of all queries) for each layer's attention. The
    causal mask is ignored."""
    d = config.d_model
    queries, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    weights = config.n_layer * (2 * d * queries + 2 * d * kv + 3 * d * config.d_ff)
    return rows * length * (2 * weights + 4 * config.n_layer * length * queries)


def lm_flops(config, rows, length):
    """Model FLOPs of a next-token training step: a forward pass, including the output layer, and a
    backward pass at twice the cost."""
    output_layer = 2 * rows * length * config.d_model * config.vocab_size
    return 3 * (backbone_flops(config, rows, length) + output_layer)


# ---- sampling ----------------------------------------------------------------------------------

@torch.no_grad()
def generate(decoder, ids, n_tokens, temperature=0.8, top_k=50, n_ids=None, generator=None,
             stop=None):
    """Continue ids (a list of int) by up to n_tokens, and yield each new id.

    temperature 0 takes the most likely token; top_k 0 samples from all tokens. Ids from n_ids up
    (padding) are never sampled, and the id `stop` ends the text. Keys and values are cached, so
    each new token costs one position. When the context is full, the older half is dropped. Raises
    UserError if the logits are not finite."""
    from plumbing.commands import UserError
    device, context = decoder.lm_head.weight.device, decoder.config.context
    ids, caches = list(ids), None
    for _ in range(n_tokens):
        if caches is None or caches[0]["k"].shape[2] >= context:
            caches = [{} for _ in decoder.model.layers]
            unread = ids if len(ids) <= context else ids[-(context // 2):]
        else:
            unread = ids[-1:]
        logits = decoder(torch.tensor([unread], device=device), caches)  # (1, T, V)
        logits = logits[0, -1, :n_ids].float().cpu()  # (n_ids,)
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite, because its weights are too large: "
                            "use another run")
        new = pick(logits, temperature, top_k, generator)
        if new == stop:
            return
        ids.append(new)
        yield new


def pick(logits, temperature, top_k, generator):
    """Sample an id from logits (V,)."""
    if temperature < 1e-6:  # dividing by it might overflow
        return logits.argmax().item()
    if top_k:
        smallest_kept = logits.topk(min(top_k, len(logits))).values[-1]
        logits[logits < smallest_kept] = -float("inf")
    probs = (logits / temperature).softmax(dim=0)
    return torch.multinomial(probs, 1, generator=generator).item()


def print_sample(decoder, encoding, args, device):
    """Print the prompt and the model's continuation, token by token."""
    from plumbing.commands import UserError
    from plumbing.machine import precision
    from plumbing.tokenizer import MASK
    end = encoding.eot_token  # None if an imported model has no such token
    ids = encoding.encode_ordinary(args.prompt) or [end]
    if ids == [None]:
        raise UserError("this model has no token that starts a text: give a --prompt")
    # Never sample the mask, which is the last token, or the padding after it.
    n_ids = encoding.n_vocab - (MASK in encoding.special_tokens_set)
    generator = torch.Generator().manual_seed(args.seed)
    # A character may be split across several tokens.
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    print(args.prompt, end="", flush=True)
    with precision(device):
        for token in generate(decoder, ids, args.tokens, args.temperature, args.top_k,
                              n_ids=n_ids, generator=generator, stop=end):
            print(decode(encoding.decode_single_token_bytes(token)), end="", flush=True)
    print(decode(b"", final=True))


# ---- runs and the command ----------------------------------------------------------------------

def load_run(folder, device="cpu"):
    """(decoder, settings) of a trained or imported run; settings is its config.json as a dict.
    Raises UserError, a ValueError, if the folder holds no usable run."""
    decoder, settings, _ = load_checkpointed(folder, device)
    return decoder, settings


def load_checkpointed(folder, device="cpu"):
    """Like load_run, but also returns the checkpoint, a dict."""
    from plumbing.checkpoints import load_checkpoint
    from plumbing.commands import UserError
    from plumbing.huggingface import config_fields
    from plumbing.logs import read_settings
    settings = read_settings(folder)
    if "model_type" in settings:  # an imported run
        config = Config(**config_fields(settings, Path(folder) / "config.json"))
    elif settings["size"] in SIZES:
        config = Config(SIZES[settings["size"]], settings["vocab_size"])
    else:
        raise UserError(f"{folder} has the unknown size {settings['size'][:40]}: use a run of "
                        "size " + ", ".join(SIZES))
    checkpoint = load_checkpoint(folder)
    weights = checkpoint.get("model")
    # Compare shapes first, so that a damaged config.json cannot use up all memory.
    if not isinstance(weights, dict) or shapes(config) != shapes_of(weights):
        raise UserError(f"the checkpoint in {folder} does not fit its config.json: both must come "
                        "from the same run")
    decoder = Decoder(config)
    decoder.load_state_dict(weights)
    return decoder.to(device), settings, checkpoint


def shapes(config):
    """{name: shape} of a decoder's parameters, without allocating their values."""
    with torch.device("meta"):
        return shapes_of(Decoder(config).state_dict())


def shapes_of(state):
    return {name: getattr(value, "shape", None) for name, value in state.items()}


def table_of_sizes():
    lines = [" size  d_model  head_dim  layers   parameters  of these in the layers"]
    for name, d_model in SIZES.items():
        with torch.device("meta"):  # shapes without values
            decoder = Decoder(Config(d_model))
        total = sum(p.numel() for p in decoder.parameters())
        in_layers = sum(p.numel() for p in decoder.model.layers.parameters())
        config = decoder.config
        lines.append(f"{name:>5} {d_model:>8} {config.head_dim:>9} {config.n_layer:>7} "
                     f"{total:>12,}  {in_layers / total:.0%}")
    return "\n".join(lines)


def parse():
    from plumbing.commands import Parser, filled, number, path
    parser = Parser(description="Print the table of sizes, sample from a run, export it, or "
                                "import a model.")
    add = parser.add_argument
    add("run", nargs="?", type=filled,
        help="folder of a trained run, such as runs/11m-meta (default: print the sizes)")
    add("--import", type=path, metavar="FOLDER", dest="model_folder",
        help="turn a downloaded model folder into a run; it needs config.json, model.safetensors "
             "and tokenizer.json of a Llama or of the paper's pico_decoder")
    add("--out", type=path, metavar="RUN", help="new folder for the imported run")
    add("--export", type=path, metavar="FOLDER",
        help="write the model to this new folder, for Hugging Face's transformers")
    add("--prompt", default="Returns the", help="text to continue")
    add("--tokens", type=number(int, 0), default=200,
        help="maximum number of tokens to add; the end of a document stops earlier")
    add("--temperature", type=number(float, 0), default=0.8,
        help="higher values give more varied text; 0 always takes the most likely token")
    add("--top-k", type=number(int, 0), default=50,
        help="sample from the k most likely tokens; 0: from all")
    add("--seed", type=number(int, 0), default=0, help="seed of the sample")
    add("--device", type=filled, help="cuda, mps or cpu (default: the best available)")
    return parser.parse_args(), parser


def sample_or_export():
    from plumbing.huggingface import export, import_folder
    from plumbing.machine import pick_device
    from plumbing.tokenizer import load_encoding
    args, parser = parse()
    if (args.model_folder is None) != (args.out is None) or (args.out and args.run):
        parser.error("--import FOLDER and --out RUN only work together, and without another RUN")
    if args.run is None and args.out is None:
        print(table_of_sizes())
        return
    if args.export and args.export.exists():
        parser.error(f"{args.export} already exists: choose another folder")
    if args.out:
        if args.out.exists():
            parser.error(f"{args.out} already exists: choose another --out")
        import_folder(args.model_folder, args.out, lambda fields: shapes(Config(**fields)))
        print(f"{args.out}: imported; next: python ner.py {args.out}")
        return
    device = pick_device(args.device)
    decoder, _ = load_run(args.run, device)
    encoding = load_encoding(args.run)
    if args.export:
        export(decoder, encoding, args.export)
        print(f"written: {args.export}; next: "
              f'transformers.AutoModelForCausalLM.from_pretrained("{args.export}")')
    else:
        print_sample(decoder, encoding, args, device)


def main():
    from plumbing.commands import command
    command(sample_or_export)()


if __name__ == "__main__":
    main()
