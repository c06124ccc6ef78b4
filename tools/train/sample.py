#!/usr/bin/env python3
"""Small reference sampler for an exported model: draft in blocks, then optionally refine. Slow and plain on purpose.

    python3 sample.py ../../models/NAME --count 4 --length 128 --prompt "Once upon a time" --refine 0.35

Draft: block by block, one uniformly random masked position per forward (first-hitting), block-causal attention.
Refine: the given share of positions with the lowest draft confidence is masked again and redrawn under full attention.
"""
import argparse
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from tokenizers import Tokenizer

from causal import Decoder
from model import EMBED_SCALE, Backbone
from shards import read_weights


def load_exported(folder):
    """Exported directory -> (Backbone in float32, config.json). Only models trained here (shared matrix) fit."""
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    tensors = {k: v.float() for k, v in read_weights(folder).items()}
    head = tensors.pop("backbone.output_layer.linear.weight")
    embedding = tensors["backbone.vocab_embed.embedding"]
    assert torch.equal(embedding, head * EMBED_SCALE), "embedding and head differ: not a model of this trainer"
    tensors["backbone.vocab_embed.embedding"] = head
    tensors.pop("backbone.rotary_emb.inv_freq")
    model = Backbone(config["vocab_size"], config["hidden_dim"], config["n_blocks"], config["n_heads"],
                     config["model_length"])
    model.load_state_dict({k.removeprefix("backbone."): v for k, v in tensors.items()})
    return model.eval(), config


def load_judge(folder):
    """Exported judge -> causal.Decoder in float32."""
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    tensors = {k: v.float() for k, v in read_weights(folder).items()}
    tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight")
    model = Decoder(config["vocab_size"], config["hidden_size"], config["num_hidden_layers"],
                    config["num_attention_heads"], config["max_position_embeddings"])
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items()})
    return model.eval()


def draw(logits, nucleus, temperature, mask_id, rng):
    """logits [N, V] -> (token [N], its probability before truncation [N]).

    Nucleus: keep while the cumulative mass, including the token itself, is <= p; always keep the first.
    """
    logits = logits.double().numpy() / temperature
    logits[:, mask_id] = -np.inf
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    order = np.argsort(-p, axis=1)
    ranked = np.take_along_axis(p, order, axis=1)
    keep = ranked.cumsum(axis=1) <= nucleus
    keep[:, 0] = True
    ranked = ranked * keep
    edge = ranked.cumsum(axis=1)
    pick = (edge < rng.random((len(p), 1)) * edge[:, -1:]).sum(axis=1)
    token = order[np.arange(len(p)), pick]
    return token, p[np.arange(len(p)), token]


@torch.no_grad()
def draft(model, config, rng, count, length, block, prompt=(), nucleus=0.9, temperature=1.0):
    """-> tokens [count, length] and their confidence at the moment they were drawn (1 for given ones)."""
    mask_id = config["mask_token_id"]
    tokens = np.full((count, length), mask_id, dtype=np.int64)
    confidence = np.ones((count, length))
    given = [config["bos_token_id"], *prompt]
    tokens[:, :len(given)] = given
    each = np.arange(count)
    for start in range(0, length, block):
        end = start + block
        while (left := (tokens[:, start:end] == mask_id)).any():
            logits = model(torch.from_numpy(tokens[:, :end]), None, block)
            at = start + np.where(left, rng.random(left.shape), -1).argmax(axis=1)  # the same count in every row
            tokens[each, at], confidence[each, at] = draw(logits[each, at], nucleus, temperature, mask_id, rng)
    return tokens, confidence


@torch.no_grad()
def refine(model, config, rng, tokens, confidence, ratio, fixed, forwards=12, nucleus=0.9, temperature=1.0):
    """Redraw the `ratio` least confident positions (the first `fixed` are exempt) in about `forwards` full passes."""
    tokens, mask_id = tokens.copy(), config["mask_token_id"]
    count, length = tokens.shape
    remask = int(np.floor(ratio * length))
    score = confidence.copy()
    score[:, :fixed] = np.inf
    chosen = np.argsort(score, axis=1, kind="stable")[:, :remask]
    chosen = rng.permuted(chosen, axis=1)
    np.put_along_axis(tokens, chosen, mask_id, axis=1)
    for group in np.array_split(np.arange(remask), min(forwards, remask)):
        logits = model(torch.from_numpy(tokens))
        for column in group:
            at = chosen[:, column]
            tokens[np.arange(count), at], _ = draw(logits[np.arange(count), at], nucleus, temperature, mask_id, rng)
    return tokens


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder")
    ap.add_argument("--count", type=int, default=4)
    ap.add_argument("--length", type=int, default=256)
    ap.add_argument("--block", type=int, help="draft block size (default: that of config.json)")
    ap.add_argument("--prompt", default="")
    ap.add_argument("--nucleus", type=float, default=0.9)
    ap.add_argument("--temperature", type=float, default=1.0)
    ap.add_argument("--refine", type=float, default=0.0, help="share of positions to redraw")
    ap.add_argument("--forwards", type=int, default=12)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--whole", action="store_true", help="do not stop the printed text at the end of the first story")
    args = ap.parse_args()
    model, config = load_exported(args.folder)
    tok = Tokenizer.from_file(os.path.join(args.folder, "tokenizer.json"))
    rng = np.random.default_rng(args.seed)
    prompt = tok.encode(args.prompt).ids
    how = dict(nucleus=args.nucleus, temperature=args.temperature)
    tokens, confidence = draft(model, config, rng, args.count, args.length, args.block or config["block_size"], prompt,
                               **how)
    results = [("draft", tokens)]
    if args.refine:
        results.append(("refined", refine(model, config, rng, tokens, confidence, args.refine, 1 + len(prompt),
                                          args.forwards, **how)))
    for row in range(args.count):
        for name, ids in results:
            text = tok.decode(ids[row, 1:].tolist(), skip_special_tokens=False)
            print(f"=== {row} {name}\n{text if args.whole else text.split('<|endoftext|>')[0]}\n")


if __name__ == "__main__":
    main()
