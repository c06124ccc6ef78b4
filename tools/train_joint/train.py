"""Trains a one-layer joint sampler over a frozen BD3-LM, on trajectories that the engine itself made.

  redraft generate --model MODEL --samples 2000 --length 127 --ignore-eos --temperature 1 --top-p 1 \\
      --stage block=full,unmask=entropy:1 --trace full.jsonl > /dev/null
  redraft generate --model MODEL --samples 8000 --length 127 --ignore-eos --temperature 1 --top-p 1 \\
      --stage block=4,unmask=entropy:1 --trace block4.jsonl > /dev/null
  python tools/train_joint/train.py --model MODEL --full full.jsonl --block 4:block4.jsonl --out MODEL/joint --minutes 60

ADJUST (arXiv 2509.22738), as its authors train: a window of a trajectory begins at any state; the frozen model's final rows there are the first
h; call j of the sampler sees the tokens of the j-th state behind it; after n calls, n drawn anew for each batch, the loss is KL(model's own
distribution at that state || sampler's) over the positions still masked. Gradients flow through all calls. For block diffusion all blocks of a text
are trained at once, each behind its own clean prefix, whose sampler inputs come from the model's rows over clean text and never change.
"""
import argparse
import json
import pathlib
import time

import numpy as np
import torch

from sampler import Base, Sampler, block_masks

MOST_CALLS = 7


