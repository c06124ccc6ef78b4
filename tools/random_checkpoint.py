"""Writes a checkpoint directory of any supported family and size with random weights: for benches and memory tests.

  python tools/random_checkpoint.py --like llada-8b --dtype bf16 --out DIR
  python tools/random_checkpoint.py --hidden 256 --layers 4 --heads 4 --vocab 1000 --length 256 --block-size 4 --out DIR
  python tools/random_checkpoint.py --family qwen3 --hidden 256 --heads 8 --kv-heads 2 --head-dim 64 --mlp 512 --tied --out DIR
  python tools/random_checkpoint.py --like llada2-mini --layers 4 --dtype bf16 --out DIR    # as many layers as memory holds
  python tools/random_checkpoint.py --check target/release/redraft    # every family in small, through the binary

The directory has the published form: config.json, tokenizer.json, and model.safetensors or shards of at most `--shard-bytes` with
their index. Needs numpy alone; tensors are made and written in pieces, so memory stays at some tens of MB whatever the size.
Numbers are a stretch of one normally distributed pool from a drawn place on, scaled by a drawn factor: 16 GB take about a minute
and none of them is zero. The same seed and shape give the same bytes. Text from such a model is noise: its speed means
something, its words do not.
"""

import argparse
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "fixtures"))
import published  # noqa: E402

# [BD3-LM], [MDLM]: the OpenWebText models share one shape of 169,627,218 parameters.
OWT = dict(hidden=768, layers=12, heads=12, vocab=50258, length=1024, cond_dim=128, adaln=True)


def plain(family, hidden, layers, heads, kv_heads, mlp, vocab, length, tied=False, **more):
    """A shape of the Llama layout. `ids`: MASK, end of text, BOS, padding where they are not the last ids of the vocabulary."""
    shape = dict(hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, mlp=mlp, vocab=vocab, length=length)
    return dict(shape, family=family, tied=tied, **more)


def experts(family, hidden, layers, heads, kv_heads, vocab, length, number, top_k, width, **more):
    """A shape of the Llama layout with `number` experts of `width`, `top_k` of them for each row; `dense` layers with an MLP come first."""
    more = dict(dict(mlp=width, dense=0, shared=0), **more)
    return plain(family, hidden, layers, heads, kv_heads, vocab=vocab, length=length, experts=number, top_k=top_k, expert_mlp=width, **more)


