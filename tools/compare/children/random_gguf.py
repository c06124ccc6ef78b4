"""Writes a GGUF file of a random LLaDA checkpoint, for llama.cpp and this engine to read alike.

  python tools/compare/children/random_gguf.py --checkpoint DIR --architecture llada \\
      --type q8_0 --out FILE

DIR is what `tools/random_checkpoint.py --family llada` writes. The same tensors go into either
architecture: `llada`, which llama.cpp runs under full attention without a cache, and `llama`, which
has a K/V cache. Needs gguf and numpy. The types are those of llama.cpp's tools: matrices in the
type, norms in f32; with q4_0 the table and the head are q8_0, as published files keep them finer
too.
"""

import argparse
import json
import os
import pathlib
import struct

import gguf
import numpy as np

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
LAYER = {
    "attn_norm": "attn_norm",
    "ff_norm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "attn_out": "attn_output",
    "ff_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "ff_out": "ffn_down",
}
WHOLE = {"wte": "token_embd", "ln_f": "output_norm", "ff_out": "output"}


def read_tensors(file):
    """(name, values as f32) of a safetensors file in f32."""
    with open(file, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        start = f.tell()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "F32":
                raise SystemExit(f"{file}: {name} is {entry['dtype']}, expected a checkpoint in f32")
            f.seek(start + entry["data_offsets"][0])
            count = (entry["data_offsets"][1] - entry["data_offsets"][0]) // 4
            yield name, np.fromfile(f, "<f4", count).reshape(entry["shape"])


def gguf_name(name):
    parts = name.split(".")
    if "blocks" in parts:
        at = parts.index("blocks")
        return f"blk.{parts[at + 1]}.{LAYER[parts[at + 2]]}.weight"
    return f"{WHOLE[parts[-2]]}.weight"


def in_pairs(rows, heads):
    """llama.cpp rotates neighbouring rows of a head where the checkpoint rotates its halves."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def vocabulary(directory, config):
    """(tokens, their types, merges). One merge is needed for llama.cpp to take the vocabulary."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokens = [f"[PAD{i}]" for i in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for text, token in tokenizer["model"]["vocab"].items():
        tokens[token], types[token] = text, gguf.TokenType.NORMAL
    tokens[tokens.index("Ġba")] = "ab"  # a made-up word gives its place to what the merge makes
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    tokens[config["mask_token_id"]], types[config["mask_token_id"]] = "<|mask|>", gguf.TokenType.CONTROL
    return tokens, types, ["a b"]


def write(directory, architecture, kind, out):
    config = json.loads((directory / "config.json").read_text())
    if config.get("model_type") != "llada":
        raise SystemExit(f"{directory}: expected a checkpoint of the family llada")
    writer = gguf.GGUFWriter(out, architecture)
    heads, matrix = config["n_heads"], TYPES[kind][0]
    writer.add_block_count(config["n_layers"])
    writer.add_context_length(config["max_sequence_length"])
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(config["mlp_hidden_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["n_kv_heads"])
    writer.add_rope_dimension_count(config["d_model"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(TYPES[kind][1])
    if architecture == "llada":
        writer.add_causal_attention(False)
        writer.add_bool("diffusion.shift_logits", False)
    tokens, types, merges = vocabulary(directory, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_mask_token_id(config["mask_token_id"])
    writer.add_add_bos_token(False)
    # llama-diffusion-cli renders a template around every prompt: this one leaves it as it is.
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, values in read_tensors(directory / "model.safetensors"):
        name = gguf_name(name)
        if ".attn_q." in name or ".attn_k." in name:
            values = in_pairs(values, heads if ".attn_q." in name else config["n_kv_heads"])
        finer = kind == "q4_0" and name in ("token_embd.weight", "output.weight")
        of = gguf.GGMLQuantizationType.Q8_0 if finer else matrix
        if values.ndim == 1 or of == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--architecture", choices=("llada", "llama"), required=True)
    parser.add_argument("--type", choices=TYPES, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    o = parser.parse_args()
    # Under its own name only when it is whole: the file is kept for later runs.
    part = o.out.with_suffix(".part")
    write(o.checkpoint, o.architecture, o.type, part)
    os.replace(part, o.out)


if __name__ == "__main__":
    main()
