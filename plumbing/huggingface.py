"""Model folders in Hugging Face's format: written for transformers, and read without it.

A folder may come from anyone, so it is not trusted. Only JSON and safetensors are read from it. No
code in it is run, and nothing is unpickled.
"""
import json
import math
import sys

from tqdm import tqdm

from plumbing import byte_level
from plumbing.byte_level import END, MASK, PATTERN, ByteLevelEncoding, byte_letters
from plumbing.checkpoints import save_checkpoint
from plumbing.commands import UserError
from plumbing.files import new_folder, read_file, read_json, write_atomically
from plumbing.safetensors import find_tensors, read_tensor, write_safetensors

# Fields of model.Config -> their names in config.json, for each type of model.
NAMES = {
    "llama": {
        "d_model": "hidden_size", "d_ff": "intermediate_size", "vocab_size": "vocab_size",
        "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
        "context": "max_position_embeddings", "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings"},
    # The paper's own models.
    "pico_decoder": {
        "d_model": "d_model", "d_ff": "activation_hidden_dim", "vocab_size": "vocab_size",
        "n_layer": "n_layers", "n_head": "attention_n_heads",
        "n_kv_head": "attention_n_kv_heads", "context": "max_seq_len",
        "rope_theta": "position_emb_theta", "norm_eps": "norm_eps"}}
REQUIRED = ("d_model", "d_ff", "vocab_size", "n_layer", "n_head")
# Parts of a parameter's name here -> in a pico_decoder.
PICO_PARAMETERS = {
    "model.embed_tokens": "pico_decoder.embedding_proj", "model.layers": "pico_decoder.layers",
    "model.norm": "pico_decoder.output_norm", "lm_head": "pico_decoder.de_embedding_proj",
    "self_attn": "attention", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "swiglu_norm", "mlp.gate_proj": "swiglu.w_0",
    "mlp.up_proj": "swiglu.w_1", "mlp.down_proj": "swiglu.w_2"}
LARGEST_CONFIG = 1_000_000
MOST_LAYERS, LARGEST_NUMBER = 1000, 2 ** 31
# A decoder stores tables for its whole context, so a longer one is cut to this length.
LONGEST_CONTEXT = 2 ** 17


# ---- reading -----------------------------------------------------------------------------------

def import_folder(folder, out, shapes):
    """Make the new run `out` from a model folder. shapes is a function of the fields of
    model.Config, a dict, and returns {name: shape} of the decoder's parameters. Raises
    UserError."""
    source = read_json(folder / "config.json", LARGEST_CONFIG)
    fields = config_fields(source, folder / "config.json")
    encoding = byte_level.read_tokenizer(folder)
    if encoding.n_vocab > fields["vocab_size"]:
        raise UserError(f"{folder}: the tokenizer has ids up to {encoding.n_vocab - 1}, but the "
                        f"model's end at {fields['vocab_size'] - 1}: use the model's own tokenizer")
    weights = read_weights(folder, source["model_type"], fields, shapes(fields))
    parameters = sum(weight.numel() for name, weight in weights.items()
                     if name != "lm_head.weight" or not fields["tied"])
    kind = source["model_type"].partition("_")[0]  # llama or pico
    settings = {"name": out.resolve().name, "size": f"{kind}-{parameters / 1e6:.0f}m",
                "parameters": parameters, "imported_from": folder.resolve().name}
    print(f"writing {out}", file=sys.stderr)
    with new_folder(out) as temporary:
        config = model_config(fields, encoding.eot_token) | settings
        write_atomically(temporary / "config.json", json.dumps(config, indent=1))
        write_atomically(temporary / byte_level.FILE, read_file(folder / byte_level.FILE))
        save_checkpoint(temporary, {"step": 0, "model": weights})


