#!/usr/bin/env python3
"""A small autoregressive language model as teacher: fine-tune it on a corpus, let it write texts.

    python3 teacher.py MODEL WORK/data WORK/written --device cuda --teach-until 50 --write-until 200

MODEL is a directory in the Llama layout (config.json, model.safetensors) with heads of any size;
WORK/data holds the `teacher.npz` of `distil.py prepare`: documents in the teacher's tokens, cut to
the part of its vocabulary that they use. WORK/written receives `written-N.npz` as texts come: the
tokens of whole texts one behind the other (uint16), and where each begins.

Every time is in seconds since the start of the process. Exit status 1: nothing can be expected of
this teacher; what it wrote before stays.
"""
import time

STARTED = time.time()  # before the imports, which take seconds

import argparse
import json
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

END = 0  # id of the end mark in the cut vocabulary; it stands in front of each text as well

# The shape of SmolLM2-135M, for trials without weights.
TRIAL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "rope_theta": 100000.0, "rms_norm_eps": 1e-5}


def elapsed():
    return time.time() - STARTED


def say(text):
    print(f"teacher, {elapsed():.0f} s: {text}", flush=True)


# ---- model ---------------------------------------------------------------------------------------
#
# B sequences, T positions, H query heads, K key heads, G = H / K, E the size of a head.

