"""The token array of prepare.py as streams of training sequences."""
import json
import os

import numpy as np
import torch


def load(folder):
    """-> (arrays of data.npz by name, vocabulary size)."""
    with np.load(os.path.join(folder, "data.npz")) as archive:
        data = {k: archive[k] for k in archive.files}
    with open(os.path.join(folder, "prepare.json")) as f:
        return data, json.load(f)["vocab_size"]


class Stream:
    """Documents of some parts in shuffled order, end to end; each begins with `<|endoftext|>`."""

    def __init__(self, data, parts, heldout, rng):
        names = list(data["parts"])
        wanted = np.isin(data["doc_part"], [names.index(p) for p in parts]) & (data["doc_heldout"] == heldout)
        starts = data["doc_start"]
        self.documents = [data["tokens"][starts[i]:starts[i + 1]] for i in np.flatnonzero(wanted)]
        self.rng = rng
        self.shuffle()

    def shuffle(self):
        order = self.rng.permutation(len(self.documents))
        self.tokens = np.concatenate([self.documents[i] for i in order])
        lengths = np.array([len(self.documents[i]) for i in order])
        self.starts = np.cumsum(lengths) - lengths
        self.next = self.drawn = 0

    def draw(self, length, start_share):
        """One sequence: from a document start with that probability, else from anywhere."""
        if self.drawn > len(self.tokens):
            self.shuffle()  # new neighbours once about everything has been seen
        if self.rng.random() < start_share:
            # Document starts are taken in turn, so all are used equally often.
            at = self.starts[self.next % len(self.starts)]
            self.next += 1
        else:
            at = self.rng.integers(0, len(self.tokens))
        at = min(at, len(self.tokens) - length)
        self.drawn += length
        return self.tokens[at:at + length].astype(np.int64)


class Sampler:
    """Mixes a main stream with a second one."""

    def __init__(self, data, args, heldout, rng):
        self.rng, self.share, self.start_share = rng, args.main_share, args.doc_start_share
        self.main = Stream(data, args.main_parts.split(","), heldout, rng)
        self.other = Stream(data, args.other_parts.split(","), heldout, rng) if self.share < 1 else None

    def batch(self, count, length):
        rows = [
            (self.main if self.rng.random() < self.share else self.other).draw(length, self.start_share)
            for _ in range(count)
        ]
        return torch.from_numpy(np.stack(rows))
