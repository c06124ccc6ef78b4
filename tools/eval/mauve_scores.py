#!/usr/bin/env python3
"""MAUVE (arXiv 2102.01454) of the rows of a `bench --quality --save` file against one of them.

    python3 mauve_scores.py SAMPLES.jsonl --reference "one token, other seed" [--judge ../../models/redraft-judge]

Features are the judge's final hidden state at the last token of a sample, BOS and everything before it seen; the score itself is the authors'
package (mauve-text): principal components of 90 % of the variance, k-means with a tenth as many clusters as samples, the area under the curve of
the two divergences, scaled by 5. 1 is the most; two sets of the same distribution stay below it, by how much depends on their size: the row of another
seed shows that. Needs torch, transformers and mauve-text.
"""
import argparse
import json
import os

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.normpath(os.path.join(HERE, "..", ".."))
SEEDS = range(8)


def features(samples, judge):
    """(samples, C) f32: the judge's final hidden state behind each list of tokens."""
    import torch
    from transformers import AutoConfig, AutoModel

    start = AutoConfig.from_pretrained(judge).bos_token_id
    model = AutoModel.from_pretrained(judge, dtype=torch.float32).eval()
    rows = []
    with torch.no_grad():
        for first in range(0, len(samples), 64):
            ids = torch.tensor([[start, *tokens] for tokens in samples[first : first + 64]])
            rows.append(model(ids).last_hidden_state[:, -1].numpy())
    return np.concatenate(rows)


def scores(path, judge, reference):
    """Name of a row -> mean, lowest and highest MAUVE over eight seeds of the clustering."""
    import mauve

    samples = {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            sample = json.loads(line)
            samples.setdefault(sample["row"], []).append(sample["tokens"])
    if reference not in samples:
        raise SystemExit(f"{path}: no row `{reference}`; there are {', '.join(samples)}")
    of = {name: features(tokens, judge) for name, tokens in samples.items()}
    found = {}
    for name, rows in of.items():
        if name != reference:
            runs = [float(mauve.compute_mauve(p_features=of[reference], q_features=rows, seed=seed).mauve) for seed in SEEDS]
            found[name] = {"value": round(float(np.mean(runs)), 4), "low": round(min(runs), 4), "high": round(max(runs), 4)}
    return found


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("samples", help="what `bench --quality --save` wrote")
    ap.add_argument("--reference", required=True, help="name of the row that the others are held against")
    ap.add_argument("--judge", default=os.path.join(ROOT, "models", "redraft-judge"))
    args = ap.parse_args()
    for name, score in scores(args.samples, args.judge, args.reference).items():
        print(f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})  {name}")


if __name__ == "__main__":
    main()