SDAR_IDS = dict(mask=151669, end=151643, bos=151643, pad=151643)
FAST_IDS = dict(mask=151665, end=151645, bos=151643, pad=151645)
LIKE = {
    "bd3lm-owt": dict(OWT, family="bd3lm", block_size=4),
    "mdlm-owt": dict(OWT, family="mdlm", block_size=4),
    "tiny": dict(OWT, family="bd3lm", hidden=128, layers=2, heads=2, vocab=1000, length=128, cond_dim=32, block_size=4),
    # Masked and block diffusion models as their config.json have them.
    "llada-8b": plain(
        "llada", 4096, 32, 32, 32, 12288, 126464, 4096, ids=dict(mask=126336, end=126081, bos=126080, pad=126081)
    ),
    "dream-7b": plain(
        "dream", 3584, 28, 28, 4, 18944, 152064, 131072, ids=dict(mask=151666, end=151643, bos=151643, pad=151643)
    ),
    "sdar-1.7b": plain("sdar", 2048, 28, 16, 8, 6144, 151936, 32768, head_dim=128, ids=SDAR_IDS),
    "sdar-4b": plain("sdar", 2560, 36, 32, 8, 9728, 151936, 32768, head_dim=128, ids=SDAR_IDS),
    "sdar-8b": plain("sdar", 4096, 36, 32, 8, 12288, 151936, 32768, head_dim=128, ids=SDAR_IDS),
    "fast-dllm-v2-1.5b": plain("fast-dllm", 1536, 28, 12, 2, 8960, 151936, 32768, tied=True, ids=FAST_IDS),
    "fast-dllm-v2-7b": plain("fast-dllm", 3584, 28, 28, 4, 18944, 152064, 32768, ids=FAST_IDS),
    "stable-diffcoder-8b": plain(
        "stable-diffcoder", 4096, 32, 32, 8, 14336, 155136, 32768, ids=dict(mask=5, end=2, bos=0, pad=1)
    ),
    # Those with experts, and a dense model of LLaDA2-mini's active size: eight experts and the shared one make an MLP of 4608.
    "llada2-mini": experts(
        "llada2", 2048, 20, 16, 4, 157184, 32768, 256, 8, 512,
        mlp=5120, dense=1, shared=1, groups=8, top_groups=4, head_dim=128, ids=dict(mask=156895, end=156892, bos=156891, pad=156892),
    ),
    "llada2-mini-active": plain("sdar", 2048, 20, 16, 4, 4608, 157184, 32768, head_dim=128),
    "llada-moe-7b": experts("llada-moe", 2048, 16, 16, 16, 157184, 8192, 64, 8, 1024, ids=dict(mask=156895, end=156892, bos=156891, pad=156892)),
    "sdar-30b": experts("sdar-moe", 2048, 48, 32, 4, 151936, 32768, 128, 8, 768, head_dim=128, ids=SDAR_IDS),
    "rnd1-30b": experts("rnd1", 2048, 48, 32, 4, 151936, 40960, 128, 8, 768, head_dim=128, ids=dict(mask=151669, end=151645, pad=151643)),
    # Autoregressive models: a judge of a few million parameters, and small published ones of each layout.
    "qwen2-judge": plain("qwen2", 256, 6, 4, 4, 688, 4096, 256, tied=True),
    "gpt2": plain("gpt2", 768, 12, 12, 12, 3072, 50257, 1024, tied=True),
    "gpt2-large": plain("gpt2", 1280, 36, 20, 20, 5120, 50257, 1024, tied=True),
    "qwen2-0.5b": plain("qwen2", 896, 24, 14, 2, 4864, 151936, 32768, tied=True),
    "qwen3-0.6b": plain("qwen3", 1024, 28, 16, 8, 3072, 151936, 32768, tied=True, head_dim=128),
    "llama-1b": plain("llama", 2048, 16, 32, 8, 8192, 128256, 131072, tied=True),
    "mistral-7b": plain("mistral", 4096, 32, 32, 8, 14336, 32768, 32768),
}
PIECE = 1 << 21  # numbers written at a time: 8 MB in f32
BYTES = {"f32": 4, "bf16": 2, "f16": 2}
TAG = {"f32": "F32", "bf16": "BF16", "f16": "F16"}
TORCH = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
# Families of the Llama layout, and what they have beside it.
LAYOUT = (*published.PLAIN, *published.ADAPTED, *published.EXPERTS, "gpt2")
QKV_BIAS = ("qwen2", "dream", "fast-dllm")
QK_NORM = ("qwen3", "sdar", *published.EXPERTS)
# Experts where only a family is named.
SMALL_EXPERTS = dict(experts=8, top_k=2, dense=0, shared=0, groups=4, top_groups=2)


def gpt2_tensors(o):
    """As `tensors`, for GPT-2, which stores products as (in, out)."""
    c = o.hidden
    yield "wte.weight", (o.vocab, c), "embedding"
    yield "wpe.weight", (o.length, c), "embedding"
    for i in range(o.layers):
        for name, shape, kind in (
            ("ln_1", (c,), "norm"),
            ("attn.c_attn", (c, 3 * c), "weight"),
            ("attn.c_proj", (c, c), "weight"),
            ("ln_2", (c,), "norm"),
            ("mlp.c_fc", (c, o.mlp), "weight"),
            ("mlp.c_proj", (o.mlp, c), "weight"),
        ):
            yield f"h.{i}.{name}.weight", shape, kind
            yield f"h.{i}.{name}.bias", shape[-1:], "bias"
    yield "ln_f.weight", (c,), "norm"
    yield "ln_f.bias", (c,), "bias"
    if not o.tied:
        yield "lm_head.weight", (o.vocab, c), "head"


def plain_tensors(o):
    """As `tensors`, for the Llama layout."""
    c, q, kv = o.hidden, o.heads * o.head_dim, o.kv_heads * o.head_dim
    n = published.names(o.family)
    yield n["table"], (o.vocab, c), "embedding"
    for i in range(o.layers):
        layer = f"{n['layers']}.{i}."
        yield layer + n["attn_norm"], (c,), "norm"
        for name, width in (("qkv", q + 2 * kv),) if "qkv" in n else (("q", q), ("k", kv), ("v", kv)):
            yield f"{layer}{n[name]}.weight", (width, c), "weight"
            if o.family in QKV_BIAS:
                yield f"{layer}{n[name]}.bias", (width,), "bias"
        if o.family in QK_NORM:
            yield layer + n.get("q_norm", "self_attn.q_norm.weight"), (o.head_dim,), "norm"
            yield layer + n.get("k_norm", "self_attn.k_norm.weight"), (o.head_dim,), "norm"
        yield f"{layer}{n['attn_out']}.weight", (c, q), "weight"
        yield layer + n["mlp_norm"], (c,), "norm"
        if o.family not in published.EXPERTS or i < o.dense:
            mlps = [(layer, o.mlp, n["gate"], n["up"], n["down"])]
        else:
            yield layer + "mlp.gate.weight", (o.experts, c), "weight"
            if o.family == "llada2":
                yield layer + "mlp.gate.expert_bias", (o.experts,), "bias"
            leaves = ("gate_proj", "up_proj", "down_proj")
            mlps = [(f"{layer}mlp.experts.{expert}.", o.expert_mlp, *leaves) for expert in range(o.experts)]
            if o.shared:
                mlps.append((layer + "mlp.shared_experts.", o.shared * o.expert_mlp, *leaves))
        for stem, width, gate, up, down in mlps:
            yield f"{stem}{gate}.weight", (width, c), "weight"
            yield f"{stem}{up}.weight", (width, c), "weight"
            yield f"{stem}{down}.weight", (c, width), "weight"
    yield n["final_norm"], (c,), "norm"
    if not o.tied:
        yield n["head"], (o.vocab, c), "head"


