#!/usr/bin/env python3
"""Held-out losses of exported models, on the same documents under the same masks.

    python3 compare.py WORK/data ../../models/A ../../models/B --parts simple

One sequence per held-out document, from its beginning on (what follows a short one is the next
document). In nats per masked token: `b4` and `b16` with every count of masks in a block equally
often (the likelihood bound at that block size), `full` with every mask rate equally often, and the
columns of the training table.
"""
import argparse
import os

import numpy as np
import torch

import data as corpus
from model import mask_blocks, mask_full, masked_loss
from objectives import Diffusion
from sample import load_exported

EVERY = [("b4", 4, None), ("b16", 16, None), ("full", None, None)]


def sequences(data, parts, length, limit):
    """[N, length]: the first `limit` held-out documents, in file order."""
    names = data["parts"].tolist()
    wanted = np.isin(data["doc_part"], [names.index(p) for p in parts]) & data["doc_heldout"]
    lengths = np.diff(data["doc_start"])
    tokens = torch.from_numpy(data["tokens"][np.repeat(wanted, lengths)].astype(np.int64))
    starts = np.cumsum(lengths[wanted]) - lengths[wanted]
    rows = [tokens[s:s + length] for s in starts[:limit] if s + length <= len(tokens)]
    return torch.stack(rows)


@torch.no_grad()
def losses(model, rows, seed):
    result = {}
    for name, block, level in EVERY + Diffusion.table:
        generator, sums = corpus.seeded("cpu", seed), 0.0
        for batch in rows.split(32):
            if block is None:
                noise = mask_full(generator, *batch.shape, ((0.0, 1.0, 1.0),), rate=level)
            else:
                noise = mask_blocks(generator, *batch.shape, block, count=level)
            sums += float(masked_loss(model, batch, *noise, block, False)) * len(batch)
        result[name] = sums / len(rows)
    return result


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("data")
    ap.add_argument("models", nargs="+")
    ap.add_argument("--parts", default="simple")
    ap.add_argument("--length", type=int, default=256)
    ap.add_argument("--documents", type=int, default=200, help="at most")
    ap.add_argument("--seed", type=int, default=1)
    args = ap.parse_args()
    data, _ = corpus.load(args.data)
    rows = sequences(data, args.parts.split(","), args.length, args.documents)
    print(f"{len(rows)} held-out sequences of {args.length} tokens, parts {args.parts}")
    for folder in args.models:
        values = losses(load_exported(folder)[0], rows, args.seed)
        print(os.path.basename(folder.rstrip("/")), " ".join(f"{k} {v:.3f}" for k, v in values.items()), flush=True)


if __name__ == "__main__":
    main()
