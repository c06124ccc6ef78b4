"""The token array of prepare.py as training sequences, drawn on the device that trains."""
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


def seeded(device, *seed):
    """A generator on `device`, seeded by whole numbers; each kind of device makes its own draws."""
    state = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)  # 63 bits: what manual_seed takes


class Stream:
    """Documents of some parts in shuffled order, end to end; each begins with `<|endoftext|>`.

    Tokens and draws stay on the generator's device and nothing waits for it. Tokens are int32,
    twice (as given and shuffled): 8 bytes a token, 260 MB for 32 million.
    """

    def __init__(self, data, parts, heldout, generator):
        names = data["parts"].tolist()
        unknown = sorted(set(parts) - set(names))
        if unknown:
            raise SystemExit(f"data.npz: no part {', '.join(unknown)}; expected some of {', '.join(names)}")
        self.name, self.generator, self.device = ",".join(parts), generator, generator.device
        wanted = np.isin(data["doc_part"], [names.index(p) for p in parts]) & (data["doc_heldout"] == heldout)
        if not wanted.any():
            raise SystemExit(f"data.npz: parts {self.name} have no {'held-out' if heldout else 'training'} documents")
        lengths = np.diff(data["doc_start"])
        documents = data["tokens"][np.repeat(wanted, lengths)].astype(np.int32)
        self.size = len(documents)
        self.documents = torch.from_numpy(documents).to(self.device)
        self.lengths = torch.from_numpy(lengths[wanted]).to(self.device)
        self.first = self.lengths.cumsum(0) - self.lengths
        self.shuffle()

    def shuffle(self):
        order = torch.randperm(len(self.lengths), generator=self.generator, device=self.device)
        lengths = self.lengths[order]
        self.starts = lengths.cumsum(0) - lengths
        # A token comes from as far behind its document's old start as it lies behind the new one.
        moved = torch.repeat_interleave(self.first[order] - self.starts, lengths, output_size=self.size)
        self.tokens = self.documents[moved + torch.arange(self.size, device=self.device)]
        self.turn = torch.zeros((), dtype=torch.int64, device=self.device)
        self.drawn = 0.0

    def draw(self, chosen, share, length, start_share):
        """Sequences [N, length] (int64): from a document start with probability `start_share`,
        else from anywhere.

        `chosen` [N] (bool): the rows that will be used, a part `share` of them on average; only
        those take a turn.
        """
        if self.size < length:
            raise SystemExit(f"parts {self.name}: {self.size} tokens, fewer than one sequence of {length}")
        if self.drawn > self.size:
            self.shuffle()  # new neighbours once about everything has been seen
        self.drawn += share * len(chosen) * length
        at_start = torch.rand(len(chosen), generator=self.generator, device=self.device) < start_share
        anywhere = torch.randint(self.size, (len(chosen),), generator=self.generator, device=self.device)
        # Document starts are taken in turn, so all are used equally often.
        turns = self.turn + (at_start & chosen).cumsum(0)
        self.turn = turns[-1]
        at = torch.where(at_start, self.starts[(turns - 1) % len(self.starts)], anywhere)
        at = at.clamp(max=self.size - length)
        return self.tokens[at[:, None] + torch.arange(length, device=self.device)].long()


class Sampler:
    """Mixes a main stream with a second one; both draw from `generator`, on its device."""

    def __init__(self, data, args, heldout, generator):
        self.generator, self.share, self.start_share = generator, args.main_share, args.doc_start_share
        self.main = Stream(data, args.main_parts.split(","), heldout, generator)
        self.other = Stream(data, args.other_parts.split(","), heldout, generator) if self.share < 1 else None

    def batch(self, count, length):
        """Sequences [count, length], int64."""
        main = torch.rand(count, generator=self.generator, device=self.generator.device) < self.share
        rows = self.main.draw(main, self.share, length, self.start_share)
        if self.other is None:
            return rows
        return torch.where(main[:, None], rows, self.other.draw(~main, 1 - self.share, length, self.start_share))