def rms_norm(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate(x, cos, sin):
    """Half-split rotary embedding of [..., E]; the tables broadcast against it."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Layer(nn.Module):
    def __init__(self, dim, heads, kv_heads, size, ffn):
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * size, bias=False)
        self.out = nn.Linear(heads * size, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, dim, bias=False)


class Llama(nn.Module):
    """The dense Llama network with `vocab` entries and one matrix for embedding and head."""

    def __init__(self, config, vocab):
        super().__init__()
        dim, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.size = config.get("head_dim") or dim // self.heads
        self.eps = config["rms_norm_eps"]
        self.theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        if config.get("attention_bias") or config.get("mlp_bias") or config.get("rope_scaling"):
            raise SystemExit("config.json: biases and scaled rotary embeddings are not read here")
        self.embed = nn.Parameter(torch.randn(vocab, dim) * 0.02)
        self.layers = nn.ModuleList(Layer(dim, self.heads, self.kv_heads, self.size, config["intermediate_size"])
                                    for _ in range(config["num_hidden_layers"]))
        self.norm = nn.Parameter(torch.ones(dim))

    def tables(self, length, device, dtype):
        """cos and sin of the rotary embedding, each [length, E]."""
        angle = 1.0 / self.theta ** (torch.arange(0, self.size, 2, device=device).float() / self.size)
        angle = torch.arange(length, device=device).float()[:, None] * angle
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def split(self, qkv):
        """[..., (H + 2K) E] -> q [..., H, E], k and v [..., K, E]."""
        heads = qkv.unflatten(-1, (-1, self.size))
        return heads.split((self.heads, self.kv_heads, self.kv_heads), dim=-2)

    def feed_forward(self, layer, x):
        gate, up = layer.gate_up(rms_norm(x, layer.norm2, self.eps)).chunk(2, dim=-1)
        return x + layer.down(F.silu(gate) * up)

    def head(self, x):
        return F.linear(rms_norm(x, self.norm, self.eps), self.embed)

    def forward(self, ids):
        """ids [B, T] -> states [B, T, D] before the last norm, each seeing what is not behind it."""
        x = F.embedding(ids, self.embed)
        cos, sin = self.tables(ids.shape[1], ids.device, x.dtype)
        cos, sin = cos[:, None], sin[:, None]
        group = self.heads // self.kv_heads
        for layer in self.layers:
            q, k, v = self.split(layer.qkv(rms_norm(x, layer.norm1, self.eps)))
            q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
            q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer.out(out.transpose(1, 2).flatten(2))
            x = self.feed_forward(layer, x)
        return x


def load_llama(folder, kept):
    """A directory in the Llama layout, its vocabulary cut to the ids `kept`."""
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    model = Llama(config, len(kept))
    tensors = {k: v.float() for k, v in load_file(os.path.join(folder, "model.safetensors")).items()}
    rows = torch.as_tensor(kept, dtype=torch.long)
    if "lm_head.weight" in tensors and not config.get("tie_word_embeddings"):
        raise SystemExit(f"{folder}: embedding and head differ; not read here")
    state = {"embed": tensors["model.embed_tokens.weight"][rows], "norm": tensors["model.norm.weight"]}
    for i in range(config["num_hidden_layers"]):
        def old(name):
            return tensors[f"model.layers.{i}.{name}.weight"]

        state |= {f"layers.{i}.norm1": old("input_layernorm"), f"layers.{i}.norm2": old("post_attention_layernorm"),
                  f"layers.{i}.qkv.weight": torch.cat([old(f"self_attn.{n}_proj") for n in "qkv"]),
                  f"layers.{i}.out.weight": old("self_attn.o_proj"),
                  f"layers.{i}.gate_up.weight": torch.cat([old(f"mlp.{n}_proj") for n in ("gate", "up")]),
                  f"layers.{i}.down.weight": old("mlp.down_proj")}
    model.load_state_dict(state)
    return model


# ---- documents -------------------------------------------------------------------------------------

class Documents:
    """Documents as rows `<end> text <end>`, batched with others of about their length."""

    def __init__(self, archive, heldout, limit):
        tokens, start = archive["tokens"].astype(np.int64), archive["doc_start"]
        self.rows = []
        for i in np.flatnonzero(archive["doc_heldout"] == heldout):
            text = tokens[start[i]:start[i + 1]]
            self.rows.append(np.concatenate(([END], text, [END]))[:limit + 1])

    def batches(self, rng, size):
        """Arrays [B, T + 1] of about `size` tokens, -1 where a row has ended, in random order."""
        length = np.array([len(row) - 1 for row in self.rows])
        order = np.argsort(length + rng.uniform(0, 24, len(length)))
        batches, at = [], 0
        while at < len(order):
            count = 1
            while at + count < len(order) and (count + 1) * length[order[at:at + count + 1]].max() <= size:
                count += 1
            batches.append(order[at:at + count])
            at += count
        for i in rng.permutation(len(batches)):
            chosen = [self.rows[j] for j in batches[i]]
            batch = np.full((len(chosen), max(map(len, chosen))), -1, np.int64)
            for row, text in zip(batch, chosen):
                row[:len(text)] = text
            yield torch.from_numpy(batch)


def loss_of(model, batch, device):
    """Summed loss of the next tokens, and how many there are (on the CPU)."""
    count = int((batch[:, 1:] >= 0).sum())
    batch = batch.to(device, non_blocking=True)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
        logits = model.head(model(batch[:, :-1].clamp(min=0)))
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), ignore_index=-1, reduction="sum")
    return loss, count


@torch.no_grad()
def heldout_loss(model, documents, device, size):
    model.eval()
    pairs = [loss_of(model, batch, device) for batch in documents.batches(np.random.default_rng(0), size)]
    model.train()
    return float(torch.stack([loss for loss, _ in pairs]).sum()) / sum(count for _, count in pairs)


def teach(model, training, heldout, args):
    """Fine-tune all weights; leaves the best ones by held-out loss in the model and returns that loss."""
    device, size, rng = args.device, args.batch_tokens, np.random.default_rng(args.seed)
    params = list(model.parameters())
    adam = torch.optim.AdamW([{"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
                              {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0}],
                             lr=args.lr, betas=(0.9, 0.95), fused=True)
    model.train()
    best, weights = heldout_loss(model, heldout, device, size), [p.detach().clone() for p in params]
    say(f"held-out loss {best:.4f} before")
    began, step, seen, sums = elapsed(), 0, 0, []
    whole = sum(len(row) - 1 for row in training.rows)
    goal, next_look, looks = args.epochs * whole, 0.5 * whole, 0
    progress = 0.0
    while progress < 1:
        for batch in training.batches(rng, size):
            progress = max(seen / goal, (elapsed() - began) / max(args.teach_until - began, 1e-9))
            if progress >= 1:
                break
            for group in adam.param_groups:
                group["lr"] = args.lr * min(1, (step + 1) / 20) * (1 - 0.95 * progress)
            try:
                loss, count = loss_of(model, batch, device)
                (loss / count).backward()
            except torch.OutOfMemoryError:
                adam.zero_grad()
                torch.cuda.empty_cache()
                size //= 2
                say(f"out of memory: batches of {size} tokens from here on")
                if size < 1024:
                    raise
                break
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            adam.step()
            adam.zero_grad()
            sums.append(loss.detach() / count)
            step, seen = step + 1, seen + count
            if step == 20:
                torch.stack(sums).cpu()
                say(f"20 steps, {seen / max(elapsed() - began, 1e-9):.0f} tokens/s")
            if seen >= next_look:
                next_look, looks = next_look + 0.5 * whole, looks + 1
                best, weights = look(model, heldout, args, size, best, weights, step, seen, sums)
    best, weights = look(model, heldout, args, size, best, weights, step, seen, sums)
    with torch.no_grad():
        for p, w in zip(params, weights):
            p.copy_(w)
    say(f"held-out loss {best:.4f} after {step} steps, {seen / whole:.2f} epochs, "
        f"{seen / max(elapsed() - began, 1e-9):.0f} tokens/s")
    return best


def look(model, heldout, args, size, best, weights, step, seen, sums):
    """Held-out loss in the middle of a run; -> the best loss and its weights."""
    value = heldout_loss(model, heldout, args.device, size)
    recent = float(torch.stack(sums[-50:]).mean()) if sums else math.nan
    say(f"step {step}, {seen} tokens, training loss {recent:.4f}, held-out {value:.4f}")
    if value < best:  # false for NaN as well
        return value, [p.detach().clone() for p in model.parameters()]
    return best, weights


# ---- writing ---------------------------------------------------------------------------------------

class Writer:
    """Texts from a fixed number of slots, each beginning the next text where one has ended.

    All state is on the device and no shape depends on it, so a step is one CUDA graph. A step
    leaves one row in `log`: the token of each slot, END where a text is complete, -1 where it
    reached `length` and is given up.
    """

    def __init__(self, model, args, slots):
        self.model, self.slots, self.length = model, slots, args.length
        self.top_k, self.top_p = min(args.top_k, len(model.embed)), args.top_p
        device, dtype = model.embed.device, model.embed.dtype
        self.cos, self.sin = model.tables(args.length, device, dtype)
        self.keys, self.values = (
            [torch.zeros(slots, model.kv_heads, args.length, model.size, device=device, dtype=dtype)
             for _ in model.layers] for _ in range(2))
        low, high = args.temperature
        self.temperature = torch.linspace(low, high, slots, device=device)[:, None]
        self.places = torch.arange(args.length, device=device)
        self.token = torch.zeros(slots, dtype=torch.long, device=device)
        self.position = torch.zeros(slots, dtype=torch.long, device=device)
        self.log = torch.zeros(args.log_steps, slots, dtype=torch.int32, device=device)
        self.cursor = torch.zeros(1, dtype=torch.long, device=device)
        self.graph = None

    def logits(self):
        """Logits [B, V] behind the token of each slot, which enters the cache at its position."""
        m, b = self.model, self.slots
        group = m.heads // m.kv_heads
        cos, sin = self.cos[self.position][:, None], self.sin[self.position][:, None]
        hidden = self.places > self.position[:, None]
        bias = torch.zeros(hidden.shape, dtype=cos.dtype, device=cos.device).masked_fill(hidden, -math.inf)[:, None, None]
        place = self.position.view(b, 1, 1, 1).expand(b, m.kv_heads, 1, m.size)
        x = m.embed[self.token]
        for layer, keys, values in zip(m.layers, self.keys, self.values):
            q, k, v = m.split(layer.qkv(rms_norm(x, layer.norm1, m.eps)))
            q, k = rotate(q, cos, sin) * m.size**-0.5, rotate(k, cos, sin)
            keys.scatter_(2, place, k[:, :, None])
            values.scatter_(2, place, v[:, :, None])
            # The queries that share a key head stand where a sequence would have its positions.
            scores = torch.matmul(q.reshape(b, m.kv_heads, group, m.size), keys.transpose(-2, -1)) + bias
            out = torch.matmul(scores.softmax(dim=-1), values)
            x = x + layer.out(out.reshape(b, -1))
            x = m.feed_forward(layer, x)
        return m.head(x).float()

    def step(self):
        share, token = (self.logits() / self.temperature).softmax(dim=-1).topk(self.top_k, dim=-1)
        before = share.cumsum(dim=-1) - share
        share = share * (before < self.top_p)  # up to and including the one that passes top_p
        edge = share.cumsum(dim=-1)
        draw = torch.rand(self.slots, 1, device=edge.device) * edge[:, -1:]
        pick = (edge <= draw).sum(dim=-1, keepdim=True).clamp(max=self.top_k - 1)
        token = token.gather(1, pick)[:, 0]
        full = self.position >= self.length - 1
        done = full | (token == END)
        entry = torch.where(full & (token != END), -1, token)
        self.log.index_copy_(0, self.cursor, entry.int()[None])
        self.cursor.add_(1).remainder_(len(self.log))
        self.token.copy_(torch.where(done, END, token))
        self.position.copy_(torch.where(done, 0, self.position + 1))

    def restart(self):
        for state in (self.token, self.position, self.cursor):
            state.zero_()

    def capture(self):
        """Make a step one CUDA graph; where that fails, steps are launched one kernel after the other."""
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            graph.replay()
            torch.cuda.synchronize()
            self.graph = graph
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            say(f"no CUDA graph: {type(error).__name__}: {error}")
        self.restart()

    def run(self):
        """Fill the log once and send it to the CPU; -> (its copy, an event to wait for or None)."""
        for _ in range(len(self.log)):
            self.graph.replay() if self.graph else self.step()
        if self.log.device.type == "cpu":
            return self.log.clone(), None
        copy = torch.empty(self.log.shape, dtype=self.log.dtype, pin_memory=True)
        copy.copy_(self.log, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return copy, event


class Harvest:
    """Whole texts out of logs, written to files as they come."""

    def __init__(self, folder, slots, texts_in_file):
        self.folder, self.texts_in_file = folder, texts_in_file
        self.open = [np.zeros(0, np.int32)] * slots
        self.texts, self.count, self.tokens, self.lost = [], 0, 0, 0
        # Files of an earlier try stay.
        self.files = sum(name.startswith("written-") and name.endswith(".npz") for name in os.listdir(folder))

    def take(self, log):
        for slot, column in enumerate(np.ascontiguousarray(log.T)):
            at = 0
            for end in np.flatnonzero(column <= 0):
                text = np.concatenate((self.open[slot], column[at:end]))
                self.open[slot] = self.open[slot][:0]
                at = end + 1
                if column[end] < 0:
                    self.lost += 1
                elif len(text):
                    self.texts.append(text.astype(np.uint16))
            self.open[slot] = np.concatenate((self.open[slot], column[at:]))
        if len(self.texts) >= self.texts_in_file:
            self.flush()

    def flush(self):
        if not self.texts:
            return
        path = os.path.join(self.folder, f"written-{self.files}.npz")
        start = np.cumsum([0] + [len(t) for t in self.texts])
        with open(path + ".tmp", "wb") as f:
            np.savez(f, tokens=np.concatenate(self.texts), start=start)
        os.replace(path + ".tmp", path)
        self.count, self.tokens, self.files = self.count + len(self.texts), self.tokens + int(start[-1]), self.files + 1
        self.texts = []


@torch.no_grad()
def write(model, args):
    slots = args.slots
    while True:
        try:
            writer = Writer(model, args, slots)
            if args.device != "cpu" and args.graph:
                writer.capture()
            break
        except torch.OutOfMemoryError:
            if slots < 64:
                raise
            slots, writer = slots // 2, None
            torch.cuda.empty_cache()
            say(f"out of memory: {slots} texts at once")
    os.makedirs(args.out, exist_ok=True)
    harvest, runs, spoke = Harvest(args.out, slots, args.texts_in_file), 0, False
    began, waiting = elapsed(), None
    say(f"writing {slots} texts at once, {'as a CUDA graph' if writer.graph else 'without a graph'}")
    while elapsed() < args.write_until and (not args.texts or harvest.count < args.texts):
        log, event = writer.run()
        runs += 1
        if waiting:  # while the device works on the next one
            if waiting[1]:
                waiting[1].synchronize()
            harvest.take(waiting[0].numpy())
        waiting = log, event
        if not spoke and elapsed() - began > 15:
            spoke = True
            say(f"about {runs * args.log_steps * slots / (elapsed() - began):.0f} tokens/s, {harvest.count} texts")
    if waiting:
        if waiting[1]:
            waiting[1].synchronize()
        harvest.take(waiting[0].numpy())
    harvest.flush()
    say(f"{harvest.count} texts, {harvest.tokens} tokens in {elapsed() - began:.0f} s "
        f"({runs * args.log_steps * slots / max(elapsed() - began, 1e-9):.0f} tokens/s drawn), "
        f"{harvest.lost} given up at {args.length} tokens")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", help="directory in the Llama layout, or `trial`: random weights, for a trial")
    ap.add_argument("data", help="folder with teacher.npz")
    ap.add_argument("out", help="folder that receives the texts")
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--teach-until", type=float, default=50, metavar="SECONDS")
    ap.add_argument("--epochs", type=float, default=3, help="at most")
    ap.add_argument("--lr", type=float, default=4e-4)
    ap.add_argument("--batch-tokens", type=int, default=16384)
    ap.add_argument("--worst", type=float, default=2.2,
                    help="write nothing with a larger held-out loss, in nats per token of the teacher")
    ap.add_argument("--write-until", type=float, default=200, metavar="SECONDS")
    ap.add_argument("--texts", type=int, default=0, help="stop after about so many; 0: when the time is over")
    ap.add_argument("--slots", type=int, default=4096, help="texts written at once")
    ap.add_argument("--length", type=int, default=288, help="give up a text that reaches so many tokens")
    ap.add_argument("--temperature", type=float, nargs=2, default=(0.8, 1.0),
                    help="of the first and the last slot; evenly spread between")
    ap.add_argument("--top-p", type=float, default=0.95)
    ap.add_argument("--top-k", type=int, default=256)
    ap.add_argument("--log-steps", type=int, default=64, help="tokens a slot between looks at the log")
    ap.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True, help="CUDA graph")
    ap.add_argument("--texts-in-file", type=int, default=4000)
    ap.add_argument("--save", help="file that receives the fine-tuned weights")
    args = ap.parse_args()
    torch.manual_seed(args.seed)
    archive = np.load(os.path.join(args.data, "teacher.npz"))
    archive = {name: archive[name] for name in archive.files}
    kept = archive["kept"]
    model = Llama(TRIAL, len(kept)) if args.model == "trial" else load_llama(args.model, kept)
    model = model.to(args.device)
    training, heldout = (Documents(archive, held, args.length + 96) for held in (False, True))
    say(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(kept)} tokens, "
        f"{len(training.rows)} documents to learn, {len(heldout.rows)} held out")
    loss = teach(model, training, heldout, args)
    if args.save:
        torch.save(model.state_dict(), args.save)
    if not loss <= args.worst:
        raise SystemExit(f"held-out loss {loss:.3f}: worse than {args.worst}")
    for p in model.parameters():
        p.requires_grad_(False)
        p.grad = None
    model = model.eval().to(torch.bfloat16 if args.device != "cpu" else torch.float32)
    if args.device != "cpu":
        torch.cuda.empty_cache()
    write(model, args)


if __name__ == "__main__":
    main()