def tensors(o):
    """(name, shape, kind) in file order. `kind` chooses the scale; buffers carry their values instead."""
    if o.family in LAYOUT:
        yield from gpt2_tensors(o) if o.family == "gpt2" else plain_tensors(o)
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


def pool(seed):
    """Normally distributed numbers, twice over, none closer to zero than f16 resolves at the scales below."""
    x = np.random.default_rng(seed).standard_normal(PIECE, dtype=np.float32)
    x = np.where(np.abs(x) < 1e-3, np.copysign(np.float32(1e-3), x), x)
    return np.concatenate((x, x))


def pieces(shape, kind, rng, pool, room):
    """The tensor's numbers, f32, PIECE at a time, in `room`."""
    left = int(np.prod(shape))
    fan_in = shape[-1]
    # Scales that keep hidden rows and logits lively through any depth.
    scale = {
        "norm": 0.2,
        "embedding": 0.7,
        "weight": 1.3 / fan_in**0.5,
        "head": 2.0 / fan_in**0.5,
        "bias": 0.1,
        "modulation": 0.1,
        "modulation bias": 0.4,
    }[kind]
    while left:
        count = min(left, PIECE)
        left -= count
        start, factor = rng.integers(PIECE), np.exp(rng.uniform(-0.3, 0.3)) * rng.choice((-1.0, 1.0))
        x = np.multiply(pool[start : start + count], np.float32(scale * factor), out=room[:count])
        if kind == "norm":
            x += 1.0
        yield x


def encode(x, dtype):
    """Bytes of f32 numbers in a type; overwrites them."""
    if dtype == "f32":
        return x.astype("<f4", copy=False).data.cast("B")
    if dtype == "f16":
        return x.astype("<f2").data.cast("B")
    bits = x.astype("<f4", copy=False).view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)  # round to nearest, ties to even; the numbers are finite and small
    return np.ascontiguousarray(bits.view("<u2")[1::2]).data.cast("B")


def shards(o):
    """Tensors dealt out in file order to files of at most `--shard-bytes` of data, each tensor whole: [[(index, name, shape, kind)]]."""
    files, size = [[]], 0
    for i, (name, shape, kind) in enumerate(tensors(o)):
        data = int(np.prod(shape)) * BYTES[o.dtype if isinstance(kind, str) else "f32"]
        if files[-1] and size + data > o.shard_bytes:
            files.append([])
            size = 0
        files[-1].append((i, name, shape, kind))
        size += data
    return files


def write_shard(path, o, part, numbers, room):
    """One safetensors file, written front to back. Returns its bytes of data, parameters and numbers in buffers."""
    header, at, parameters, buffers = {"__metadata__": {"format": "pt"}}, 0, 0, 0
    for _, name, shape, kind in part:
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
        for i, _, shape, kind in part:
            if isinstance(kind, str):
                for x in pieces(shape, kind, np.random.default_rng([o.seed, i]), numbers, room):
                    file.write(encode(x, o.dtype))
            else:
                file.write(np.asarray(kind).astype("<f4").tobytes())
    return at, parameters, buffers


