"""Writes a checkpoint directory of any supported family and size with random weights: for benches and memory tests.

  python tools/random_checkpoint.py --like bd3lm-owt --dtype bf16 --out DIR
  python tools/random_checkpoint.py --hidden 256 --layers 4 --heads 4 --vocab 1000 --length 256 --block-size 4 --out DIR
  python tools/random_checkpoint.py --family qwen3 --hidden 256 --heads 8 --kv-heads 2 --head-dim 64 --mlp 512 --tied --out DIR

The directory has the published form (config.json, model.safetensors, tokenizer.json). Needs numpy alone; tensors are drawn
and written in pieces, so memory stays at some tens of MB whatever the size. The same seed and shape give the same bytes.
Text from such a model is noise: its speed means something, its words do not.
"""

import argparse
import json
import pathlib
import shutil
import struct
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "fixtures"))
import published  # noqa: E402

# [BD3-LM], [MDLM]: the OpenWebText models share one shape of 169,627,218 parameters.
OWT = dict(hidden=768, layers=12, heads=12, vocab=50258, length=1024, cond_dim=128, adaln=True)
LIKE = {
    "bd3lm-owt": dict(OWT, family="bd3lm", block_size=4),
    "mdlm-owt": dict(OWT, family="mdlm", block_size=4),
    # The autoregressive families: a judge of a few million parameters, and the smallest published Qwen2 (494M).
    "qwen2-judge": dict(
        family="qwen2", hidden=256, layers=6, heads=4, kv_heads=4, mlp=688, vocab=4096, length=256, tied=True
    ),
    "qwen2-0.5b": dict(
        family="qwen2", hidden=896, layers=24, heads=14, kv_heads=2, mlp=4864, vocab=151936, length=32768, tied=True
    ),
    "tiny": dict(OWT, family="bd3lm", hidden=128, layers=2, heads=2, vocab=1000, length=128, cond_dim=32, block_size=4),
}
PIECE = 1 << 21  # numbers drawn at a time: 8 MB in f32
BYTES = {"f32": 4, "bf16": 2}
TAG = {"f32": "F32", "bf16": "BF16"}


def plain_tensors(o):
    """As `tensors`, for the Llama layout."""
    c, q, kv = o.hidden, o.heads * o.head_dim, o.kv_heads * o.head_dim
    yield "model.embed_tokens.weight", (o.vocab, c), "embedding"
    for i in range(o.layers):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (c,), "norm"
        for name, width in (("q", q), ("k", kv), ("v", kv)):
            yield f"{layer}self_attn.{name}_proj.weight", (width, c), "weight"
            if o.family == "qwen2":
                yield f"{layer}self_attn.{name}_proj.bias", (width,), "bias"
        if o.family == "qwen3":
            yield layer + "self_attn.q_norm.weight", (o.head_dim,), "norm"
            yield layer + "self_attn.k_norm.weight", (o.head_dim,), "norm"
        yield layer + "self_attn.o_proj.weight", (c, q), "weight"
        yield layer + "post_attention_layernorm.weight", (c,), "norm"
        yield layer + "mlp.gate_proj.weight", (o.mlp, c), "weight"
        yield layer + "mlp.up_proj.weight", (o.mlp, c), "weight"
        yield layer + "mlp.down_proj.weight", (c, o.mlp), "weight"
    yield "model.norm.weight", (c,), "norm"
    if not o.tied:
        yield "lm_head.weight", (o.vocab, c), "head"


