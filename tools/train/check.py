#!/usr/bin/env python3
"""Check an exported model directory: files, ids, and (optionally) the logits of the official model class.

    python3 check.py ../../models/NAME [--reference [FOLDER]]

For a BD3-LM directory FOLDER holds the official `modeling_bd3lm.py` and `configuration_bd3lm.py` (kuleshov-group/bd3lms,
models/hf) and the packages transformers and einops are needed; for a Qwen2 directory the class of transformers is taken.
"""
import argparse
import importlib
import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tokenizers import Tokenizer

from sample import load_exported, load_judge
from shards import read_weights, weight_files


def check_tokenizer(folder, config):
    tok = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    vocab = config["vocab_size"]
    assert tok.get_vocab_size() == vocab and sorted(tok.get_vocab().values()) == list(range(vocab))
    names = [tok.id_to_token(i) for i in (config["bos_token_id"], config["pad_token_id"], vocab - 1)]
    assert names == ["<|endoftext|>", "<|pad|>", "<|mask|>"] and config.get("mask_token_id", vocab - 1) == vocab - 1, names
    for text in ("Once upon a time, there was a \"cat\".\nIt didn't  run!\n", " x", "caf\u00e9 \u2603 42"):
        assert tok.decode(tok.encode(text).ids, skip_special_tokens=False) == text, text
    assert tok.encode("a<|mask|>b<|endoftext|>").ids[1::2] == [vocab - 1, 0]
    print("tokenizer: ok")


def check_reference(folder, config, reference):
    """Largest difference between our logits and those of the official class, for the three uses."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(reference)))
    package = os.path.basename(os.path.abspath(reference))
    official = importlib.import_module(package + ".modeling_bd3lm")
    kwargs = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "torch_dtype")}
    tensors = {k: v.float() for k, v in read_weights(folder).items()}
    ours, _ = load_exported(folder)
    n, mask_id = config["model_length"], config["mask_token_id"]
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(2, mask_id, (2, n), generator=generator)
    clean[:, 0] = config["bos_token_id"]
    noisy = clean.masked_fill((torch.rand(2, n, generator=generator) < 0.4) & (torch.arange(n) > 0), mask_id)
    joined, sigma = torch.cat((noisy, clean), dim=1), torch.zeros(2)
    worst = 0.0
    for block in (4, 16, n):
        theirs = official.BD3LM(official.BD3LMConfig(**{**kwargs, "block_size": block})).float().eval()
        theirs.load_state_dict(tensors, strict=True)
        with torch.no_grad():
            pairs = {
                "training forward": (theirs(joined, sigma, return_dict=False), ours(noisy, clean, block)),
                "sampling forward": (theirs(noisy, sigma, sample_mode=True, return_dict=False),
                                     ours(noisy, None, block)),
            }
            if block == n:
                pairs["full attention"] = (pairs["sampling forward"][0], ours(noisy))
        for name, (a, b) in pairs.items():
            difference = float((a - b).abs().max())
            worst = max(worst, difference)
            print(f"block {block:3d}, {name}: largest difference {difference:.1e} (logits up to {a.abs().max():.1f})")
    assert worst < 1e-3, worst


def check_causal_reference(folder):
    """Largest difference between our logits and those of the Qwen2 class of transformers."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_judge(folder)
    ids = torch.randint(2, ours.config["vocab"] - 1, (2, ours.config["length"]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = float((ours(ids) - theirs(ids).logits).abs().max())
    print(f"causal forward: largest difference {difference:.1e}")
    assert difference < 1e-3, difference


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder")
    ap.add_argument("--reference", nargs="?", const="", help="compare logits; folder with the official modelling files")
    args = ap.parse_args()
    with open(os.path.join(args.folder, "config.json")) as f:
        config = json.load(f)
    check_tokenizer(args.folder, config)
    files, tensors = weight_files(args.folder), read_weights(args.folder)
    count = sum(t.numel() for k, t in tensors.items() if not k.endswith("inv_freq"))
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), f"{name} is not finite"
    size = sum(map(os.path.getsize, files)) / 1e6
    print(f"weights: {count:,} parameters in {len(files)} file{'s' * (len(files) > 1)}, {size:.2f} MB")
    if args.reference is not None and config["model_type"] == "qwen2":
        check_causal_reference(args.folder)
    elif args.reference is not None:
        check_reference(args.folder, config, args.reference)


if __name__ == "__main__":
    main()