def write_weights(directory, o):
    """One file, or shards and their index. Returns (files, bytes, parameters, buffers)."""
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    files, totals, weight_map = shards(o), np.zeros(3, dtype=np.int64), {}
    numbers, room = pool(o.seed), np.empty(PIECE, dtype=np.float32)
    for k, part in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"model-{k + 1:05}-of-{len(files):05}.safetensors"
        totals += write_shard(directory / name, o, part, numbers, room)
        weight_map |= {tensor: name for _, tensor, _, _ in part}
        print(f"{directory / name}: {totals[0]:,} bytes so far", file=sys.stderr)
    if len(files) > 1:
        index = {"metadata": {"total_size": int(totals[0])}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return (len(files), *(int(n) for n in totals))


def byte_alphabet():
    """GPT-2's byte-level alphabet: printable bytes stand for themselves, the rest are moved above 255. Printable ASCII
    comes first, so that a small vocabulary keeps what text needs."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {b: chr(b) for b in printable}
    for n, b in enumerate(b for b in range(256) if b not in spelled):
        spelled[b] = chr(256 + n)
    first = [0x20, 0x0A, *range(0x21, 0x7F)]
    return [spelled[b] for b in first + [b for b in range(256) if b not in first]]


def special(token, text):
    return {
        "id": token,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def write_tokenizer(path, o):
    """Byte-level BPE without merges: one id per byte, then made-up words that only decoding meets, around the ids that are not text.
    MASK stands in the file where config.json does not name it, and only there."""
    taken = {o.end: "<|endoftext|>"}
    for token, text in ((o.bos, "<|startoftext|>"), (o.pad, "<|padding|>")):
        if token is not None:
            taken.setdefault(token, text)
    added = [special(token, text) for token, text in sorted(taken.items())]
    if o.family in published.SPELLED_MASK:
        added.append(special(o.mask, published.SPELLED_MASK[o.family]))
    vocab, letters, n = {}, iter(byte_alphabet()), 26
    for token in range(o.vocab):
        if token in taken or token == o.mask:
            continue
        word = next(letters, None)
        if word is None:
            k, word = n, ""
            while k:
                k, letter = divmod(k, 26)
                word = "abcdefghijklmnopqrstuvwxyz"[letter] + word
            word = "Ġ" + word
            n += 1
        vocab[word] = token
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
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
            "vocab": vocab,
            "merges": [],
        },
    }
    path.write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")


def options(argv=None):
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--like", choices=LIKE, default="tiny", help="shape to start from; other flags change it")
    parse.add_argument("--family", choices=("bd3lm", "mdlm", *LAYOUT))
    for name in ("hidden", "layers", "heads", "vocab", "length", "block-size", "cond-dim"):
        parse.add_argument(f"--{name}", type=int)
    parse.add_argument("--adaln", action=argparse.BooleanOptionalAction)
    for name in ("experts", "top-k", "expert-mlp", "dense"):
        parse.add_argument(f"--{name}", type=int, help="of the families with experts")
    for name in ("kv-heads", "head-dim", "mlp"):
        parse.add_argument(f"--{name}", type=int, help="of the Llama layout")
    parse.add_argument("--tied", action=argparse.BooleanOptionalAction, help="the head is the embedding table")
    parse.add_argument("--dtype", choices=BYTES, default="f32")
    parse.add_argument("--shard-bytes", type=int, default=5_000_000_000, help="most bytes of data in a file [5 GB]")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--tokenizer", type=pathlib.Path, help="tokenizer.json to copy instead of making one up")
    parse.add_argument("--out", type=pathlib.Path)
    parse.add_argument("--check", metavar="BINARY", help="write every family in small and run it, then delete it")
    o = parse.parse_args(argv)
    if o.check:
        return o
    if o.out is None:
        parse.error("--out is missing")
    like = LIKE[o.like]
    # Ids belong to the vocabulary that they were published with.
    ids = like.get("ids", {}) if o.vocab in (None, like["vocab"]) and o.family in (None, like["family"]) else {}
    for name, value in like.items():
        if getattr(o, name, None) is None:
            setattr(o, name, value)
    layout = o.family in LAYOUT
    if o.vocab < 3:
        parse.error(f"--vocab: expected at least 3 (text, end of text, MASK), found {o.vocab}")
    o.mask, o.end = ids.get("mask", o.vocab - 1), ids.get("end", o.vocab - 2)
    o.bos, o.pad = ids.get("bos", o.end), ids.get("pad")
    if layout:
        # What is not said follows from the heads, with the MLP of Llama's proportion.
        o.kv_heads = o.kv_heads or o.heads
        o.head_dim = o.head_dim or o.hidden // o.heads
        o.mlp = o.mlp or 8 * o.hidden // 3
        if o.family in published.EXPERTS:
            for name, value in SMALL_EXPERTS.items():
                setattr(o, name, value if getattr(o, name, None) is None else getattr(o, name))
            o.expert_mlp = o.expert_mlp or o.mlp
            if not 1 <= o.top_k <= o.experts or not 0 <= o.dense < o.layers or o.expert_mlp < 1:
                parse.error("--top-k: from 1 to --experts; --dense: below --layers; --expert-mlp: at least 1")
        if o.heads % o.kv_heads or o.head_dim % 2:
            parse.error("--kv-heads must divide --heads, and --head-dim be even")
        if o.family == "gpt2" and o.kv_heads != o.heads:
            parse.error("--kv-heads: GPT-2 has as many as --heads")
        if o.family in ("qwen2", "llada", "gpt2") and o.head_dim * o.heads != o.hidden:
            parse.error("--head-dim: this family's follows from --hidden and --heads")
    family_sizes = ("kv_heads", "head_dim", "mlp") if layout else ("block_size", "cond_dim")
    for name in ("hidden", "layers", "heads", "length", "shard_bytes", *family_sizes):
        if (getattr(o, name) or 0) < 1:
            parse.error(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(o, name)}")
    if not layout and (o.hidden % o.heads or (o.hidden // o.heads) % 2):
        parse.error(f"--hidden {o.hidden}, --heads {o.heads}: the head dimension must be a whole even number")
    if o.family == "mdlm" and not o.adaln:
        parse.error("--no-adaln: MDLM always has adaLN")
    return o


def configuration(o):
    if o.family in LAYOUT:
        shape = {
            "bos_token_id": o.bos,
            "eos_token_id": o.end,
            "head_dim": o.head_dim,
            "hidden_size": o.hidden,
            "intermediate_size": o.mlp,
            "mask_token_id": o.mask,
            "max_position_embeddings": o.length,
            "num_attention_heads": o.heads,
            "num_hidden_layers": o.layers,
            "num_key_value_heads": o.kv_heads,
            "pad_token_id": o.pad,
            "tie_word_embeddings": bool(o.tied),
            "vocab_size": o.vocab,
        }
        if o.family == "gpt2":
            return published.gpt2_config(shape)
        if o.family in published.EXPERTS:
            return published.experts_config(o.family, shape, o)
        if o.family in published.ADAPTED:
            return published.adapted_config(o.family, shape)
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


def write(o):
    o.out.mkdir(parents=True, exist_ok=True)
    config = configuration(o)
    config["torch_dtype"] = TORCH[o.dtype]
    (o.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if o.tokenizer:
        shutil.copyfile(o.tokenizer, o.out / "tokenizer.json")
    else:
        write_tokenizer(o.out / "tokenizer.json", o)
    files, size, parameters, buffers = write_weights(o.out, o)
    where = "one file" if files == 1 else f"{files} files"
    print(f"{o.out}: {parameters:,} parameters, {buffers} numbers in buffers, {size:,} bytes of weights in {o.dtype}, {where}")


def check(binary):
    """Every family in small, each in a type and a number of files of its own, inspected, loaded, and asked for text or a likelihood."""
    sizes = "--hidden 64 --layers 2 --heads 4 --vocab 400 --length 64".split()
    run = lambda *args: subprocess.run([binary, *args], capture_output=True, text=True)
    failed = []
    with tempfile.TemporaryDirectory() as parent:
        for i, family in enumerate(("bd3lm", "mdlm", *LAYOUT)):
            directory = pathlib.Path(parent) / family
            flags = ["--family", family, *sizes, "--dtype", list(BYTES)[i % 3], "--out", str(directory)]
            if i % 2:
                flags += ["--shard-bytes", "100000"]
            if family in LAYOUT:
                flags += ["--kv-heads", "4" if family in ("llada", "gpt2") else "2", "--mlp", "96", "--tied" if i % 4 == 2 else "--no-tied"]
            write(options(flags))
            facts = json.loads(run("inspect", str(directory), "--format", "json").stdout or "{}")
            judge = facts.get("mask_id") is None
            text = directory / "text.txt"
            text.write_text("and so it goes")
            command = ["score", "--file", str(text)] if judge else ["generate", "--prompt", "a b", "--length", "20", "--ignore-eos", "--format", "json"]
            done = run(*command, "--model", str(directory), "--device", "cpu")
            shown = len(json.loads(done.stdout)["tokens"]) == 20 if done.returncode == 0 and not judge else bool(done.stdout)
            if facts.get("family") != family or len(facts["unsupported"]) != judge or done.returncode or not shown:
                failed.append(f"{family}: {facts.get('unsupported')} {done.stderr.strip()}")
    sys.exit("\n".join(failed) or None)


def main():
    o = options()
    if o.check:
        check(o.check)
    else:
        write(o)


if __name__ == "__main__":
    main()