def tensors(o):
    """(name, shape, kind) in file order. `kind` chooses the scale; buffers carry their values instead."""
    if o.family in published.PLAIN:
        yield from plain_tensors(o)
        return
    c, v, d, k = o.hidden, o.vocab, o.hidden // o.heads, o.cond_dim
    yield "backbone.vocab_embed.embedding", (v, c), "embedding"
    if o.adaln:
        yield "backbone.sigma_map.mlp.0.weight", (k, 256), "weight"
        yield "backbone.sigma_map.mlp.0.bias", (k,), "bias"
        yield "backbone.sigma_map.mlp.2.weight", (k, k), "weight"
        yield "backbone.sigma_map.mlp.2.bias", (k,), "bias"
    inv_freq = (1.0 / 10000.0 ** (np.arange(0, d, 2, dtype=np.float32) / d)).astype(np.float32)
    yield "backbone.rotary_emb.inv_freq", inv_freq.shape, inv_freq
    for i in range(o.layers):
        block = f"backbone.blocks.{i}."
        yield block + "norm1.weight", (c,), "norm"
        yield block + "attn_qkv.weight", (3 * c, c), "weight"
        yield block + "attn_out.weight", (c, c), "weight"
        yield block + "norm2.weight", (c,), "norm"
        yield block + "mlp.0.weight", (4 * c, c), "weight"
        yield block + "mlp.0.bias", (4 * c,), "bias"
        yield block + "mlp.2.weight", (c, 4 * c), "weight"
        yield block + "mlp.2.bias", (c,), "bias"
        if o.adaln:
            yield block + "adaLN_modulation.weight", (6 * c, k), "modulation"
            yield block + "adaLN_modulation.bias", (6 * c,), "modulation bias"
    yield "backbone.output_layer.norm_final.weight", (c,), "norm"
    yield "backbone.output_layer.linear.weight", (v, c), "head"
    yield "backbone.output_layer.linear.bias", (v,), "bias"
    if o.adaln:
        yield "backbone.output_layer.adaLN_modulation.weight", (2 * c, k), "modulation"
        yield "backbone.output_layer.adaLN_modulation.bias", (2 * c,), "modulation bias"
    if o.family == "bd3lm":
        yield "sampling_eps_min", (), np.float32(1e-3)
        yield "sampling_eps_max", (), np.float32(0.999)


def pieces(shape, kind, rng):
    """The tensor's numbers, f32, PIECE at a time."""
    left = int(np.prod(shape))
    fan_in = shape[-1]
    while left:
        x = rng.standard_normal(min(left, PIECE), dtype=np.float32)
        left -= x.size
        if kind == "norm":
            x = 1.0 + 0.2 * x
        else:
            # Scales that keep hidden rows and logits lively through any depth.
            x *= {
                "embedding": 0.7,
                "weight": 1.3 / fan_in**0.5,
                "head": 2.0 / fan_in**0.5,
                "bias": 0.1,
                "modulation": 0.1,
                "modulation bias": 0.4,
            }[kind]
        yield x


def encode(x, dtype):
    if dtype == "f32":
        return x.astype("<f4").tobytes()
    bits = x.astype("<f4").view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)  # round to nearest, ties to even; the numbers are finite and small
    return (bits >> 16).astype("<u2").tobytes()


