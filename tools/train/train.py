#!/usr/bin/env python3
"""Train a small mix-scale block-diffusion model on CPU cores or on one GPU, and export it.

    python3 prepare.py CORPUS WORK/data
    python3 train.py --data WORK/data --out WORK/run --export ../../models/NAME --minutes 95 --workers 2
    python3 train.py --data WORK/data --out WORK/run --export NAME --device cuda --stop-after 520 ...

Every step holds one micro-batch of full-attention sequences and one of a small block size, in the token shares of
`--mix`. On a CPU: one process per core, gradients averaged with gloo. On a GPU: one process, which
hands work to the device and waits for it only where it logs. `--out` receives log.jsonl, losses.svg
and checkpoint.pt; a second call with the same arguments continues from the checkpoint.
"""
import time

STARTED = time.time()  # before the imports, which take seconds: `--stop-after` counts from here

import argparse
import datetime
import json
import math
import os
import socket

# One thread per worker: thread barriers collapse as soon as anything else runs on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import data as corpus
from causal import Decoder
from export import MAX_SHARD_MIB, export_directory
from objectives import OBJECTIVES
from optim import Muon
from plot import plot_log

# ---- evaluation --------------------------------------------------------------------------------------------------

def changed(args, **values):
    return argparse.Namespace(**(vars(args) | values))


@torch.no_grad()
def evaluate(objective, data, args, rank, world, count):
    """Held-out loss of every column, in nats per token; the workers share the sequences. Fixed seed: comparable."""
    # Drawn on the CPU, so the sequences and their masks are the same ones on every device.
    if args.heldout_parts:
        args = changed(args, main_parts=args.heldout_parts, main_share=1)
    sampler = corpus.Sampler(data, args, True, corpus.seeded("cpu", args.seed + 1000))
    sequences = sampler.batch(count, args.length)[rank::world]
    generator = corpus.seeded("cpu", args.seed + 2000 + rank)
    sums = torch.zeros(len(objective.columns) + 1)
    objective.model.eval()
    for batch in sequences.split(16):
        sums[:-1] += objective.heldout(batch, generator).cpu() * len(batch)
    objective.model.train()
    sums[-1] = len(sequences)
    if world > 1:
        dist.all_reduce(sums)
    return {name: round(float(s / sums[-1]), 4) for name, s in zip(objective.columns, sums)}


# ---- run ---------------------------------------------------------------------------------------------------------

