#!/usr/bin/env python3
"""Turn a GGUF file of the llama architecture into a Hugging Face directory.

    python3 tools/gguf_to_hf.py model.gguf OUT [--dtype bfloat16]
    python3 tools/gguf_to_hf.py --self-test

Writes `config.json`, `model.safetensors`, `tokenizer.json` and `tokenizer_config.json`. Numpy is
all it needs. It reads F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K, and
byte-level BPE tokenizers (`tokenizer.ggml.model` = gpt2).

In this layout of a GGUF file the rows of Q and K are permuted, because its rotary embedding turns
neighbouring pairs; Hugging Face's turns a value of the first half with one of the second. The rows
are put back here. What quantisation has rounded away does not come back.
"""
import argparse
import json
import math
import os
import struct
import sys

import numpy as np

# ---- the file ------------------------------------------------------------------------------------

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, form, count=1):
        values = struct.unpack_from(f"<{count}{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{form}")
        return values if count != 1 else values[0]

    def text(self):
        size = self.take("Q")
        raw = bytes(self.data[self.at:self.at + size])
        if len(raw) != size:
            raise SystemExit("the file ends inside a string")
        self.at += size
        return raw.decode("utf-8", "replace")

    def value(self, kind):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, count = self.take("I"), self.take("Q")
            if kind in SCALARS:
                return list(self.take(SCALARS[kind], count)) if count != 1 else [self.take(SCALARS[kind])]
            return [self.value(kind) for _ in range(count)]
        if kind not in SCALARS:
            raise SystemExit(f"metadata of unknown type {kind}")
        return self.take(SCALARS[kind])


def read_gguf(path):
    """-> (metadata, {name: (shape as in torch, type, its bytes)})."""
    data = np.memmap(path, np.uint8, "r")
    reader = Reader(data)
    if bytes(data[:4]) != b"GGUF":
        raise SystemExit(f"{path}: no GGUF file")
    reader.at = 4
    version = reader.take("I")
    if version not in (2, 3):
        raise SystemExit(f"{path}: GGUF version {version}; expected 2 or 3")
    tensors, entries = reader.take("Q"), reader.take("Q")
    meta = {}
    for _ in range(entries):
        name = reader.text()
        meta[name] = reader.value(reader.take("I"))
    found = []
    for _ in range(tensors):
        name, rank = reader.text(), reader.take("I")
        shape = [reader.take("Q") for _ in range(rank)][::-1]  # the file names the fastest one first
        found.append((name, shape, reader.take("I"), reader.take("Q")))
    align = meta.get("general.alignment", 32)
    start = (reader.at + align - 1) // align * align
    result = {}
    for name, shape, kind, offset in found:
        if kind not in TYPES:
            raise SystemExit(f"{path}: {name}: type {kind} is not read here")
        block, size, _ = TYPES[kind]
        length = math.prod(shape) // block * size
        raw = data[start + offset:start + offset + length]
        if len(raw) != length or math.prod(shape) % block:
            raise SystemExit(f"{path}: {name}: {len(raw)} bytes, expected {length}")
        result[name] = (shape, kind, raw)
    return meta, result


# ---- blocks of quantised values --------------------------------------------------------------------
#
# Each function takes blocks [N, bytes of a block] and returns float32 [N, values of a block].

def half(raw):
    """f16 in two bytes: [N, 2k] -> float32 [N, k]."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def nibbles(raw):
    """[N, k] bytes -> [N, 2k]: all low halves, then all high ones."""
    return np.concatenate((raw & 15, raw >> 4), axis=1)


def fifth_bits(raw):
    """The fifth bit of 32 values in four bytes, [N, 4] -> [N, 32] of 0 or 16."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little") << 4


def q4_0(b):
    return half(b[:, :2]) * (nibbles(b[:, 2:]).astype(np.float32) - 8)


def q4_1(b):
    return half(b[:, :2]) * nibbles(b[:, 4:]) + half(b[:, 2:4])


def q5_0(b):
    return half(b[:, :2]) * ((nibbles(b[:, 6:]) | fifth_bits(b[:, 2:6])).astype(np.float32) - 16)


def q5_1(b):
    return half(b[:, :2]) * (nibbles(b[:, 8:]) | fifth_bits(b[:, 4:8])) + half(b[:, 2:4])


def q8_0(b):
    return half(b[:, :2]) * np.ascontiguousarray(b[:, 2:]).view(np.int8)