def write_weights(path, o):
    """One safetensors file, written front to back. Returns (parameters, buffers) counted in numbers."""
    header, at, parameters, buffers = {"__metadata__": {"format": "pt"}}, 0, 0, 0
    plan = list(tensors(o))
    for name, shape, kind in plan:
        dtype = o.dtype if isinstance(kind, str) else "f32"
        count = int(np.prod(shape))
        end = at + count * BYTES[dtype]
        header[name] = {"dtype": TAG[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
        if isinstance(kind, str):
            parameters += count
        else:
            buffers += count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for i, (name, shape, kind) in enumerate(plan):
            if isinstance(kind, str):
                for x in pieces(shape, kind, np.random.default_rng([o.seed, i])):
                    file.write(encode(x, o.dtype))
            else:
                file.write(encode(np.asarray(kind), "f32"))
    return parameters, buffers


def byte_alphabet():
    """GPT-2's byte-level alphabet: printable bytes stand for themselves, the rest are moved above 255. Printable ASCII
    comes first, so that a small vocabulary keeps what text needs."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {b: chr(b) for b in printable}
    for n, b in enumerate(b for b in range(256) if b not in spelled):
        spelled[b] = chr(256 + n)
    first = [0x20, 0x0A, *range(0x21, 0x7F)]
    return [spelled[b] for b in first + [b for b in range(256) if b not in first]]


def write_tokenizer(path, vocab_size):
    """Byte-level BPE without merges: one id per byte, then made-up words that only decoding meets, then <|endoftext|> at
    V-2. MASK, V-1, is not in the file."""
    room = vocab_size - 2
    words = byte_alphabet()[:room]
    for n in range(room - len(words)):
        n, word = n + 26, ""
        while n:
            n, letter = divmod(n, 26)
            word = "abcdefghijklmnopqrstuvwxyz"[letter] + word
        words.append("Ġ" + word)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {
        "id": vocab_size - 2,
        "content": "<|endoftext|>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: i for i, word in enumerate(words)},
            "merges": [],
        },
    }
    path.write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")


def options():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--like", choices=LIKE, default="tiny", help="shape to start from; other flags change it")
    parse.add_argument("--family", choices=("bd3lm", "mdlm", *published.PLAIN))
    for name in ("hidden", "layers", "heads", "vocab", "length", "block-size", "cond-dim"):
        parse.add_argument(f"--{name}", type=int)
    parse.add_argument("--adaln", action=argparse.BooleanOptionalAction)
    for name in ("kv-heads", "head-dim", "mlp"):
        parse.add_argument(f"--{name}", type=int, help="of the autoregressive families")
    parse.add_argument("--tied", action=argparse.BooleanOptionalAction, help="the head is the embedding table")
    parse.add_argument("--dtype", choices=BYTES, default="f32")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--tokenizer", type=pathlib.Path, help="tokenizer.json to copy instead of making one up")
    parse.add_argument("--out", type=pathlib.Path, required=True)
    o = parse.parse_args()
    for name, value in LIKE[o.like].items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    plain = o.family in published.PLAIN
    if plain:
        # What is not said follows from the heads, with the MLP of Llama's proportion.
        o.kv_heads = o.kv_heads or o.heads
        o.head_dim = o.head_dim or o.hidden // o.heads
        o.mlp = o.mlp or 8 * o.hidden // 3
        if o.heads % o.kv_heads or o.head_dim % 2:
            parse.error("--kv-heads must divide --heads, and --head-dim be even")
        if o.family == "qwen2" and o.head_dim * o.heads != o.hidden:
            parse.error("--head-dim: Qwen2's follows from --hidden and --heads")
    family_sizes = ("kv_heads", "head_dim", "mlp") if plain else ("block_size", "cond_dim")
    for name in ("hidden", "layers", "heads", "length", *family_sizes):
        if getattr(o, name) < 1:
            parse.error(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(o, name)}")
    if o.vocab < 3:
        parse.error(f"--vocab: expected at least 3 (text, end of text, MASK), found {o.vocab}")
    if not plain and (o.hidden % o.heads or (o.hidden // o.heads) % 2):
        parse.error(f"--hidden {o.hidden}, --heads {o.heads}: the head dimension must be a whole even number")
    if o.family == "mdlm" and not o.adaln:
        parse.error("--no-adaln: MDLM always has adaLN")
    return o


def configuration(o):
    if o.family in published.PLAIN:
        shape = {
            "eos_token_id": o.vocab - 2,
            "head_dim": o.head_dim,
            "hidden_size": o.hidden,
            "intermediate_size": o.mlp,
            "max_position_embeddings": o.length,
            "num_attention_heads": o.heads,
            "num_hidden_layers": o.layers,
            "num_key_value_heads": o.kv_heads,
            "tie_word_embeddings": bool(o.tied),
            "vocab_size": o.vocab,
        }
        return published.plain_config(o.family, shape)
    shape = {
        "block_size": o.block_size,
        "cond_dim": o.cond_dim,
        "hidden_dim": o.hidden,
        "model_length": o.length,
        "n_blocks": o.layers,
        "n_heads": o.heads,
        "vocab_size": o.vocab,
    }
    config = published.mdlm_config(shape) if o.family == "mdlm" else published.bd3lm_config(shape)
    if not o.adaln:
        config["adaln"] = False
    return config


def main():
    o = options()
    o.out.mkdir(parents=True, exist_ok=True)
    config = configuration(o)
    if o.dtype == "bf16":
        config["torch_dtype"] = "bfloat16"
    (o.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if o.tokenizer:
        shutil.copyfile(o.tokenizer, o.out / "tokenizer.json")
    else:
        write_tokenizer(o.out / "tokenizer.json", o.vocab)
    parameters, buffers = write_weights(o.out / "model.safetensors", o)
    size = (o.out / "model.safetensors").stat().st_size
    print(f"{o.out}: {parameters:,} parameters, {buffers} numbers in buffers, {size:,} bytes of weights in {o.dtype}")


if __name__ == "__main__":
    main()