class Clock:
    """Training progress in [0, 1], by steps or by time.

    Time counts only while the run makes progress: a step that took far longer than usual (the process was stopped)
    counts for `cap` seconds. An end, if given (`--deadline`, `--stop-after`), still holds: the
    remaining schedule shrinks so that the final report is written before it.
    """

    def __init__(self, args):
        self.args, self.active, self.last, self.cap = args, 0.0, time.time(), 10.0
        self.end, self.reserve = math.inf, 0.0  # Unix time; seconds that the final report will take
        if args.deadline:
            hour, minute = map(int, args.deadline.split(":"))
            now = datetime.datetime.now()
            end = now.replace(hour=hour, minute=minute, second=0)
            self.end = (end if end > now else end + datetime.timedelta(days=1)).timestamp()
        if args.stop_after:
            self.end = min(self.end, args.started + args.stop_after)

    def keep(self, evaluating, writing):
        """Reserve what the final report takes: a report's writing, and five times its evaluation.

        Half of it again and some seconds on top: other work on the machine, and the way out of the
        process.
        """
        self.reserve = 1.5 * (5 * evaluating + writing) + 3

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
        remaining = min(self.args.minutes * 60 - self.active, self.end - self.reserve - time.time())
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
    data, vocab = corpus.load(args.data)
    torch.manual_seed(args.seed)  # the same weights in every worker
    objective = OBJECTIVES[args.objective](args, vocab)
    model = objective.model.to(args.device).train()
    if args.init:
        load_into(model, args.init)
    torch.manual_seed(args.seed * 1000 + rank)  # dropout differs
    params = list(model.parameters())
    names = [n for n, _ in model.named_parameters()]
    ema = [p.detach().clone() for p in params]
    best = {"value": math.inf, "step": 0, "weights": [e.clone() for e in ema], "waited": 0}
    muon = Muon(model.matrices())
    in_muon = {id(p) for p in muon.params}
    rest = [p for p in params if id(p) not in in_muon]
    adam = torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    # All gradients live in one flat buffer, so averaging is a single call; the last entry carries the progress.
    flat = torch.zeros(sum(p.numel() for p in params) + 1, device=args.device)
    offset = 0
    for p in params:
        p.grad = flat[offset:offset + p.numel()].view_as(p)
        offset += p.numel()

    clock, step, tokens = Clock(args), 0, 0
    if args.checkpoint and os.path.exists(args.checkpoint):
        saved = torch.load(args.checkpoint, weights_only=False, map_location=args.device)
        for p, s, e, se in zip(params, saved["params"], ema, saved["ema"]):
            p.data.copy_(s)
            e.copy_(se)
        for b, s in zip(muon.buffers, saved["muon"]):
            b.copy_(s)
        adam.load_state_dict(saved["adam"])
        step, tokens, clock.active = saved["step"], saved["tokens"], saved["active"]
        args._reports, best = saved["reports"], saved["best"]
    # With the step in the seed a continued run makes new draws, not the first ones again.
    rng = np.random.default_rng([args.seed, rank, step])
    # While the main parts are still being made (`--then`), the others stand in for them.
    alone = changed(args, main_parts=args.other_parts, main_share=1)
    seeds = args.device, args.seed, rank, step
    sampler = corpus.Sampler(data, alone if args.then else args, False, corpus.seeded(*seeds))

    def choose(shares):
        keys, weights = list(shares), np.array(list(shares.values()))
        return keys[int(rng.choice(len(keys), p=weights / weights.sum()))]

    if rank == 0:
        os.makedirs(args.out, exist_ok=True)
        count = sum(p.numel() for p in params)
        print(f"{count:,} parameters, {objective.describe()}, {world} worker(s), step {step}", flush=True)

    def log(record):
        if rank == 0:
            with open(os.path.join(args.out, "log.jsonl"), "a") as f:
                f.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)

    def table(weights, count):
        """The held-out table of other weights than the current ones."""
        kept = [p.detach().clone() for p in params]
        for p, w in zip(params, weights):
            p.data.copy_(w)
        values = evaluate(objective, data, args, rank, world, count)
        for p, k in zip(params, kept):
            p.data.copy_(k)
        return values

    def settle():
        """Wait for the device, once; -> (norm of the last gradient, mean losses since the last log)."""
        if not norms:
            return 0.0, {}
        means = [torch.stack(values).mean() for values in losses.values()]
        last, total, *means = torch.stack([norms[-1], torch.stack(norms).sum(), *means]).tolist()
        if not math.isfinite(total):
            raise RuntimeError("a gradient since the last log is not finite; the last export and checkpoint are intact")
        return last, dict(zip(losses, means))

    def warm_up():
        """Compile for every shape of the run, before its clock starts; where that fails, train without."""
        model.compile_blocks()
        try:
            for length in {args.length, args.short_length if args.short_share else args.length}:
                for form in objective.forms:
                    for _, _, loss in objective.losses(lambda shares: form, sampler, sequences_of(length), length):
                        loss.backward()
                        loss.item()  # wait: what fails on the device must fail here
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            model.uncompile_blocks()
            print(f"compilation failed, training goes on without, slower: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"worker {rank}: compiled {time.time() - args.started:.0f} s after the start", flush=True)

    def sequences_of(length):
        """Sequences of a step in this worker."""
        return max(1, round(args.batch_tokens / world / length))

    def report(final=False, opening=False):
        """Held-out table, checkpoint, export of the best averaged weights so far. Not counted as training time."""
        if not opening:
            settle()
            clock.tick()
        began = time.time()
        values = table(ema, args.eval_sequences)
        evaluated = time.time()
        value = sum(values[c] for c in objective.columns) / len(values)
        if value < best["value"]:
            best.update(value=value, step=step, weights=[e.clone() for e in ema], waited=0)
        elif not opening:
            best["waited"] += 1
        record = {"eval": values, "step": step, "minutes": round(clock.active / 60, 2), "tokens": tokens}
        log(record | {"best": best["step"]})
        if rank == 0:
            if args.checkpoint:
                save_atomically({"params": [p.detach() for p in params], "ema": ema, "muon": muon.buffers,
                                 "adam": adam.state_dict(), "step": step, "tokens": tokens, "active": clock.active,
                                 "reports": args._reports, "best": best,
                                 "config": model.config, "args": vars(args)}, args.checkpoint)
            if args.export:
                export_directory(objective.layout, dict(zip(names, best["weights"])), model.config, args.export,
                                 os.path.join(args.data, "tokenizer.json"), args.export_dtype,
                                 max_shard_mib=args.max_shard_mib)
            if args.plot:
                try:
                    plot_log(os.path.join(args.out, "log.jsonl"), os.path.join(args.out, "losses.svg"))
                except Exception as error:  # a plot is never worth a training run
                    print("plot failed:", error, flush=True)
        clock.keep(evaluated - began, time.time() - evaluated)
        if final:  # more sequences, for the card; other ones, so not to be compared with the rows above
            log({"final": table(best["weights"], 4 * args.eval_sequences), "step": best["step"]})
        clock.skip()
        return bool(args.patience) and best["waited"] >= args.patience

    losses, norms = {}, []  # since the last log, on the device: losses by name, norms of the gradient
    if args.compile:
        warm_up()
    if math.isfinite(clock.end):
        # Shows that everything can be written before time is spent on it, and how long that takes.
        report(opening=True)
    if args.then:
        data, whole = awaited(args, data)
        sampler = corpus.Sampler(data, args if whole else alone, False, corpus.seeded(*seeds))
    clock.skip()
    progress, next_log = clock.progress(step), 0
    if progress >= 1 and math.isfinite(clock.end) and not step:
        raise SystemExit(f"no time to train: {time.time() - args.started:.0f} s went into the start and "
                         f"{clock.reserve:.0f} s are kept for the end; expected a later --stop-after or --deadline")
    while progress < 1:
        length = args.short_length if progress < args.short_share else args.length
        sequences = sequences_of(length)
        flat.zero_()
        for name, share, loss in objective.losses(choose, sampler, sequences, length):
            (loss * share).backward()
            losses.setdefault(name, []).append(loss.detach())

        clock.tick()
        progress = clock.progress(step + 1)
        if world > 1:
            # Rank 0 decides how far the run is; the others learn it with the gradients.
            flat[-1] = progress * world if rank == 0 else 0.0
            dist.all_reduce(flat)
            flat /= world
            progress = float(flat[-1])
            flat[-1] = 0
        norms.append(flat.norm())
        flat *= (args.clip / norms[-1]).clamp(max=1)
        factor = learning_rate_factor(step, progress, args)
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
            norm, means = settle()
            log({"step": step, "minutes": round(clock.active / 60, 2), "progress": round(progress, 4),
                 "tokens": tokens, "lr": round(factor, 4), "grad": round(norm, 3)}
                | {k: round(v, 4) for k, v in means.items()})
            losses, norms, next_log = {}, [], step + args.log_steps
        # The same decision in every worker: it rests on the shared progress, not on the own clock.
        if args.steps:
            due = step % args.report_steps == 0
        else:
            due = progress >= report_at(args)
        if due and progress < 1:
            args._reports += 1
            if report():
                log({"stopped": f"no better held-out loss in {args.patience} reports", "step": step})
                break
    report(final=True)
    if rank == 0:
        print(f"finished {time.time() - args.started:.0f} s after the start", flush=True)
    if world > 1:
        dist.destroy_process_group()


def awaited(args, data):
    """The data of `--then` once it is there; -> (data, whether it has the main parts)."""
    path = os.path.join(args.then, "data.npz")
    until = args.started + args.then_within
    while not os.path.exists(path) and time.time() < until:
        time.sleep(0.1)
    if not os.path.exists(path):
        print(f"no {path} in time: training on {args.other_parts} alone", flush=True)
        return data, False
    data, _ = corpus.load(args.then)
    index = [data["parts"].tolist().index(p) for p in args.main_parts.split(",")]
    size = int(np.diff(data["doc_start"])[np.isin(data["doc_part"], index)].sum())
    print(f"{args.main_parts}: {size} tokens, {time.time() - args.started:.0f} s after the start", flush=True)
    return data, size >= 64 * args.length


def load_into(model, folder):
    """Start from the weights of an exported directory of the same kind."""
    from sample import load_exported, load_judge

    read = load_judge(folder) if isinstance(model, Decoder) else load_exported(folder)[0]
    model.load_state_dict(read.state_dict())


def report_at(args):
    """Progress at which the next report is due: an early one, then evenly spread."""
    early = args.first_report / args.minutes
    return early if args._reports == 0 else early + args._reports * args.report_minutes / args.minutes


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", required=True, help="folder written by prepare.py")
    ap.add_argument("--out", required=True, help="folder for log, plot and checkpoint")
    ap.add_argument("--objective", default="diffusion", choices=sorted(OBJECTIVES),
                    help="diffusion: the model; causal: an autoregressive judge")
    ap.add_argument("--init", help="exported model to start from, instead of random weights")
    ap.add_argument("--device", default="cpu", help="cpu, or cuda with --workers 1")
    ap.add_argument("--checkpoint", help="file to continue from and to write at every report, or `none`; "
                    "default: checkpoint.pt in --out")
    ap.add_argument("--patience", type=int, default=0,
                    help="stop after so many reports without a better held-out loss; 0: run to the end")
    ap.add_argument("--dropout", type=float, default=0.1, help="of --objective causal")
    ap.add_argument("--export", help="model directory to write (also at every report)")
    ap.add_argument("--max-shard-mib", type=float, default=MAX_SHARD_MIB, help="largest file of weights, in MiB")
    ap.add_argument("--export-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    ap.add_argument("--dim", type=int, default=256)
    ap.add_argument("--blocks", type=int, default=6)
    ap.add_argument("--length", type=int, default=256)
    ap.add_argument("--short-length", type=int, default=128, help="length of the first phase")
    ap.add_argument("--short-share", type=float, default=0.0, help="share of the run spent in the first phase")
    ap.add_argument("--mix", default="full:0.55,4:0.37,16:0.08", help="block sizes and their shares of the tokens")
    ap.add_argument("--full-range", default="0.05-0.6:0.75,0.6-1:0.25", help="mask rates of full attention")
    ap.add_argument("--small-range", default="0-1", help="mask rates of small blocks (clipped to whole counts)")
    ap.add_argument("--then", metavar="DIR", help="folder whose data.npz is still being made: compile and evaluate "
                    "with --data, then wait for it and train on it")
    ap.add_argument("--then-within", type=float, default=600, metavar="SECONDS",
                    help="wait so long after the start; then train on the --other-parts of --data alone")
    ap.add_argument("--main-parts", default="stories")
    ap.add_argument("--other-parts", default="tales,children")
    ap.add_argument("--main-share", type=float, default=0.8)
    ap.add_argument("--heldout-parts", help="parts of the held-out table; default: those that train, in their shares")
    ap.add_argument("--doc-start-share", type=float, default=0.6)
    ap.add_argument("--batch-tokens", type=int, default=5632, help="tokens per step, all workers together")
    ap.add_argument("--minutes", type=float, help="training time (stopped time does not count); "
                    "default: 95, or that of --stop-after")
    ap.add_argument("--deadline", help="HH:MM, local time: finish by then whatever happens")
    ap.add_argument("--stop-after", type=float, metavar="SECONDS",
                    help="finish within so many seconds of the start, final evaluation and export included")
    ap.add_argument("--steps", type=int, help="number of steps, instead of --minutes")
    ap.add_argument("--warmup", type=int, default=40)
    ap.add_argument("--muon-lr", type=float, default=0.02)
    ap.add_argument("--adam-lr", type=float, default=3e-3)
    ap.add_argument("--clip", type=float, default=1.0)
    ap.add_argument("--ema", type=float, default=0.998)
    ap.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    ap.add_argument("--compile", action=argparse.BooleanOptionalAction,
                    help="torch.compile the blocks (on a CPU it needs a C++ compiler); default: on a GPU")
    ap.add_argument("--workers", type=int, help="processes; default: one per core, or 1 on a GPU")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--log-steps", type=int, default=25)
    ap.add_argument("--first-report", type=float, help="minutes until the first report; "
                    "default: 6, or --report-minutes if that is less")
    ap.add_argument("--report-minutes", type=float, default=10)
    ap.add_argument("--report-steps", type=int, default=500, help="with --steps: steps between reports")
    ap.add_argument("--eval-sequences", type=int, default=64)
    ap.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True,
                    help="draw losses.svg at every report")
    args = ap.parse_args()
    args._reports, args.started = 0, STARTED
    gpu = args.device != "cpu"
    if gpu and not torch.cuda.is_available():
        ap.error(f"--device {args.device}: no GPU that torch {torch.__version__} can use")
    if args.workers is None:
        args.workers = 1 if gpu else os.cpu_count()
    if gpu and args.workers != 1:
        ap.error("--device: a GPU takes --workers 1")
    if args.steps and (args.deadline or args.stop_after):
        ap.error("--steps: not with --deadline or --stop-after")
    if args.compile is None:
        args.compile = gpu
    if args.minutes is None:
        args.minutes = args.stop_after / 60 if args.stop_after else 95
    if args.first_report is None:
        args.first_report = min(6, args.report_minutes)
    if args.checkpoint is None:
        args.checkpoint = os.path.join(args.out, "checkpoint.pt")
    elif args.checkpoint == "none":
        args.checkpoint = None
    os.makedirs(args.out, exist_ok=True)
    if args.checkpoint:
        os.makedirs(os.path.dirname(os.path.abspath(args.checkpoint)), exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    if args.workers == 1:
        worker(0, 1, port, args)
    else:
        mp.spawn(worker, (args.workers, port, args), nprocs=args.workers)


if __name__ == "__main__":
    main()
