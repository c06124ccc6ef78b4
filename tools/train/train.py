#!/usr/bin/env python3
"""Train a small mix-scale block-diffusion model on CPU cores and export it.

    python3 prepare.py CORPUS WORK/data
    python3 train.py --data WORK/data --out WORK/run --export ../../models/NAME --minutes 95 --workers 2

Every step holds one micro-batch of full-attention sequences and one of a small block size, in the token shares of
`--mix`. One process per core, gradients averaged with gloo. `--out` receives log.jsonl, losses.svg and
checkpoint.pt; a second call with the same arguments continues from the checkpoint.
"""
import argparse
import datetime
import json
import math
import os
import socket
import time

# One thread per worker: thread barriers collapse as soon as anything else runs on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model import Backbone, mask_blocks, mask_full, masked_loss

# Columns of the held-out table: name, block (None = full), mask count per block or mask rate.
EVAL_COLUMNS = [
    ("f.05", None, 0.05), ("f.15", None, 0.15), ("f.35", None, 0.35), ("f.60", None, 0.60), ("f.90", None, 0.90),
    ("b4m1", 4, 1), ("b4m2", 4, 2), ("b4m3", 4, 3), ("b4m4", 4, 4), ("b16m8", 16, 8),
]


def parse_mix(text):
    """`full:0.55,4:0.37,16:0.08` (braces allowed) -> {None: 0.55, 4: 0.37, 16: 0.08}, shares summing to 1."""
    mix = {}
    for item in text.strip("{} ").split(","):
        block, weight = item.split(":")
        mix[None if block.strip() == "full" else int(block)] = float(weight)
    total = sum(mix.values())
    return {b: w / total for b, w in mix.items()}


def parse_ranges(text):
    """`0.05-0.6:0.75,0.6-1:0.25` -> [(0.05, 0.6, 0.75), (0.6, 1.0, 0.25)]."""
    ranges = []
    for item in text.split(","):
        span, _, prob = item.partition(":")
        low, high = span.split("-")
        ranges.append((float(low), float(high), float(prob or 1)))
    return ranges


# ---- data --------------------------------------------------------------------------------------------------------

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


# ---- optimiser ---------------------------------------------------------------------------------------------------

def orthogonalize(g, steps=5):
    """Newton-Schulz: pushes the singular values of each matrix of the stack [N, r, c] (r <= c) towards 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.float()


class Muon:
    """Momentum + orthogonalised update for the matrices inside the blocks, stacked by shape to save calls."""

    def __init__(self, model, momentum=0.95, weight_decay=0.01):
        self.momentum, self.weight_decay = momentum, weight_decay
        self.params = [p for b in model.blocks for p in
                       (b.attn_qkv.weight, b.attn_out.weight, b.mlp[0].weight, b.mlp[2].weight)]
        self.buffers = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, lr):
        torch._foreach_mul_(self.buffers, self.momentum)
        torch._foreach_add_(self.buffers, [p.grad for p in self.params])
        squares, wide = [], []  # [d, d] pieces and [d, 4d] pieces
        targets_square, targets_wide = [], []
        for p, buffer in zip(self.params, self.buffers):
            g = p.grad + self.momentum * buffer  # Nesterov
            rows, cols = p.shape
            p.mul_(1 - lr * self.weight_decay)
            if rows == 3 * cols:  # QKV: three separate squares
                for piece, target in zip(g.chunk(3), p.chunk(3)):
                    squares.append(piece)
                    targets_square.append(target)
            elif rows == cols:
                squares.append(g)
                targets_square.append(p)
            elif rows > cols:  # tall: transposed, and a step larger by sqrt(rows / cols)
                wide.append(g.T)
                targets_wide.append((p.T, (rows / cols) ** 0.5))
            else:
                wide.append(g)
                targets_wide.append((p, 1.0))
        for target, update in zip(targets_square, orthogonalize(torch.stack(squares))):
            target.add_(update, alpha=-lr)
        for (target, factor), update in zip(targets_wide, orthogonalize(torch.stack(wide))):
            target.add_(update, alpha=-lr * factor)


# ---- evaluation --------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, data, args, rank, world, count):
    """Held-out loss per masked token for every column; the workers share the sequences. Fixed seed: comparable."""
    rng = np.random.default_rng(args.seed + 1000)
    sequences = Sampler(data, args, True, rng).batch(count, args.length)[rank::world]
    rng = np.random.default_rng(args.seed + 2000 + rank)
    sums = torch.zeros(len(EVAL_COLUMNS) + 1)
    for column, (_, block, level) in enumerate(EVAL_COLUMNS):
        for batch in sequences.split(8):
            if block is None:
                masked, weight = mask_full(rng, len(batch), args.length, None, rate=level)
            else:
                masked, weight = mask_blocks(rng, len(batch), args.length, block, count=level)
            sums[column] += masked_loss(model, batch, masked, weight, block, args.bf16) * len(batch)
    sums[-1] = len(sequences)
    if world > 1:
        dist.all_reduce(sums)
    return {name: round(float(s / sums[-1]), 4) for (name, _, _), s in zip(EVAL_COLUMNS, sums)}


# ---- run ---------------------------------------------------------------------------------------------------------

class Clock:
    """Training progress in [0, 1], by steps or by time.

    Time counts only while the run makes progress: a step that took far longer than usual (the process was stopped)
    counts for `cap` seconds. A deadline, if given, still holds: the remaining schedule shrinks to fit before it.
    """

    def __init__(self, args):
        self.args, self.active, self.last, self.cap = args, 0.0, time.time(), 10.0
        self.deadline = None
        if args.deadline:
            hour, minute = map(int, args.deadline.split(":"))
            now = datetime.datetime.now()
            end = now.replace(hour=hour, minute=minute, second=0)
            self.deadline = (end if end > now else end + datetime.timedelta(days=1)).timestamp()

    def tick(self):
        now = time.time()
        self.active += min(now - self.last, self.cap)
        self.last = now

    def skip(self):
        """Leave the time since the last tick (evaluation, export) out of the schedule."""
        self.last = time.time()

    def progress(self, step):
        if self.args.steps:
            return step / self.args.steps
        remaining = self.args.minutes * 60 - self.active
        if self.deadline:
            remaining = min(remaining, self.deadline - time.time())
        return self.active / max(self.active + remaining, 1e-9) if remaining > 0 else 1.0


def learning_rate_factor(step, progress, args):
    """Linear warm-up, then cosine to 2 %."""
    warm = min(1.0, (step + 1) / args.warmup)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def save_atomically(state, path):
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)


def worker(rank, world, port, args):
    torch.set_num_threads(1)
    if world > 1:
        # A long timeout: a stopped (SIGSTOP) worker must not make the other one fail.
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
                                timeout=datetime.timedelta(hours=12))
    with np.load(os.path.join(args.data, "data.npz")) as archive:
        data = {k: archive[k] for k in archive.files}
    vocab = json.load(open(os.path.join(args.data, "prepare.json")))["vocab_size"]
    mix, full_ranges = parse_mix(args.mix), parse_ranges(args.full_range)
    small_low, small_high, _ = parse_ranges(args.small_range)[0]

    torch.manual_seed(args.seed)  # the same weights in every worker
    model = Backbone(vocab, args.dim, args.blocks, args.dim // 64, args.length)
    if args.compile:
        model.compile_blocks()
    params = list(model.parameters())
    ema = [p.detach().clone() for p in params]
    muon = Muon(model)
    in_muon = {id(p) for p in muon.params}
    rest = [p for p in params if id(p) not in in_muon]
    adam = torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    # All gradients live in one flat buffer, so averaging is a single call; the last entry carries the progress.
    flat = torch.zeros(sum(p.numel() for p in params) + 1)
    offset = 0
    for p in params:
        p.grad = flat[offset:offset + p.numel()].view_as(p)
        offset += p.numel()

    clock, step, tokens = Clock(args), 0, 0
    sampler_seed = [args.seed, rank, 0]
    checkpoint = os.path.join(args.out, "checkpoint.pt")
    if os.path.exists(checkpoint):
        saved = torch.load(checkpoint, weights_only=False)
        for p, s, e, se in zip(params, saved["params"], ema, saved["ema"]):
            p.data.copy_(s)
            e.copy_(se)
        for b, s in zip(muon.buffers, saved["muon"]):
            b.copy_(s)
        adam.load_state_dict(saved["adam"])
        step, tokens, clock.active = saved["step"], saved["tokens"], saved["active"]
        args._reports = saved["reports"]
        sampler_seed[2] = step  # new draws, not the first ones again
    rng = np.random.default_rng(sampler_seed)
    sampler = Sampler(data, args, False, rng)
    small = {b: w for b, w in mix.items() if b is not None}
    full_share = mix.get(None, 0.0)

    if rank == 0:
        os.makedirs(args.out, exist_ok=True)
        print(f"{sum(p.numel() for p in params):,} parameters, mix {mix}, {world} worker(s), step {step}", flush=True)

    def log(record):
        if rank == 0:
            with open(os.path.join(args.out, "log.jsonl"), "a") as f:
                f.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)

    def with_ema(action):
        """Run `action` with the averaged weights in the model."""
        kept = [p.detach().clone() for p in params]
        for p, e in zip(params, ema):
            p.data.copy_(e)
        try:
            return action()
        finally:
            for p, k in zip(params, kept):
                p.data.copy_(k)

    def report(final=False):
        """Held-out table, checkpoint, export. Not counted as training time."""
        clock.tick()
        table = with_ema(lambda: evaluate(model, data, args, rank, world, args.eval_sequences * (4 if final else 1)))
        log({"eval": table, "step": step, "minutes": round(clock.active / 60, 2), "tokens": tokens, "final": final})
        if rank == 0:
            save_atomically({"params": [p.detach() for p in params], "ema": ema, "muon": muon.buffers,
                             "adam": adam.state_dict(), "step": step, "tokens": tokens, "active": clock.active,
                             "reports": args._reports,
                             "config": model.config, "args": vars(args)}, checkpoint)
            if args.export:
                from export import export_directory
                names = [n for n, _ in model.named_parameters()]
                export_directory(dict(zip(names, ema)), model.config, args.export,
                                 os.path.join(args.data, "tokenizer.json"), args.export_dtype)
            try:
                from plot import plot_log
                plot_log(os.path.join(args.out, "log.jsonl"), os.path.join(args.out, "losses.svg"))
            except Exception as error:  # a plot is never worth a training run
                print("plot failed:", error, flush=True)
        clock.skip()

    clock.skip()
    progress, next_report, next_log = clock.progress(step), clock.active + args.first_report * 60, 0
    losses = {}
    while progress < 1:
        length = args.short_length if progress < args.short_share else args.length
        sequences = max(1, round(args.batch_tokens / world / length))
        full_count = round(sequences * full_share)
        small_count = sequences - full_count if small else 0
        flat.zero_()
        if full_count:
            batch = sampler.batch(full_count, length)
            loss = masked_loss(model, batch, *mask_full(rng, full_count, length, full_ranges), None, args.bf16)
            (loss * (full_count / sequences)).backward()
            losses.setdefault("full", []).append(loss.item())
        if small_count:
            block = int(rng.choice(list(small), p=np.array(list(small.values())) / sum(small.values())))
            batch = sampler.batch(small_count, length)
            noise = mask_blocks(rng, small_count, length, block, small_low, small_high)
            loss = masked_loss(model, batch, *noise, block, args.bf16)
            (loss * (small_count / sequences)).backward()
            losses.setdefault(f"b{block}", []).append(loss.item())

        # Rank 0 decides how far the run is; everybody learns it with the gradients.
        clock.tick()
        flat[-1] = (clock.progress(step + 1) if rank == 0 else 0.0) * world
        if world > 1:
            dist.all_reduce(flat)
            flat /= world
        progress = float(flat[-1])
        flat[-1] = 0
        norm = float(flat.norm())
        if not math.isfinite(norm):
            raise RuntimeError("gradient is not finite; the last checkpoint is intact")
        factor = learning_rate_factor(step, progress, args)
        if norm > args.clip:
            flat *= args.clip / norm
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * factor
        adam.step()
        muon.step(args.muon_lr * factor)
        step += 1
        tokens += sequences * length * world
        decay = min(args.ema, (1 + step) / (10 + step))  # the first averages forget the start quickly
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - decay)

        if step >= next_log:
            log({"step": step, "minutes": round(clock.active / 60, 2), "progress": round(progress, 4),
                 "tokens": tokens, "lr": round(factor, 4), "grad": round(norm, 3)}
                | {k: round(float(np.mean(v)), 4) for k, v in losses.items()})
            losses, next_log = {}, step + args.log_steps
        # The same decision in every worker: it rests on the shared progress, not on the own clock.
        if args.steps:
            due = step % args.report_steps == 0
        else:
            due = progress >= report_at(args)
        if due and progress < 1:
            args._reports += 1
            report()
    report(final=True)
    if world > 1:
        dist.destroy_process_group()


def report_at(args):
    """Progress at which the next report is due: an early one, then evenly spread."""
    early = args.first_report / args.minutes
    return early if args._reports == 0 else early + args._reports * args.report_minutes / args.minutes


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", required=True, help="folder written by prepare.py")
    ap.add_argument("--out", required=True, help="folder for log, plot and checkpoint")
    ap.add_argument("--export", help="model directory to write (also at every report)")
    ap.add_argument("--export-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    ap.add_argument("--dim", type=int, default=256)
    ap.add_argument("--blocks", type=int, default=6)
    ap.add_argument("--length", type=int, default=256)
    ap.add_argument("--short-length", type=int, default=128, help="length of the first phase")
    ap.add_argument("--short-share", type=float, default=0.0, help="share of the run spent in the first phase")
    ap.add_argument("--mix", default="full:0.55,4:0.37,16:0.08", help="block sizes and their shares of the tokens")
    ap.add_argument("--full-range", default="0.05-0.6:0.75,0.6-1:0.25", help="mask rates of full attention")
    ap.add_argument("--small-range", default="0-1", help="mask rates of small blocks (clipped to whole counts)")
    ap.add_argument("--main-parts", default="stories")
    ap.add_argument("--other-parts", default="tales,children")
    ap.add_argument("--main-share", type=float, default=0.8)
    ap.add_argument("--doc-start-share", type=float, default=0.6)
    ap.add_argument("--batch-tokens", type=int, default=5632, help="tokens per step, all workers together")
    ap.add_argument("--minutes", type=float, default=95, help="training time (stopped time does not count)")
    ap.add_argument("--deadline", help="HH:MM, local time: finish by then whatever happens")
    ap.add_argument("--steps", type=int, help="number of steps, instead of --minutes")
    ap.add_argument("--warmup", type=int, default=40)
    ap.add_argument("--muon-lr", type=float, default=0.02)
    ap.add_argument("--adam-lr", type=float, default=3e-3)
    ap.add_argument("--clip", type=float, default=1.0)
    ap.add_argument("--ema", type=float, default=0.998)
    ap.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    ap.add_argument("--compile", action="store_true", help="torch.compile the blocks (needs a C++ compiler)")
    ap.add_argument("--workers", type=int, default=os.cpu_count())
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--log-steps", type=int, default=25)
    ap.add_argument("--first-report", type=float, default=6, help="minutes until the first report")
    ap.add_argument("--report-minutes", type=float, default=10)
    ap.add_argument("--report-steps", type=int, default=500, help="with --steps: steps between reports")
    ap.add_argument("--eval-sequences", type=int, default=64)
    args = ap.parse_args()
    args._reports = 0
    os.makedirs(args.out, exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    if args.workers == 1:
        worker(0, 1, port, args)
    else:
        mp.spawn(worker, (args.workers, port, args), nprocs=args.workers)


if __name__ == "__main__":
    main()
