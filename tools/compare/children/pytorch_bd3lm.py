"""BD3-LM in plain PyTorch: the peer that the engine's numbers stand beside, timed and checked.

  python tools/compare/children/pytorch_bd3lm.py --model DIR --mode bf16-compile --threads 2 \\
      --forward 128@0,4@64 --texts draft,refine --length 127

Prints one JSON object; times are medians and best of --runs, in ms:
  forwards  ROWS@POSITION: ROWS rows over cached K/V of the positions before, logits of all of them
  texts     a whole text, with its tokens: `draft` block by block over cached K/V, left to right and
            greedy; `drawn` the same in random order, tokens drawn as the reference draws them;
            `refine` the first draft, then its least confident tokens masked again and written anew
            by full passes
  sample    the reference sampler's arithmetic on a block of logits: f64 softmax, nucleus by sorting

It is written to be a strong peer, not to mimic the official one: adaLN is folded into norm weights
and gates into the matrices after them, keys are cached after rotation in the compute dtype, only
visible keys are read, a finished block's K/V is written by the next block's first forward, and the
head runs for the rows whose tokens are used. Before any timing it is checked: against golden.json
where the directory has one (the official network's values, to 1e-4), and the cached path against
the uncached one always. `compile` is torch.compile with frozen weights.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

MODES = {
    "f32-eager": torch.float32,
    "f32-compile": torch.float32,
    "bf16-eager": torch.bfloat16,
    "bf16-compile": torch.bfloat16,
}


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
            # sigma is 0 without time conditioning: the sinusoid is 128 cosines of 0, 128 sines.
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
        """Keys and values of each layer, apart: once compiled, one tensor for all would be copied
        whole at each write."""
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

    def forward(self, ids, cos, sin, kv, at, visible, pick):
        """ids (T). kv: per layer keys, then values (H, P + T, D), of which rows `at`, the last T,
        are written; None: no cache. `pick`: rows whose logits are wanted; None: all."""
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
        if pick is not None:
            x = x[pick]
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

    def full(self, ids, block_len=0, pick=None):
        """Logits, nothing cached. `block_len` 0: the checkpoint's own; None: full visibility."""
        peer, own = self.peer, self.peer.block_len
        peer.block_len = own if block_len == 0 else block_len
        visible = peer.visibility(len(ids))
        peer.block_len = own
        if pick is not None and self.call is not self.peer:
            torch._dynamo.mark_dynamic(pick, 0)
        return self.call(ids, *peer.tables(0, len(ids)), None, None, visible, pick)

    def block(self, ids, kv, prefix, visible=None, pick=None):
        """Rows over the first `prefix` rows of the cache, which they are appended to."""
        end = prefix + len(ids)
        view = [x[:, :end] for x in kv]
        if self.call is not self.peer:
            for x in view:
                torch._dynamo.mark_dynamic(x, 1)
            if visible is not None:
                torch._dynamo.mark_dynamic(visible, 1)
        at = torch.arange(prefix, end, device=self.device)
        return self.call(ids, *self.peer.tables(prefix, len(ids)), view, at, visible, pick)

    def fill(self, kv, ids):
        """K/V of a prefix that sees itself whole."""
        if len(ids):
            self.peer(ids, *self.peer.tables(0, len(ids)), [x[:, : len(ids)] for x in kv],
                      torch.arange(len(ids), device=self.device), None, torch.zeros_like(ids[:1]))

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


# --- checks, before the clock starts ---


def check_golden(runner, directory):
    """Largest difference from the official logits of golden.json, or None where there is none."""
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
    # The whole is not compiled: it is a reference here, and its graph would serve nothing else.
    whole, kv = peer(ids, *peer.tables(0, rows), None, None, peer.visibility(rows), None).float(), peer.cache()
    parts = [runner.block(ids[i : i + size], kv, i).float() for i in range(0, rows, size)]
    return (torch.cat(parts) - whole).abs().max().item()


# --- whole texts ---


def probabilities(logits, mask_id):
    logits = logits.float()
    logits[:, mask_id] = -torch.inf
    return logits.softmax(-1)


def draft(runner, o, drawn):
    """(canvas, confidence, NFE): one token a forward over cached K/V, BOS given at position 0."""
    peer, total = runner.peer, o.length + 1
    size = peer.block_len or 4
    canvas = torch.full((total,), peer.mask_id, device=runner.device)
    canvas[0] = o.bos
    confidence, kv, nfe = [1.0] * total, peer.cache(), 0
    for start in range(0, total, size):
        end = min(start + size, total)
        masked = list(range(max(start, 1), end))
        if drawn:
            masked = [masked[i] for i in torch.randperm(len(masked)).tolist()]
        for step, position in enumerate(masked):
            # The first forward writes the finished block's K/V; its rows do not see the new block.
            begin, visible = start, None
            if step == 0 and start:
                begin = start - size
                visible = torch.ones((end - begin, end), dtype=torch.bool, device=runner.device)
                visible[:size, start:] = False
            row = torch.tensor([position - begin], device=runner.device)
            logits = runner.block(canvas[begin:end], kv, begin, visible, row)
            nfe += 1
            if drawn:
                canvas[position] = sample(logits, peer.mask_id, o.top_p)[0]
            else:
                p, token = probabilities(logits, peer.mask_id)[0].max(-1)
                canvas[position], confidence[position] = token, p.item()
    return canvas, confidence, nfe