def k_scales(b):
    """The eight scales and eight minima of 6 bits in twelve bytes, [N, 12] -> two of [N, 8]."""
    low, mid, high = b[:, :4], b[:, 4:8], b[:, 8:]
    scales = np.concatenate((low & 63, (high & 15) | (low >> 6 << 4)), axis=1)
    minima = np.concatenate((mid & 63, (high >> 4) | (mid >> 6 << 4)), axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def scaled_k(b, quants):
    """Values of Q4_K and Q5_K from their eight groups of 32 quants, [N, 8, 32]."""
    scales, minima = k_scales(b[:, 4:16])
    scale, least = half(b[:, :2]) * scales, half(b[:, 2:4]) * minima
    return (scale[:, :, None] * quants - least[:, :, None]).reshape(len(b), 256)


def k_nibbles(raw):
    """[N, 128] bytes -> [N, 8, 32]: of every 32 bytes the low halves, then the high ones."""
    four = raw.reshape(len(raw), 4, 1, 32)
    return np.concatenate((four & 15, four >> 4), axis=2).reshape(len(raw), 8, 32)


def q4_k(b):
    return scaled_k(b, k_nibbles(b[:, 16:]))


def q5_k(b):
    bit = np.arange(8, dtype=np.uint8)[:, None]
    return scaled_k(b, k_nibbles(b[:, 48:]) | (b[:, None, 16:48] >> bit & 1) << 4)


def q6_k(b):
    low = b[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate((low & 15, low >> 4), axis=2).reshape(-1, 2, 4, 32)
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> shift & 3
    quants = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return (half(b[:, 208:210])[:, :, None] * scales[:, :, None] * quants).reshape(-1, 256)


def bf16(b):
    return (np.ascontiguousarray(b).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


TYPES = {  # type: values in a block, bytes of a block, function
    0: (1, 4, lambda b: np.ascontiguousarray(b).view(np.float32)), 1: (1, 2, half), 30: (1, 2, bf16),
    2: (32, 18, q4_0), 3: (32, 20, q4_1), 6: (32, 22, q5_0), 7: (32, 24, q5_1), 8: (32, 34, q8_0),
    12: (256, 144, q4_k), 13: (256, 176, q5_k), 14: (256, 210, q6_k),
}


def values(shape, kind, raw):
    """A tensor of the file as float32."""
    _, size, function = TYPES[kind]
    return function(np.asarray(raw).reshape(-1, size)).reshape(shape)


# ---- the directory ---------------------------------------------------------------------------------

LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def published_name(name):
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None: not part of it."""
    stem, _, end = name.rpartition(".")
    if stem == "rope_freqs":
        return None
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{end}"
    parts = stem.split(".")
    if len(parts) != 3 or parts[0] != "blk" or parts[2] not in LAYER:
        raise SystemExit(f"tensor {name}: not part of the llama layout")
    return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{end}"


def unpermuted(matrix, heads):
    """Rows of Q or K from neighbouring pairs to two halves."""
    rows = matrix.shape[0] // heads
    return matrix.reshape(heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def stored(array, dtype):
    """float32 -> the bytes of `dtype`, rounded to nearest even."""
    if dtype == "float32":
        return array.astype("<f4").tobytes()
    if dtype == "float16":
        return array.astype("<f2").tobytes()
    bits = array.astype("<f4").view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def write_safetensors(path, tensors, dtype):
    """`tensors`: (name, shape, function that gives float32), written one after the other."""
    code, width = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}[dtype]
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _ in tensors:
        size = math.prod(shape) * width
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path + ".tmp", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, make in tensors:
            f.write(stored(make(), dtype))
    os.replace(path + ".tmp", path)


def config(meta, tensors, dtype):
    def value(name, default=None):
        found = meta.get("llama." + name, default)
        if found is None:
            raise SystemExit(f"metadata llama.{name}: missing")
        return found

    if meta.get("general.architecture") != "llama":
        raise SystemExit(f"architecture {meta.get('general.architecture')}: expected llama")
    heads = value("attention.head_count")
    width = value("rope.dimension_count", value("embedding_length") // heads)
    result = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tensors["token_embd.weight"][0][0],
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": dtype,
    }
    for key in ("bos", "eos"):
        if f"tokenizer.ggml.{key}_token_id" in meta:
            result[f"{key}_token_id"] = meta[f"tokenizer.ggml.{key}_token_id"]
    if "rope_freqs.weight" in tensors or meta.get("llama.rope.scaling.type", "none") != "none":
        print("the file scales its rotary frequencies; config.json does not say so", file=sys.stderr)
    return result


def tokenizer(meta):
    """A byte-level BPE tokenizer.json from the metadata, or None."""
    if meta.get("tokenizer.ggml.model") != "gpt2":
        print(f"tokenizer {meta.get('tokenizer.ggml.model')}: not written here", file=sys.stderr)
        return None
    tokens = meta["tokenizer.ggml.tokens"]
    kinds = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre in ("smollm", "starcoder", "refact", "command-r"):
        digits = {"type": "Digits", "individual_digits": True}
        split = {"type": "Sequence", "pretokenizers": [digits, split]}
    elif pre not in ("default", "gpt-2"):
        print(f"pre-tokenizer {pre}: taken as that of GPT-2, words may be cut elsewhere", file=sys.stderr)
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": k == 3}
             for i, (t, k) in enumerate(zip(tokens, kinds)) if k in (3, 4)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": split, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {t: i for i, t in enumerate(tokens)},
                  "merges": [m.split(" ", 1) for m in meta["tokenizer.ggml.merges"]]},
    }


def write_json(path, value):
    with open(path + ".tmp", "w") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")
    os.replace(path + ".tmp", path)


def convert(path, out, dtype):
    meta, tensors = read_gguf(path)
    os.makedirs(out, exist_ok=True)
    description = config(meta, tensors, dtype)
    plan = []
    for name, (shape, kind, raw) in tensors.items():
        target = published_name(name)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
        count = description[heads] if heads else None

        def make(shape=shape, kind=kind, raw=raw, count=count):
            array = values(shape, kind, raw)
            return unpermuted(array, count) if count else array

        if target:
            plan.append((target, shape, make))
    write_safetensors(os.path.join(out, "model.safetensors"), sorted(plan, key=lambda p: p[0]), dtype)
    write_json(os.path.join(out, "config.json"), description)
    words = tokenizer(meta)
    if words:
        tokens = meta["tokenizer.ggml.tokens"]
        write_json(os.path.join(out, "tokenizer.json"), words)
        write_json(os.path.join(out, "tokenizer_config.json"), {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{key}_token": tokens[meta[f"tokenizer.ggml.{key}_token_id"]] for key in ("bos", "eos")
               if f"tokenizer.ggml.{key}_token_id" in meta},
            **({"chat_template": meta["tokenizer.chat_template"]} if "tokenizer.chat_template" in meta else {}),
        })
    weights = sum(math.prod(shape) for _, shape, _ in plan)
    print(f"{out}: {len(plan)} tensors, {weights:,} weights as {dtype}")


# ---- self-test -------------------------------------------------------------------------------------

def one_by_one(kind, b):
    """The values of one block, computed singly from the description of the format."""
    def f16(at):
        return np.frombuffer(b[at:at + 2].tobytes(), np.float16)[0].astype(np.float32)

    def signed(at):
        return int(b[at]) - 256 * (b[at] > 127)

    b_int, out = [int(x) for x in b], []
    if kind in (2, 3, 6, 7, 8):
        at = {2: 2, 3: 4, 6: 6, 7: 8, 8: 2}[kind]
        for i in range(32):
            if kind == 8:
                out.append(f16(0) * signed(at + i))
                continue
            q = b_int[at + i % 16] >> 4 * (i // 16) & 15
            if kind in (6, 7):
                q |= (b_int[at - 4 + i // 8] >> i % 8 & 1) << 4
            out.append(f16(0) * (q - {2: 8, 6: 16}[kind]) if kind in (2, 6) else f16(0) * q + f16(2))
    elif kind in (12, 13):
        quants = 16 if kind == 12 else 48
        for i in range(256):
            group, byte = i // 32, quants + i // 64 * 32 + i % 32
            q = b_int[byte] >> 4 * (group % 2) & 15
            if kind == 13:
                q |= (b_int[16 + i % 32] >> group & 1) << 4
            s = b_int[4:16]
            if group < 4:
                scale, least = s[group] & 63, s[group + 4] & 63
            else:
                scale, least = (s[group + 4] & 15) | s[group - 4] >> 6 << 4, s[group + 4] >> 4 | s[group] >> 6 << 4
            out.append(f16(0) * np.float32(scale) * np.float32(q) - f16(2) * np.float32(least))
    elif kind == 14:
        for i in range(256):
            part, place, row = i // 128, i % 32, i % 128 // 32
            q = b_int[part * 64 + place + 32 * (row % 2)] >> 4 * (row // 2) & 15
            q |= (b_int[128 + part * 32 + place] >> 2 * row & 3) << 4
            out.append(f16(208) * np.float32(signed(192 + i // 16)) * np.float32(q - 32))
    return np.array(out, np.float32)


def self_test():
    rng = np.random.default_rng(0)
    for kind, (count, size, function) in TYPES.items():
        if count == 1:
            continue
        blocks = rng.integers(0, 256, (20, size), dtype=np.uint8)
        for at in {2: (0,), 6: (0,), 8: (0,), 14: (208,)}.get(kind, (0, 2)):  # sane scales
            blocks[:, at:at + 2] = rng.normal(0, 0.1, (20, 1)).astype(np.float16).view(np.uint8)
        expected = np.stack([one_by_one(kind, b) for b in blocks])
        if not np.allclose(function(blocks), expected, rtol=1e-6, atol=1e-6):
            raise SystemExit(f"type {kind}: values differ")
        print(f"type {kind}: {expected.size} values agree")
    permuted = np.arange(48).reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    assert (unpermuted(permuted, 2) == np.arange(48).reshape(16, 3)).all()
    sample = np.array([1.0, 1.00390625, -3.1415927, 1e-30], np.float32)
    back = (np.frombuffer(stored(sample, "bfloat16"), "<u2").astype(np.uint32) << 16).view(np.float32)
    assert np.allclose(back, sample, rtol=2**-8), back


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("gguf", nargs="?")
    ap.add_argument("out", nargs="?")
    ap.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    ap.add_argument("--self-test", action="store_true")
    args = ap.parse_args()
    if args.self_test:
        self_test()
    elif not args.out:
        ap.error("expected a GGUF file and a folder to write to")
    else:
        convert(args.gguf, args.out, args.dtype)


if __name__ == "__main__":
    main()