class Trajectories:
    """Texts with the order in which their positions were revealed; one in fifty is held out."""

    def __init__(self, path, base):
        order = {}
        for line in open(path, encoding="utf-8"):
            event = json.loads(line)
            if event["event"] == "reveal":
                order.setdefault(event["sample"], []).extend(zip(event["positions"], event["tokens"]))
        lengths = {len(steps) for steps in order.values()}
        if len(lengths) != 1:
            raise SystemExit(f"{path}: texts of {sorted(lengths)[:5]} revealed tokens; make them with --ignore-eos, all of one length")
        self.count, length = len(order), lengths.pop()
        first = min(p for p, _ in next(iter(order.values())))
        # Positions before the first revealed one were given: BOS.
        self.tokens = torch.full((self.count, first + length), base.config["bos_token_id"])
        self.when = torch.full((self.count, first + length), -1)
        for row, steps in enumerate(order.values()):
            for step, (position, token) in enumerate(steps):
                self.tokens[row, position], self.when[row, position] = token, step
        held = max(1, self.count // 50)
        self.rows = {"train": np.arange(held, self.count), "held": np.arange(held)}

    def batch(self, rng, size, part="train"):
        rows = torch.from_numpy(rng.choice(self.rows[part], size))
        return self.tokens[rows], self.when[rows]


class Full:
    """Windows of the whole canvas."""

    name = "full"

    def __init__(self, trajectories, base):
        self.data, self.base = trajectories, base

    def losses(self, sampler, rng, size, calls, part="train"):
        """(KL of the sampler, KL of the model's own rows of the window's first state), each averaged over the masked positions."""
        tokens, when = self.data.batch(rng, size, part)
        count = int(when.max()) + 1
        first = torch.from_numpy(rng.integers(0, count - calls, size))[:, None]
        state = lambda j: torch.where(when < first + j, tokens, self.base.mask_id)
        masked = when >= first + calls
        start = self.base.states(state(0))
        target = self.base.log_probs(self.base.states(state(calls))[masked])
        h = start
        for call in range(1, calls + 1):
            h = sampler(self.base, state(call), h)
        return divergence(target, self.base.log_probs(h[masked])), lambda: divergence(target, self.base.log_probs(start[masked]))


class Blocks:
    """Windows inside blocks, all blocks of a text at once."""

    def __init__(self, trajectories, base, block):
        self.data, self.base, self.block, self.name = trajectories, base, block, f"block {block}"
        length = trajectories.tokens.shape[1] // block * block
        self.length, self.masks = length, block_masks(length, block)

    def losses(self, sampler, rng, size, calls, part="train"):
        calls = min(calls, self.block - 1)
        tokens, when = (t[:, : self.length] for t in self.data.batch(rng, size, part))
        # Rank of each position within its block, and the state in which the block's window begins.
        shape = (size, self.length // self.block, self.block)
        rank = when.view(shape).argsort(-1).argsort(-1).view(size, -1)
        first = torch.from_numpy(rng.integers(0, self.block - calls, shape[:2])).repeat_interleave(self.block, 1)
        given = when < 0
        state = lambda j: torch.where((rank < first + j) | given, tokens, self.base.mask_id)
        masked = (rank >= first + calls) & ~given
        start = self.base.joined_states(state(0), tokens, self.masks)
        end = self.base.joined_states(state(calls), tokens, self.masks)[:, : self.length]
        target = self.base.log_probs(end[masked])
        h, clean = start.split(self.length, 1)
        marginal = h
        for call in range(1, calls + 1):
            # Recomputed in each call: the sampler's own weights make it.
            h = sampler.joined(self.base, state(call), h, sampler.inputs(self.base, tokens, clean), self.masks)
        return divergence(target, self.base.log_probs(h[masked])), lambda: divergence(target, self.base.log_probs(marginal[masked]))


def divergence(target, found):
    """Mean over rows of KL(target || found), nats; what is never drawn has no part in it."""
    terms = target.exp() * (target - found)
    return torch.where(target > -torch.inf, terms, 0.0).sum(-1).mean()


def heldout(kinds, sampler, size):
    """Lines of (kind, calls, KL of the sampler, KL of rows that do not know what was revealed)."""
    rows = []
    with torch.no_grad():
        for kind in kinds:
            for calls in (1, 3, 7) if isinstance(kind, Full) else range(1, kind.block):
                rng = np.random.default_rng(1)
                values = [[float(loss), float(marginal())] for loss, marginal in (kind.losses(sampler, rng, size, calls, "held") for _ in range(4))]
                rows.append((kind.name, calls, *np.mean(values, 0).tolist()))
    return rows


def main():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--model", type=pathlib.Path, required=True, help="BD3-LM directory")
    parse.add_argument("--full", type=pathlib.Path, help="trace of texts revealed one token a forward under full attention")
    parse.add_argument("--block", action="append", default=[], metavar="LENGTH:TRACE", help="the same of block drafts; may be repeated")
    parse.add_argument("--out", type=pathlib.Path, required=True, help="directory of the sampler")
    parse.add_argument("--minutes", type=float, default=60, help="the learning rate ends with them")
    parse.add_argument("--batch", type=int, default=16)
    parse.add_argument("--lr", type=float, default=1e-3)
    parse.add_argument("--warmup", type=int, default=100)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--threads", type=int, default=2)
    parse.add_argument("--bf16", action="store_true", help="products in bf16")
    o = parse.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(o.seed)
    rng, base = np.random.default_rng(o.seed), Base(o.model)
    kinds = [Full(Trajectories(o.full, base), base)] if o.full else []
    for item in o.block:
        length, _, path = item.partition(":")
        kinds.append(Blocks(Trajectories(path, base), base, int(length)))
    if not kinds:
        parse.error("no trajectories: expected --full or --block")
    sampler = Sampler(base)
    print(f"{sum(p.numel() for p in sampler.parameters()):,} parameters; " + ", ".join(f"{k.name}: {k.data.count} texts" for k in kinds), flush=True)
    optimiser = torch.optim.AdamW(sampler.parameters(), lr=o.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    share = np.array([0.5**i for i in range(MOST_CALLS)])
    share = np.exp(share) / np.exp(share).sum()
    start, step, seen = time.time(), 0, []
    while (spent := (time.time() - start) / 60) < o.minutes:
        # Constant behind the warm-up, as published, and down to a tenth over the last third.
        fall = max(0.0, (spent / o.minutes - 2 / 3) * 3)
        for group in optimiser.param_groups:
            group["lr"] = o.lr * min(1.0, (step + 1) / o.warmup) * (1 - 0.9 * fall)
        kind = kinds[step % len(kinds)]
        with torch.autocast("cpu", torch.bfloat16, enabled=o.bf16):
            loss, _ = kind.losses(sampler, rng, o.batch, 1 + int(rng.choice(MOST_CALLS, p=share)))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sampler.parameters(), 1.0)
        optimiser.step()
        seen.append(loss.item())
        step += 1
        if step % 200 == 0:
            print(f"{spent:6.1f} min  step {step:6}  KL {np.mean(seen[-200:]):.4f}", flush=True)
    rows = heldout(kinds, sampler, o.batch)
    for name, calls, joint, marginal in rows:
        print(f"held out, {name}, {calls} calls: KL {joint:.4f}, without them {marginal:.4f}")
    facts = {
        "trained_calls": MOST_CALLS,
        "steps": step,
        "heldout_kl_nats": [{"window": n, "calls": c, "sampler": round(j, 4), "marginal": round(m, 4)} for n, c, j, m in rows],
    }
    sampler.save(o.out, base, facts)


if __name__ == "__main__":
    main()
