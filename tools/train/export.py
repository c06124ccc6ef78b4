#!/usr/bin/env python3
"""Write a trained model as a directory in a published layout: BD3-LM, or Qwen2 for the autoregressive judge.

    python3 export.py WORK/run/checkpoint.pt ../../models/NAME --tokenizer WORK/data/tokenizer.json

Files are written to a temporary name and renamed, so a reader never sees half a file. The weights
are one `model.safetensors` where they fit in `--max-shard-mib`, else shards with their index
(shards.py).
"""
import argparse
import os
import shutil

import torch

from causal import RMS_EPS, Decoder
from model import EMBED_SCALE, Backbone, rope_tables
from shards import replace_json, write_weights

MAX_SHARD_MIB = 4096  # one file for everything that is trained here, unless a run asks for less


def bd3lm_tensors(weights, config, dtype):
    """Rename to the published tensor names and split the shared matrix into embedding and head."""
    tensors = {}
    for name, value in weights.items():
        value = value.detach()
        if name == "vocab_embed.embedding":
            tensors["backbone." + name] = (value * EMBED_SCALE).to(dtype)
            tensors["backbone.output_layer.linear.weight"] = value.to(dtype)
        else:
            tensors["backbone." + name] = value.to(dtype)
    _, _, inv_freq = rope_tables(1, config["dim"] // config["heads"])
    tensors["backbone.rotary_emb.inv_freq"] = inv_freq  # stays float32: positions need it
    return {k: v.contiguous().clone() for k, v in sorted(tensors.items())}


def bd3lm_config(config, dtype, block_size):
    return {
        "architectures": ["BD3LM"],
        "model_type": "bd3lm",
        "block_size": block_size,
        "vocab_size": config["vocab"],
        "model_length": config["length"],
        "hidden_dim": config["dim"],
        "cond_dim": 128,  # unused without adaLN, part of the layout
        "n_blocks": config["blocks"],
        "n_heads": config["heads"],
        "dropout": 0.1,  # the class applies it in training mode only
        "cross_attn": True,
        "adaln": False,
        "causal": False,
        "time_conditioning": False,
        "var_min": False,
        "attn_backend": "sdpa",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "mask_token_id": config["vocab"] - 1,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def qwen2_tensors(weights, config, dtype):
    tensors = {}
    for name, value in weights.items():
        value = value.detach()
        if name == "embed_tokens.weight":
            tensors["model." + name] = (value * EMBED_SCALE).to(dtype)
            tensors["lm_head.weight"] = value.to(dtype)
        else:
            tensors["model." + name] = value.to(dtype)
    return {k: v.contiguous().clone() for k, v in sorted(tensors.items())}


def qwen2_config(config, dtype, block_size):
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config["vocab"],
        "hidden_size": config["dim"],
        "intermediate_size": 3 * config["dim"],
        "num_hidden_layers": config["blocks"],
        "num_attention_heads": config["heads"],
        "num_key_value_heads": config["heads"],
        "max_position_embeddings": config["length"],
        "hidden_act": "silu",
        "rms_norm_eps": RMS_EPS,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


LAYOUTS = {"bd3lm": (bd3lm_tensors, bd3lm_config), "qwen2": (qwen2_tensors, qwen2_config)}


def export_directory(layout, weights, config, folder, tokenizer, dtype="bfloat16", block_size=4,
                     max_shard_mib=MAX_SHARD_MIB):
    """`weights`: name -> tensor as in model.Backbone or causal.Decoder (normally the averaged ones),
    on any device.

    Returns the names of the files that hold the weights.
    """
    tensors, description = LAYOUTS[layout]
    os.makedirs(folder, exist_ok=True)
    dtype = getattr(torch, dtype)
    target = os.path.join(folder, "tokenizer.json")
    shutil.copyfile(tokenizer, target + ".tmp")
    os.replace(target + ".tmp", target)
    replace_json(os.path.join(folder, "config.json"), description(config, dtype, block_size))
    return write_weights(tensors({k: v.cpu() for k, v in weights.items()}, config, dtype), folder, max_shard_mib)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("checkpoint")
    ap.add_argument("folder")
    ap.add_argument("--tokenizer", required=True)
    ap.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    ap.add_argument("--block-size", type=int, default=4, help="block size named in config.json")
    ap.add_argument("--max-shard-mib", type=float, default=MAX_SHARD_MIB, help="largest file of weights, in MiB")
    ap.add_argument("--raw", action="store_true", help="export the last weights instead of the best average")
    args = ap.parse_args()
    saved = torch.load(args.checkpoint, weights_only=False, map_location="cpu")
    layout = "qwen2" if saved["args"]["objective"] == "causal" else "bd3lm"
    model = {"qwen2": Decoder, "bd3lm": Backbone}[layout](**saved["config"])
    names = [n for n, _ in model.named_parameters()]
    weights = dict(zip(names, saved["params"] if args.raw else saved["best"]["weights"]))
    names = export_directory(layout, weights, saved["config"], args.folder, args.tokenizer, args.dtype, args.block_size,
                             args.max_shard_mib)
    size = sum(os.path.getsize(os.path.join(args.folder, name)) for name in names)
    print(f"{args.folder}: step {saved['step']}, {size / 1e6:.1f} MB in {len(names)} file(s)")


if __name__ == "__main__":
    main()
