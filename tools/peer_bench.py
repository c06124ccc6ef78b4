"""Times a plain PyTorch implementation of BD3-LM: the peer that the engine's numbers stand beside.

  python tools/peer_bench.py --model DIR [--device cpu] [--threads 2] [--modes f32-eager,bf16-eager,bf16-compile] [--out F]

Prints one JSON object. Per mode, median and best in milliseconds (they part when the machine is shared):
  draft_step   one denoising forward of a block over a cached prefix, logits of all its rows; per prefix, and their mean
  commit       one forward that stores a finished block's keys and values, without the head
  sample       the reference sampler's arithmetic on one block of logits: f64 softmax, nucleus by sorting, one draw per row
  full_pass    T rows under the checkpoint's visibility, logits of all rows
and from the medians tokens/s of a whole draft at one token per forward, with the cache (length * step + blocks * commit)
and without (the window is recomputed at every step). `--run-draft N` also runs N tokens for real, as a check on that sum.

The implementation is written to be a strong peer, not to mimic the official one: adaLN is folded into norm weights and gates into
the matrices after them, keys are cached after rotation in the compute dtype, only visible keys are read, and the commit skips
the head. Before any timing it is checked: against golden.json where the directory has one (the official network's values, to
1e-4), and the cached path against the uncached one always. `bf16-compile` is torch.compile with frozen weights.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

MODES = {"f32-eager": torch.float32, "bf16-eager": torch.bfloat16, "bf16-compile": torch.bfloat16}


def read_tensors(directory):
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise SystemExit(f"{directory}: no model*.safetensors")
    state = {}
    for file in files:
        with safe_open(file, "pt") as f:
            state |= {name: f.get_tensor(name).float() for name in f.keys()}
    return state


class Peer(nn.Module):
    """The network, folded. Shapes: T rows, P cached rows, H heads of D, C = H * D."""

    def __init__(self, directory):
        super().__init__()
        self.config = c = json.loads((directory / "config.json").read_text())
        s = read_tensors(directory)
        self.heads, self.width = c["n_heads"], c["hidden_dim"]
        self.length, self.dim = c["model_length"], c["hidden_dim"] // c["n_heads"]
        self.mask_id = c["vocab_size"] - 1
        self.block_len = 1 if c.get("causal") else c.get("block_size")  # None: every row sees all
        ones, zeros = torch.ones(self.width), torch.zeros(self.width)
        conditioned = "backbone.sigma_map.mlp.0.weight" in s
        if conditioned:
            # sigma is 0 without time conditioning: the sinusoid is 128 cosines of 0, then 128 sines.
            wave = torch.cat((torch.ones(128), torch.zeros(128)))
            up, down = (("backbone.sigma_map.mlp.%d." % i) for i in (0, 2))
            hidden = F.silu(F.linear(wave, s[up + "weight"], s[up + "bias"]))
            cond = F.silu(F.linear(hidden, s[down + "weight"], s[down + "bias"]))

        def modulation(name, parts):
            if not conditioned:
                return [zeros, zeros, ones] * 2 if parts == 6 else [zeros, zeros]
            return F.linear(cond, s[name + "adaLN_modulation.weight"], s[name + "adaLN_modulation.bias"]).chunk(parts)

        def keep(name, value):
            self.register_parameter(name, nn.Parameter(value.contiguous().clone(), requires_grad=False))

        keep("embed", s["backbone.vocab_embed.embedding"])
        for i in range(c["n_blocks"]):
            name = f"backbone.blocks.{i}."
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(name, 6)
            keep(f"norm1_w{i}", s[name + "norm1.weight"] * (1 + scale_a))
            keep(f"norm1_b{i}", shift_a)
            keep(f"qkv{i}", s[name + "attn_qkv.weight"])
            keep(f"out{i}", s[name + "attn_out.weight"] * gate_a[:, None])
            keep(f"norm2_w{i}", s[name + "norm2.weight"] * (1 + scale_m))
            keep(f"norm2_b{i}", shift_m)
            keep(f"up_w{i}", s[name + "mlp.0.weight"])
            keep(f"up_b{i}", s[name + "mlp.0.bias"])
            keep(f"down_w{i}", s[name + "mlp.2.weight"] * gate_m[:, None])
            keep(f"down_b{i}", s[name + "mlp.2.bias"] * gate_m)
        name = "backbone.output_layer."
        shift, scale = modulation(name, 2)
        keep("norm_w", s[name + "norm_final.weight"] * (1 + scale))
        keep("norm_b", shift)
        keep("head_w", s[name + "linear.weight"])
        keep("head_b", s[name + "linear.bias"])
        angle = torch.arange(self.length)[:, None] * s["backbone.rotary_emb.inv_freq"][None]
        angle = torch.cat((angle, angle), dim=-1)  # (length, D)
        keep("cos", angle.cos())
        keep("sin", angle.sin())

    def tables(self, start, rows):
        """cos, sin of positions start .. start + rows, (T, D)."""
        return self.cos[start : start + rows], self.sin[start : start + rows]

    def cache(self):
        """Keys and values of each layer, apart: one tensor for all would be copied whole at each write once compiled."""
        shape, like = (self.heads, self.length, self.dim), self.embed
        return [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2 * self.config["n_blocks"])]

    def visibility(self, rows):
        """(T, T) bool, or None where every row sees every row."""
        if self.block_len is None:
            return None
        block = torch.arange(rows, device=self.embed.device) // self.block_len
        return block[None] <= block[:, None]

    def rotate(self, x, cos, sin):
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin

    def forward(self, ids, cos, sin, kv, at, visible, head: bool):
        """ids (T). kv: per layer keys, then values (H, P + T, D); rows `at`, the last T, are written. None: no cache."""
        rows = ids.shape[0]
        x = self.embed[ids]
        for i in range(self.config["n_blocks"]):
            p = self.__getattr__
            h = F.layer_norm(x, (self.width,), p(f"norm1_w{i}"), p(f"norm1_b{i}"), 1e-5)
            q, k, v = F.linear(h, p(f"qkv{i}")).view(rows, 3, self.heads, self.dim).permute(1, 2, 0, 3)
            q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
            if kv is not None:
                kv[2 * i][:, at] = k
                kv[2 * i + 1][:, at] = v
                k, v = kv[2 * i], kv[2 * i + 1]
            a = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible)[0]
            x = x + F.linear(a.transpose(0, 1).reshape(rows, self.width), p(f"out{i}"))
            h = F.layer_norm(x, (self.width,), p(f"norm2_w{i}"), p(f"norm2_b{i}"), 1e-5)
            h = F.gelu(F.linear(h, p(f"up_w{i}"), p(f"up_b{i}")), approximate="tanh")
            x = x + F.linear(h, p(f"down_w{i}"), p(f"down_b{i}"))
        if not head:
            return x
        h = F.layer_norm(x, (self.width,), self.norm_w, self.norm_b, 1e-5)
        return F.linear(h, self.head_w, self.head_b)


class Runner:
    """One mode: a Peer in a dtype, eager or compiled, with the calls that are timed."""

    def __init__(self, directory, mode, device):
        self.mode, self.device = mode, device
        self.peer = Peer(directory).eval().to(device=device, dtype=MODES[mode])
        self.call = self.peer
        if mode.endswith("compile"):
            import torch._dynamo
            import torch._inductor.config

            torch._inductor.config.freezing = True
            torch._dynamo.config.recompile_limit = 64  # one graph per number of rows
            self.call = torch.compile(self.peer, fullgraph=True)

    def full(self, ids, block_len=0):
        """Logits of all rows, nothing cached. `block_len` 0 is the checkpoint's own, None is full visibility."""
        peer, own = self.peer, self.peer.block_len
        peer.block_len = own if block_len == 0 else block_len
        visible = peer.visibility(len(ids))
        peer.block_len = own
        return self.call(ids, *peer.tables(0, len(ids)), None, None, visible, True)

    def block(self, ids, kv, prefix, head=True):
        """A block's rows over the first `prefix` rows of the cache, which it is appended to."""
        end = prefix + len(ids)
        view = [x[:, :end] for x in kv]
        if self.call is not self.peer:
            for x in view:
                torch._dynamo.mark_dynamic(x, 1)
        at = torch.arange(prefix, end, device=self.device)
        return self.call(ids, *self.peer.tables(prefix, len(ids)), view, at, None, head)

    def wait(self):
        if self.device != "cpu":
            torch.cuda.synchronize()

    def time_ms(self, run, repeat, warmup):
        for _ in range(warmup):
            run()
        times = []
        for _ in range(repeat):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append((time.perf_counter() - start) * 1e3)
        return {"median": round(statistics.median(times), 4), "best": round(min(times), 4)}