def config_fields(config, place):
    """The fields of model.Config, a dict, from config, the content of the config.json at `place`.
    Raises UserError if it needs what the decoder lacks, or has impossible values."""
    names = NAMES.get(str(config.get("model_type")))
    if names is None:
        raise UserError(f"{place}: the model is of type {config.get('model_type')!r:.40}, but only "
                        f"{' and '.join(NAMES)} can be read")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, dict):
        config = config | {"rope_theta": rope.get("rope_theta", config.get("rope_theta"))}
    lacking = unknown_features(config, rope)
    if lacking:
        raise UserError(f"{place} uses {lacking}, which the decoder here does not support")
    fields = {"n_kv_head": config.get(names["n_head"]), "context": 2048, "rope_theta": 10000.0,
              "norm_eps": 1e-6, "tied": False}
    for field, name in names.items():
        if config.get(name) is not None:
            fields[field] = config[name]
    check_fields(fields, names, place)
    fields.setdefault("head_dim", fields["d_model"] // fields["n_head"])
    fields["context"] = min(fields["context"], LONGEST_CONTEXT)
    return fields


def unknown_features(config, rope):
    """The features of a config.json that the decoder lacks, in words; "" if there are none."""
    settings = rope if isinstance(rope, dict) else {"type": rope}
    part = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    activation = config.get("hidden_act", "silu")
    unknown = {
        "scaled rotary positions":
            settings.get("rope_type", settings.get("type", "default")) != "default",
        "rotary positions in a part of each head": part != 1,
        "biases": config.get("attention_bias") or config.get("mlp_bias"),
        f"the activation {activation!r:.20}": activation not in ("silu", "swish"),
        "quantized weights": config.get("quantization_config")}
    return ", ".join(name for name, is_asked_for in unknown.items() if is_asked_for)


def check_fields(fields, names, place):
    """Raise UserError unless the fields of model.Config are present and valid."""
    for field in REQUIRED:
        if field not in fields:
            raise UserError(f"{place} has no {names[field]}")
    for field, value in fields.items():
        if field == "tied":
            fits = isinstance(value, bool)
        elif field in ("rope_theta", "norm_eps"):
            fits = type(value) in (int, float) and 0 < value < math.inf
        else:
            most = MOST_LAYERS if field == "n_layer" else LARGEST_NUMBER
            fits = type(value) is int and 1 <= value <= most
        if not fits:
            raise UserError(f"{place}: {names[field]} is {value!r:.40}, which is not valid")
    head_dim = fields.get("head_dim", fields["d_model"] // fields["n_head"])
    divides = "head_dim" in fields or fields["d_model"] % fields["n_head"] == 0
    if not divides or head_dim % 2 or fields["n_head"] % fields["n_kv_head"]:
        raise UserError(f"{place}: {fields['n_head']} query heads, {fields['n_kv_head']} key heads "
                        f"and a width of {fields['d_model']} do not fit together")


def read_weights(folder, kind, fields, shapes):
    """{name: tensor}, float32, for the parameters in `shapes`, {name: shape}. All names and shapes
    are checked before anything is read. Raises UserError."""
    stored = find_tensors(folder)
    names = {name: name for name in shapes if name != "lm_head.weight" or not fields["tied"]}
    if kind == "pico_decoder":
        names = {name: pico_name(name) for name in names}
    # Old Llama folders also hold the rotary frequencies, and some a copy of tied weights.
    harmless = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    if fields["tied"]:
        harmless.add("lm_head.weight")
    missing = set(names.values()) - set(stored)
    unknown = set(stored) - set(names.values()) - harmless
    for what, found in (("lacks", missing), ("has the unknown", unknown)):
        if found:
            raise UserError(f"{folder} {what} tensor {min(found)!r:.80}"
                            + f" and {len(found) - 1} more" * (len(found) > 1))
    for name, theirs in names.items():
        if stored[theirs].shape != tuple(shapes[name]):
            raise UserError(f"{folder}: tensor {theirs!r:.80} has the shape "
                            f"{stored[theirs].shape}, but config.json says {tuple(shapes[name])}")
    weights = {}
    for name, theirs in tqdm(names.items(), desc="reading", unit="tensor", disable=None):
        weights[name] = read_tensor(stored[theirs])
        if kind == "pico_decoder" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = rotate_half_rows(weights[name], fields["head_dim"])
    if fields["tied"]:
        # A copy, since two tensors of a checkpoint must not share memory.
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    return weights


def pico_name(name):
    for ours, theirs in PICO_PARAMETERS.items():
        name = name.replace(ours, theirs)
    return name


def rotate_half_rows(weight, head_dim):
    """Reorder the rows of a query or key projection (heads * head_dim, D). In each head, a
    pico_decoder rotates the pairs (x[2i], x[2i + 1]), and ours (x[i], x[i + head_dim / 2])."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # (heads, pairs, 2, D)
    return pairs.transpose(1, 2).reshape(weight.shape)


# ---- writing -----------------------------------------------------------------------------------

def export(decoder, encoding, folder):
    """Write a new folder for LlamaForCausalLM and PreTrainedTokenizerFast. Raises OSError, and
    UserError if the folder exists."""
    state = decoder.state_dict()
    if decoder.config.tied:
        del state["lm_head.weight"]
    is_imported = isinstance(encoding, ByteLevelEncoding)
    tokenizer = encoding.file if is_imported else tokenizer_json(encoding)
    texts = {"config.json": model_config(vars(decoder.config), encoding.eot_token),
             "tokenizer.json": tokenizer,
             "tokenizer_config.json": tokenizer_config(decoder.config, encoding)}
    with new_folder(folder) as temporary:
        write_safetensors(temporary / "model.safetensors", state)
        for name, content in texts.items():
            write_atomically(temporary / name, json.dumps(content, ensure_ascii=False, indent=1))


def model_config(fields, end):
    """The config.json of LlamaForCausalLM, a dict, from the fields of model.Config. end is the id
    of the end-of-text token, or None."""
    named = {name: fields[field] for field, name in NAMES["llama"].items() if field in fields}
    return named | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        # transformers 5 and later read this instead of "rope_theta"
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["rope_theta"]},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": end,
        "eos_token_id": end,
    }


def tokenizer_config(config, encoding):
    special = {}
    if encoding.eot_token is not None:
        end = encoding.decode([encoding.eot_token])
        special |= {"bos_token": end, "eos_token": end}
    if MASK in encoding.special_tokens_set:
        special["mask_token"] = MASK
    return special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
    }


def tokenizer_json(encoding):
    """tokenizer.json, as a dict. With Hugging Face's rules it gives the same tokens as tiktoken.

    tiktoken merges the neighbours whose concatenation has the lowest rank. Hugging Face merges
    the pair that comes first in a list. So every pair that forms a token is listed, in the order
    of that token's rank."""
    ranks, letters = encoding._mergeable_ranks, byte_letters()
    name = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append([name[left], name[right]])
    special = [{"id": encoding.encode_single_token(token), "content": token, "special": True,
                "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
               for token in (END, MASK)]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": False}
    bytes_as_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                        "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_as_letters]},
        "post_processor": None,
        "decoder": bytes_as_letters,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # as in tiktoken, a pre-token that is a token is not split
            "ignore_merges": True,
            "vocab": {name[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }
