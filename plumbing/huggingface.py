"""A model as a folder that Hugging Face's transformers can load without any code of ours."""
import json
import struct

from plumbing.files import new_folder, replacing, write_atomically
from plumbing.tokenizer import END, MASK, PATTERN


def export(decoder, encoding, folder):
    """Write a new folder for LlamaForCausalLM and PreTrainedTokenizerFast. Raises OSError, and
    UserError if the folder is there."""
    texts = {"config.json": model_config(decoder.config, encoding.encode_single_token(END)),
             "tokenizer.json": tokenizer_json(encoding),
             "tokenizer_config.json": tokenizer_config(decoder.config)}
    with new_folder(folder) as temporary:
        write_safetensors(temporary / "model.safetensors", decoder.state_dict())
        for name, content in texts.items():
            write_atomically(temporary / name, json.dumps(content, ensure_ascii=False, indent=1))


def model_config(config, end):
    """config.json for LlamaForCausalLM, a dict; end is the id of <|endoftext|>."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        # once for transformers before version 5, once for later ones
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": end,
        "eos_token_id": end,
    }


def tokenizer_config(config):
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
        "bos_token": END,
        "eos_token": END,
        "mask_token": MASK,
    }


def byte_letters():
    """256 strings: the printable letter that GPT-2's tokenizer files write for each byte (Radford
    et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, others = [], 0
    for byte in range(256):
        if byte in printable:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + others))
            others += 1
    return letters


def tokenizer_json(encoding):
    """tokenizer.json, as a dict: the same tokens by Hugging Face's rules as by tiktoken's.

    tiktoken merges the neighbours whose concatenation has the lowest rank. Hugging Face merges
    the pair that stands first in a list. So every pair that makes a token is listed, in the order
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
            # as in tiktoken, a pre-token that is a token stays whole
            "ignore_merges": True,
            "vocab": {name[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def write_safetensors(path, state):
    """A state dict in the safetensors format: the header's length, a JSON header, and the raw
    little-endian bytes."""
    header = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in state.items():
        end = start + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes begin at a multiple of 8
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in state.values():
            values = tensor.detach().float().cpu().contiguous().numpy()
            file.write(values.astype("<f4", copy=False))