def sample(logits, mask_id, top_p):
    """One token per row as the reference draws it: f64, nucleus by sorting, an exponential race."""
    z = logits.double()
    z[:, mask_id] = -torch.inf
    p = z.softmax(-1)
    if top_p < 1:
        ordered, index = p.sort(-1, descending=True)
        keep = ordered.cumsum(-1) <= top_p
        keep[:, 0] = True
        p = torch.zeros_like(p).scatter_(-1, index, ordered * keep)
        p /= p.sum(-1, keepdim=True)
    return (p / -torch.rand_like(p).log()).argmax(-1)


# --- checks, before the clock starts ----------------------------------------------------------------------------------


def check_golden(runner, directory):
    """Largest difference from the official logits of golden.json, or None where the directory has none."""
    if not (directory / "golden.json").exists():
        return None
    golden = json.loads((directory / "golden.json").read_text())
    worst = 0.0
    with safe_open(directory / "golden.safetensors", "pt") as f:
        for case in golden["cases"]:
            ids = f.get_tensor(case["tokens"]).long().to(runner.device)
            block_len = None if case["block_len"] == "full" else case["block_len"]
            logits = runner.full(ids, block_len).float().cpu()
            worst = max(worst, (logits - f.get_tensor(case["logits"])).abs().max().item())
    return worst


def check_cache(runner, rows):
    """Largest difference between a draft's logits over the cache and the same rows recomputed."""
    peer = runner.peer
    if peer.block_len is None:
        return None
    size = peer.block_len
    rows = min(rows, peer.length) // size * size
    ids = torch.arange(rows, device=runner.device) * 7919 % peer.mask_id
    whole, kv = runner.full(ids).float(), peer.cache()
    parts = [runner.block(ids[i : i + size], kv, i).float() for i in range(0, rows, size)]
    return (torch.cat(parts) - whole).abs().max().item()


# --- the bench --------------------------------------------------------------------------------------------------------


def draft(runner, tokens, top_p):
    """Seconds for a real draft of `tokens` positions with the cache, one token revealed per forward."""
    peer, size = runner.peer, runner.peer.block_len
    kv, start = peer.cache(), time.perf_counter()
    for prefix in range(0, tokens, size):
        ids = torch.full((size,), peer.mask_id, device=runner.device)
        for masked in torch.randperm(size).tolist():
            ids[masked] = sample(runner.block(ids, kv, prefix), peer.mask_id, top_p)[masked]
        runner.block(ids, kv, prefix, head=False)
    runner.wait()
    return time.perf_counter() - start


def mean_over(times):
    """Mean of the medians over the range of their keys, by trapezoids."""
    points = sorted((x, t["median"]) for x, t in times.items())
    if len(points) == 1:
        return points[0][1]
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(points, points[1:]))
    return area / (points[-1][0] - points[0][0])


