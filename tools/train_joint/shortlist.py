"""What a shortlist costs a joint sampler: how much of its answers lies outside the model's own N most probable ids.

  python tools/train_joint/shortlist.py --model MODEL --sampler MODEL/joint --full full.jsonl --block 4:block4.jsonl

Windows of the trajectories that train.py holds out. At pass j of the sampler, at every position that is still masked, p is the sampler's answer over all
ids and S are the N ids with the highest logits of the model's own row at the window's first state: what `shortlist=N` lets the pass choose among. Then p
becomes p / p(S) on S, and the total variation between the two is 1 - p(S), the mass outside: one number for both. Columns: pass, N, its mean over
the positions, its 99th percentile, its mean over the tenth of the positions where p has the lowest entropy (a pass reveals one of those), and
the share of positions whose most probable id is not listed, where decoding at temperature 0 may change.
"""
import argparse
import pathlib

import numpy as np
import torch

from train import Blocks, Full, Trajectories  # first: the sampler's module puts the directory of another train.py in front
from sampler import Base, Sampler


class Recorded:
    """A base that keeps the distributions it is asked for."""

    def __init__(self, base):
        self.base, self.seen = base, []

    def __getattr__(self, name):
        return getattr(self.base, name)

    def log_probs(self, rows):
        self.seen.append(self.base.log_probs(rows))
        return self.seen[-1]


def entropy(log_probs):
    return -torch.where(log_probs > -torch.inf, log_probs.exp() * log_probs, 0.0).sum(-1)


def outside(own, answer, sizes):
    """For each N: the mass of `answer` (rows, V) outside the N highest of `own`, and whether its most probable id is outside. Ties to the lower id."""
    order = own.sort(dim=-1, descending=True, stable=True).indices
    mass = answer.exp().gather(-1, order).double().cumsum(-1)
    rank = (order == answer.argmax(-1, keepdim=True)).int().argmax(-1)
    return {n: ((1 - mass[:, min(n, mass.shape[1]) - 1]).clamp(min=0), rank >= n) for n in sizes}


def measure(kind, sampler, calls, size, batches, sizes):
    """({N: (mass outside, whether the most probable id is)}, entropies), over all positions of pass `calls`."""
    kind.base, base = Recorded(kind.base), kind.base
    entropies = []
    rng, found = np.random.default_rng(1), {n: ([], []) for n in sizes}
    with torch.no_grad():
        for _ in range(batches):
            kind.base.seen.clear()
            _, marginal = kind.losses(sampler, rng, size, calls, "held")
            marginal()
            # The target, the sampler's answer, and the model's own answer at the window's first state.
            _, answer, own = kind.base.seen
            entropies.append(entropy(answer))
            for n, values in outside(own, answer, sizes).items():
                for all_values, value in zip(found[n], values):
                    all_values.append(value)
    kind.base = base
    return {n: tuple(torch.cat(values) for values in pair) for n, pair in found.items()}, torch.cat(entropies)


def main():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--model", type=pathlib.Path, required=True, help="BD3-LM directory")
    parse.add_argument("--sampler", type=pathlib.Path, required=True, help="directory of the sampler")
    parse.add_argument("--full", action="append", default=[], metavar="TRACE", help="as train.py")
    parse.add_argument("--block", action="append", default=[], metavar="LENGTH:TRACE", help="as train.py")
    parse.add_argument("--sizes", default="8,16,32,64,128,256,512,1024", help="values of N")
    parse.add_argument("--batch", type=int, default=16, help="texts at a time")
    parse.add_argument("--batches", type=int, default=4)
    parse.add_argument("--threads", type=int, default=2)
    parse.add_argument("--device", default="cpu", help="cpu or cuda")
    o = parse.parse_args()
    torch.set_num_threads(o.threads)
    sizes = [int(n) for n in o.sizes.split(",")]
    base = Base(o.model).to(o.device)
    kinds = [Full(Trajectories(path, base), base, 0) for path in o.full]
    for item in o.block:
        length, _, path = item.partition(":")
        kinds.append(Blocks(Trajectories(path, base), base, int(length), 0))
    if not kinds:
        parse.error("no trajectories: expected --full or --block")
    sampler = Sampler(base).to(o.device)
    sampler.load(o.sampler)
    for kind in kinds:
        print(f"{kind.name}, {len(kind.data.rows['held'])} texts held out")
        print(f"{'pass':>4} {'N':>5} {'outside':>9} {'p99':>9} {'surest tenth':>13} {'most probable off':>18}")
        for calls in range(1, max(kind.calls) + 1):
            found, entropies = measure(kind, sampler, calls, o.batch, o.batches, sizes)
            surest = entropies.argsort()[: -(-len(entropies) // 10)]
            for n, (mass, off) in found.items():
                columns = f"{mass.mean():>9.5f} {mass.quantile(0.99):>9.5f} {mass[surest].mean():>13.5f} {off.double().mean():>18.5f}"
                print(f"{calls:>4} {n:>5} {columns}", flush=True)


if __name__ == "__main__":
    main()
