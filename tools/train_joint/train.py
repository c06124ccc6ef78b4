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

from sampler import Base, Sampler, joint_masks
from optim import Muon  # noqa: E402, beside the model that the sampler's module finds

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
        # Positions before the first revealed one were given: BOS. Filled on the host, moved as a whole.
        self.tokens = torch.full((self.count, first + length), base.config["bos_token_id"])
        self.when = torch.full((self.count, first + length), -1)
        for row, steps in enumerate(order.values()):
            for step, (position, token) in enumerate(steps):
                self.tokens[row, position], self.when[row, position] = token, step
        self.tokens, self.when = self.tokens.to(base.device), self.when.to(base.device)
        held = max(1, self.count // 50)
        self.rows = {"train": np.arange(held, self.count), "held": np.arange(held)}

    def draw(self, rng, size, part):
        """(texts [size], their tokens, and when each position was revealed)."""
        texts = torch.from_numpy(rng.choice(self.rows[part], size)).to(self.tokens.device)
        return texts, self.tokens[texts], self.when[texts]


class Kept:
    """The frozen model's final rows at every state of every text, in bf16, on the model's device:
    computed when first asked for, and then kept while they fit."""

    def __init__(self, texts, states, length, base, gib):
        width = base.config["hidden_dim"]
        self.fits = 2 * texts * states * length * width <= gib * 2**30
        self.rows = torch.empty((texts, states, length, width) if self.fits else 0, dtype=torch.bfloat16, device=base.device)
        self.known = torch.zeros(texts, states, dtype=torch.bool, device=base.device)

    def take(self, texts, states, compute):
        """[B, L, D] of `states` [B] of `texts` [B]; `compute` makes those of a boolean selection of them."""
        if not self.fits:
            return compute(torch.ones(len(texts), dtype=torch.bool, device=texts.device))
        missing = ~self.known[texts, states]
        if missing.any():
            self.rows[texts[missing], states[missing]] = compute(missing).bfloat16()
            self.known[texts[missing], states[missing]] = True
        return self.rows[texts, states].float()


class Full:
    """Windows of the whole canvas."""

    def __init__(self, trajectories, base, gib):
        self.data, self.base, self.name = trajectories, base, f"full, length {trajectories.tokens.shape[1]}"
        self.states = int(trajectories.when.max()) + 1
        self.calls = (1, 3, 7)
        self.kept = Kept(trajectories.count, self.states, trajectories.tokens.shape[1], base, gib)

    def losses(self, sampler, rng, size, calls, part="train"):
        """(KL of the sampler, KL of the model's own rows of the window's first state), each averaged over the masked positions."""
        texts, tokens, when = self.data.draw(rng, size, part)
        first = torch.from_numpy(rng.integers(0, self.states - calls, size)).to(texts.device)
        state = lambda j: torch.where(when < (first + j)[:, None], tokens, self.base.mask_id)
        rows = lambda j: self.kept.take(texts, first + j, lambda some: self.base.states(state(j)[some]))
        masked = when >= (first + calls)[:, None]
        start, target = rows(0), self.base.log_probs(rows(calls)[masked])
        h = start
        for call in range(1, calls + 1):
            h = sampler(self.base, state(call), h)
        return divergence(target, self.base.log_probs(h[masked])), lambda: divergence(target, self.base.log_probs(start[masked]))


class Blocks:
    """Windows inside blocks, all blocks of a text at once."""

    def __init__(self, trajectories, base, block, gib):
        self.data, self.base, self.block = trajectories, base, block
        self.name = f"block {block}, length {trajectories.tokens.shape[1]}"
        length = trajectories.tokens.shape[1] // block * block
        self.length, self.masks = length, tuple(mask.to(base.device) for mask in joint_masks(length, block))
        self.calls = range(1, block)
        # A text's states (0 to block - 1 revealed in every block) and then its clean rows lie one behind the other.
        self.kept = Kept(trajectories.count, 1, (block + 1) * length, base, gib)

    def losses(self, sampler, rng, size, calls, part="train"):
        calls = min(calls, self.block - 1)
        texts, *rest = self.data.draw(rng, size, part)
        tokens, when = (t[:, : self.length] for t in rest)
        # Rank of each position within its block, and the state in which the block's window begins.
        shape = (size, self.length // self.block, self.block)
        rank, given = when.view(shape).argsort(-1).argsort(-1).view(size, -1), when < 0
        first = torch.from_numpy(rng.integers(0, self.block - calls, shape[:2])).to(texts.device).repeat_interleave(self.block, 1)
        state = lambda revealed: torch.where((rank < revealed) | given, tokens, self.base.mask_id)
        masked = (rank >= first + calls) & ~given

        def compute(some):
            noisy, clean = self.base.block_states([state(revealed)[some] for revealed in range(self.block)], tokens[some], self.masks)
            return torch.cat((*noisy, clean), 1)

        rows = self.kept.take(texts, torch.zeros_like(texts), compute).view(size, self.block + 1, self.length, -1)
        each, position = torch.arange(size, device=texts.device)[:, None], torch.arange(self.length, device=texts.device)
        at = lambda revealed: rows[each, revealed, position]
        start, target = at(first), self.base.log_probs(at(first + calls)[masked])
        h, prefix = start, sampler.prefix(self.base, tokens, rows[:, -1])
        for call in range(1, calls + 1):
            h = sampler.in_blocks(self.base, state(first + call), h, prefix, self.masks)
        return divergence(target, self.base.log_probs(h[masked])), lambda: divergence(target, self.base.log_probs(start[masked]))


def divergence(target, found):
    """Mean over rows of KL(target || found), nats; what is never drawn has no part in it."""
    terms = target.exp() * (target - found)
    return torch.where(target > -torch.inf, terms, 0.0).sum(-1).mean()


def heldout(kinds, sampler, size):
    """Lines of (kind, calls, KL of the sampler, KL of rows that do not know what was revealed)."""
    rows = []
    with torch.no_grad():
        for kind in kinds:
            for calls in kind.calls:
                rng = np.random.default_rng(1)
                values = [[float(loss), float(marginal())] for loss, marginal in (kind.losses(sampler, rng, size, calls, "held") for _ in range(4))]
                rows.append((kind.name, calls, *np.mean(values, 0).tolist()))
    return rows


def main():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--model", type=pathlib.Path, required=True, help="BD3-LM directory")
    parse.add_argument("--full", action="append", default=[], metavar="TRACE", help="texts revealed one token a forward under full attention; may be repeated")
    parse.add_argument("--block", action="append", default=[], metavar="LENGTH:TRACE", help="the same of block drafts; may be repeated")
    parse.add_argument("--out", type=pathlib.Path, required=True, help="directory of the sampler")
    parse.add_argument("--minutes", type=float, default=60, help="the learning rate ends with them")
    parse.add_argument("--batch", type=int, default=16)
    parse.add_argument("--muon-lr", type=float, default=0.02, help="of the matrices")
    parse.add_argument("--adam-lr", type=float, default=3e-3, help="of norms and biases")
    parse.add_argument("--warmup", type=int, default=50)
    parse.add_argument("--init", type=pathlib.Path, help="directory of a sampler to go on from")
    parse.add_argument("--look", type=float, default=10, help="minutes between looks at what was held out")
    parse.add_argument("--keep", type=float, default=12, metavar="GIB", help="most memory for the model's rows of one kind of windows")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--threads", type=int, default=2)
    parse.add_argument("--bf16", action="store_true", help="products in bf16")
    parse.add_argument("--device", default="cpu", help="cpu or cuda; there the model's rows are kept, too (--keep)")
    o = parse.parse_args()
    if o.device != "cpu" and not torch.cuda.is_available():
        parse.error(f"--device {o.device}: no GPU that torch {torch.__version__} can use")
    torch.set_num_threads(o.threads)
    torch.manual_seed(o.seed)
    rng, base = np.random.default_rng(o.seed), Base(o.model).to(o.device)
    kinds = [Full(Trajectories(path, base), base, o.keep) for path in o.full]
    for item in o.block:
        length, _, path = item.partition(":")
        kinds.append(Blocks(Trajectories(path, base), base, int(length), o.keep))
    if not kinds:
        parse.error("no trajectories: expected --full or --block")
    sampler = Sampler(base).to(o.device)  # initialised on the host: the same weights on every device
    print(f"{sum(p.numel() for p in sampler.parameters()):,} parameters; " + ", ".join(f"{k.name}: {k.data.count} texts" for k in kinds), flush=True)
    if o.init:
        sampler.load(o.init)
    muon = Muon(sampler.matrices(), weight_decay=0.0)
    taken = {id(p) for p in muon.params}
    adam = torch.optim.Adam([p for p in sampler.parameters() if id(p) not in taken], betas=(0.9, 0.99))
    share = np.array([0.5**i for i in range(MOST_CALLS)])
    share = np.exp(share) / np.exp(share).sum()

    def look(step, spent):
        """Measures on what was held out, and writes the sampler as it is."""
        rows = heldout(kinds, sampler, o.batch)
        for name, calls, joint, marginal in rows:
            print(f"{spent:6.1f} min  step {step:6}  held out, {name}, {calls} calls: KL {joint:.4f}, without them {marginal:.4f}", flush=True)
        facts = [{"window": n, "calls": c, "sampler": round(j, 4), "marginal": round(m, 4)} for n, c, j, m in rows]
        sampler.save(o.out, base, {"trained_calls": MOST_CALLS, "steps": step, "heldout_kl_nats": facts})

    start, step, looks = time.time(), 0, 0
    while (spent := (time.time() - start) / 60) < o.minutes:
        if spent >= (looks + 1) * o.look:
            looks += 1
            look(step, spent)
        # Down to a twentieth over the second half.
        rate = min(1.0, (step + 1) / o.warmup) * (1 - 0.95 * max(0.0, spent / o.minutes * 2 - 1))
        kind = kinds[step % len(kinds)]
        with torch.autocast(base.device.type, torch.bfloat16, enabled=o.bf16):
            loss, _ = kind.losses(sampler, rng, o.batch, 1 + int(rng.choice(MOST_CALLS, p=share)))
        sampler.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sampler.parameters(), 1.0)
        muon.step(o.muon_lr * rate)
        adam.param_groups[0]["lr"] = o.adam_lr * rate
        adam.step()
        step += 1
    look(step, spent)


if __name__ == "__main__":
    main()