def bench(runner, o, length):
    peer = runner.peer
    size = peer.block_len
    out = {}

    def time_full(rows):
        ids = torch.full((rows,), peer.mask_id, device=runner.device)
        return runner.time_ms(lambda: runner.full(ids), o.repeat_full, o.warmup)

    out["full_pass_ms"] = {str(rows): time_full(rows) for rows in o.rows if rows <= peer.length}
    if size is None:
        return out
    ids = torch.full((size,), peer.mask_id, device=runner.device)
    kv = peer.cache()
    last = (length - size) // size * size
    prefixes = o.prefix if o.prefix else sorted({last * i // 4 // size * size for i in range(5)})
    logits = runner.block(ids, kv, 0)
    steps, commits = {}, {}
    for prefix in prefixes:
        if prefix + size > peer.length:
            raise SystemExit(f"--prefix {prefix}: a block of {size} ends past the context of {peer.length}")
        steps[prefix] = runner.time_ms(lambda: runner.block(ids, kv, prefix), o.repeat, o.warmup)
        commits[prefix] = runner.time_ms(lambda: runner.block(ids, kv, prefix, head=False), o.repeat, o.warmup)
    drawn = runner.time_ms(lambda: sample(logits, peer.mask_id, o.top_p), o.repeat, o.warmup)
    step, commit = mean_over(steps), mean_over(commits)
    out["draft_step_ms"] = {"mean": round(step, 4), "by_prefix": steps}
    out["commit_ms"] = {"mean": round(commit, 4), "by_prefix": commits}
    out["sample_ms"] = drawn
    drawn = drawn["median"]
    blocks = -(-length // size)
    cached = length * step + blocks * commit
    out["draft_cached"] = {
        "length": length,
        "tokens_per_s": round(1e3 * length / cached, 2),
        "tokens_per_s_with_sampling": round(1e3 * length / (cached + length * drawn), 2),
    }
    if not o.skip_uncached:
        lengths = sorted({max(size, length * i // 4 // size * size) for i in range(5)})
        window = mean_over({n: time_full(n) for n in lengths})
        out["draft_uncached"] = {
            "length": length,
            "mean_window_ms": round(window, 4),
            "tokens_per_s": round(1e3 / window, 2),
            "tokens_per_s_with_sampling": round(1e3 / (window + drawn), 2),
        }
    if o.run_draft:
        tokens = min(o.run_draft, peer.length) // size * size
        draft(runner, min(tokens, 2 * size), o.top_p)  # warms every graph
        out["draft_run"] = {"tokens": tokens, "tokens_per_s_with_sampling": round(tokens / draft(runner, tokens, o.top_p), 2)}
    return out


def processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def integers(text):
    return [int(x) for x in text.split(",")]


@torch.no_grad()
def main():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--model", required=True, type=pathlib.Path)
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--threads", type=int, default=os.cpu_count())
    parse.add_argument("--modes", default=",".join(MODES), help="of " + ",".join(MODES))
    parse.add_argument("--length", type=int, help="of the draft; the context by default")
    parse.add_argument("--prefix", type=integers, help="cached rows to time at; five over the length by default")
    parse.add_argument("--rows", type=integers, default=[256, 1024], help="full passes to time")
    parse.add_argument("--top-p", type=float, default=0.9)
    parse.add_argument("--repeat", type=int, default=20)
    parse.add_argument("--repeat-full", type=int, default=5)
    parse.add_argument("--warmup", type=int, default=3)
    parse.add_argument("--skip-uncached", action="store_true")
    parse.add_argument("--run-draft", type=int, metavar="N", help="also draft N tokens for real")
    parse.add_argument("--check-only", action="store_true", help="check the arithmetic and time nothing")
    parse.add_argument("--out", type=pathlib.Path, help="write the JSON here too")
    o = parse.parse_args()
    torch.set_num_threads(o.threads)
    modes = o.modes.split(",")
    if unknown := [m for m in modes if m not in MODES]:
        parse.error(f"--modes: expected some of {', '.join(MODES)}, found {', '.join(unknown)}")

    report = None
    for mode in modes:
        runner = Runner(o.model, mode, o.device)
        peer = runner.peer
        if report is None:
            length = min(o.length or peer.length, peer.length)
            report = {
                "checkpoint": o.model.name,
                "parameters_after_folding": sum(p.numel() for n, p in peer.named_parameters() if n not in ("cos", "sin")),
                "block_len": peer.block_len or "full",
                "length": length,
                "torch": torch.__version__,
                "device": o.device if o.device == "cpu" else torch.cuda.get_device_name(),
                "processor": processor(),
                "threads": o.threads,
                "repeat": o.repeat,
                "modes": {},
            }
        checks = {"golden": check_golden(runner, o.model), "cached_vs_uncached": check_cache(runner, 64)}
        if MODES[mode] == torch.float32 and any(d is not None and d > 1e-4 for d in checks.values()):
            raise SystemExit(f"{o.model}: {mode} is wrong, logits differ by {checks}")
        print(f"{mode}: largest difference in logits {checks}", file=sys.stderr)
        report["modes"][mode] = {"largest_logit_difference": checks}
        if not o.check_only:
            report["modes"][mode] |= bench(runner, o, length)
        del runner
    text = json.dumps(report, indent=1)
    print(text)
    if o.out:
        o.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