def refine(runner, o):
    """(canvas, NFE): a greedy draft, then `--remask` of it masked again by snapshot confidence and
    written anew in `--refine-steps` full passes, the most confident first."""
    canvas, confidence, nfe = draft(runner, o, drawn=False)
    peer, count = runner.peer, int(o.remask * o.length)
    masked = sorted(sorted(range(1, o.length + 1), key=lambda i: (confidence[i], i))[:count])
    canvas[masked] = peer.mask_id
    for step in range(o.refine_steps):
        quota = count // o.refine_steps + (step < count % o.refine_steps)
        if not quota:
            break
        rows = torch.tensor(masked, device=runner.device)
        p, token = probabilities(runner.full(canvas, None, rows), peer.mask_id).max(-1)
        nfe += 1
        # Ties go to the lower position.
        chosen = torch.sort(p, descending=True, stable=True).indices[:quota]
        canvas[rows[chosen]] = token[chosen]
        taken = set(chosen.tolist())
        masked = [position for i, position in enumerate(masked) if i not in taken]
    return canvas, nfe


def time_text(runner, o, name):
    def run():
        if name == "refine":
            return refine(runner, o)
        canvas, _, nfe = draft(runner, o, drawn=name == "drawn")
        return canvas, nfe

    canvas, nfe = run()  # every graph is compiled here
    found = {"tokens": canvas[1:].tolist(), "nfe": nfe}
    return found if o.check_only else found | runner.time_ms(run, o.runs, 0)


# --- forwards ---


def time_forward(runner, o, rows, prefix):
    peer = runner.peer
    ids = torch.full((rows,), peer.mask_id, device=runner.device)
    if not prefix:
        return runner.time_ms(lambda: runner.full(ids, None), o.runs, o.warmup)
    kv = peer.cache()
    runner.fill(kv, torch.arange(prefix, device=runner.device) % peer.mask_id)
    return runner.time_ms(lambda: runner.block(ids, kv, prefix), o.runs, o.warmup)


def write_logits(runner, o):
    """One .npy for each shape of --logits, of the first ids of --ids."""
    import numpy

    given = json.loads(o.ids.read_text())
    for rows, prefix in o.logits:
        if prefix + rows > len(given):
            raise SystemExit(f"--ids: expected {prefix + rows} ids, found {len(given)}")
        ids = torch.tensor(given[: prefix + rows], device=runner.device)
        if prefix:
            kv = runner.peer.cache()
            runner.fill(kv, ids[:prefix])
            logits = runner.block(ids[prefix:], kv, prefix)
        else:
            logits = runner.full(ids, None)
        numpy.save(o.out / f"pytorch-{rows}@{prefix}.npy", logits.float().cpu().numpy())


def shapes(text):
    return [tuple(int(n) for n in shape.split("@")) for shape in text.split(",")]


def words(text):
    return text.split(",")


@torch.no_grad()
def main():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--model", required=True, type=pathlib.Path)
    parse.add_argument("--mode", choices=MODES, required=True)
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--threads", type=int, default=os.cpu_count())
    parse.add_argument("--forward", type=shapes, default=[], help="ROWS@POSITION, comma separated")
    parse.add_argument("--texts", type=words, default=[], help="of draft,drawn,refine")
    parse.add_argument("--length", type=int, default=127, help="generated tokens of a text, after BOS")
    parse.add_argument("--bos", type=int, default=0)
    parse.add_argument("--remask", type=float, default=0.35)
    parse.add_argument("--refine-steps", type=int, default=12)
    parse.add_argument("--top-p", type=float, default=0.9)
    parse.add_argument("--runs", type=int, default=5)
    parse.add_argument("--warmup", type=int, default=3)
    parse.add_argument("--check-only", action="store_true", help="check the arithmetic and time nothing")
    parse.add_argument("--logits", type=shapes, help="ROWS@POSITION, comma separated, whose logits are written")
    parse.add_argument("--ids", type=pathlib.Path, help="JSON array of the ids that they are of")
    parse.add_argument("--out", type=pathlib.Path, help="the directory where logits go, as .npy")
    o = parse.parse_args()
    torch.set_num_threads(o.threads)
    runner = Runner(o.model, o.mode, o.device)
    peer = runner.peer
    checks = {"golden": check_golden(runner, o.model), "cached_vs_uncached": check_cache(runner, 64)}
    if MODES[o.mode] == torch.float32 and any(d is not None and d > 1e-4 for d in checks.values()):
        raise SystemExit(f"{o.model}: {o.mode} is wrong, logits differ by {checks}")
    report = {
        "parameters_after_folding": sum(p.numel() for n, p in peer.named_parameters() if n not in ("cos", "sin")),
        "block_len": peer.block_len or "full",
        "mode": o.mode,
        "torch": torch.__version__,
        "device": o.device if o.device == "cpu" else torch.cuda.get_device_name(),
        "threads": o.threads,
        "largest_logit_difference": checks,
    }
    if o.logits:
        write_logits(runner, o)
    report["texts"] = {name: time_text(runner, o, name) for name in o.texts}
    if not o.check_only and o.forward:
        report["forwards"] = {f"{rows}@{at}": time_forward(runner, o, rows, at) for rows, at in o.forward}
        logits = runner.full(torch.arange(peer.block_len or 4, device=runner.device), None)
        report["sample"] = runner.time_ms(lambda: sample(logits, peer.mask_id, o.top_p), o.runs, o.warmup)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
