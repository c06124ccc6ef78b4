"""The BD3-LM transformer (`adaln: false`, no time input) with the mix-scale training forward.

    python3 model.py --self-test [--device cuda]

compares the three ways to compute attention with each other, forward and gradient, and counts what
the noise masks.

Shapes: B sequences, L tokens, D model width, H heads of size 64, V vocabulary entries.

Parameter names equal the published tensor names (without the `backbone.` prefix), with one difference: here the
input embedding and the head share one matrix E. The network reads `EMBED_SCALE * E` and writes `LN(x) @ E.T + bias`;
`export.py` writes the two matrices separately, so nothing of this is visible from outside.
"""
import argparse
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

EMBED_SCALE = 8.0  # a power of two: folding it into bf16 weights is exact


def rope_tables(length, head_dim, base=10000.0):
    """cos and sin tables [length, head_dim] of half-split RoPE, and the inverse frequencies."""
    inv_freq = 1.0 / (base ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angle = torch.arange(length).float()[:, None] * inv_freq[None]
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin(), inv_freq


def joint_masks(length, block):
    """Additive attention masks of the joined input x_t + x_0 for one block size.

    Returns (for queries in x_t, [L, 2L]) and (for queries in x_0, [L, L]; those see x_0 only).
    A noisy block sees itself and the clean blocks strictly before it; a clean block sees clean blocks up to its own.
    """
    index = torch.arange(length) // block
    same = index[:, None] == index[None]
    before = index[:, None] > index[None]

    def additive(allowed):
        return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))

    return additive(torch.cat((same, before), dim=1)), additive(same | before)


def joint_block_masks(length, block, device):
    """The two masks of `joint_masks` for flex_attention, which skips tiles of 128 x 128 without a
    visible key.

    The block of a position stands in a table, not in the code, so one compiled graph serves all
    block sizes.
    """
    index = (torch.arange(2 * length, device=device) % length) // block  # of x_t, then of x_0

    def noisy(b, h, query, key):
        own = (key < length) & (index[key] == index[query])
        return own | ((key >= length) & (index[key] < index[query]))

    def clean(b, h, query, key):
        return index[key] <= index[query]

    return (create_block_mask(noisy, None, None, length, 2 * length, device=device),
            create_block_mask(clean, None, None, length, length, device=device))


def block_causal_mask(length, block):
    """Additive [L, L] mask of inference: everything up to the end of the own block is visible."""
    return joint_masks(length, block)[1]


def rotate(x, cos, sin):
    """Half-split RoPE on [B, T, H, 64]; tables are [T, 1, 64]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def plain_attention(q, k, v, mask=None):
    """bmm-softmax-bmm: with heads of 64 on a CPU this beats the library kernel by far."""
    scores = torch.matmul(q, k.transpose(-2, -1))
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(dim=-1), v)


def fused_attention(q, k, v, mask=None, causal=False):
    """The library kernel: on a GPU it keeps the scores [B, H, L, L] out of memory."""
    mask = None if mask is None or causal else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=1.0)


def attend(q, k, v, mask=None, causal=False):
    """Attention of q [B, H, L, 64], which carries the 1/sqrt(64), over k and v [B, H, T, 64].

    `mask`: None, additive [L, T], or a BlockMask (for compiled blocks). `causal` says that `mask`
    is the plain causal one, which the library kernel knows without reading it.
    """
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, scale=1.0)
    if q.device.type == "cpu":
        return plain_attention(q, k, v, mask)
    return fused_attention(q, k, v, mask, causal)


def layer_norm(x, weight):
    return F.layer_norm(x, (x.shape[-1],), weight, None, 1e-5)


class Block(nn.Module):
    """One pre-LN transformer block."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.Module()
        self.norm1.weight = nn.Parameter(torch.ones(dim))
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.Module()
        self.norm2.weight = nn.Parameter(torch.ones(dim))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))

    def qkv(self, x, cos, sin):
        """[B, T, D] -> q, k, v, each [B, H, T, 64]; q carries the 1/sqrt(64)."""
        b, t, d = x.shape
        q, k, v = self.attn_qkv(layer_norm(x, self.norm1.weight)).view(b, t, 3, self.heads, d // self.heads).unbind(2)
        q = rotate(q, cos, sin) * (d // self.heads) ** -0.5
        k = rotate(k, cos, sin)
        return tuple(a.to(v.dtype).transpose(1, 2) for a in (q, k, v))

    def merge(self, heads_out):
        b, h, t, hd = heads_out.shape
        return heads_out.transpose(1, 2).reshape(b, t, h * hd)

    def feed_forward(self, x):
        return x + self.mlp(layer_norm(x, self.norm2.weight))

    def forward(self, x, cos, sin, mask):
        """Full (mask None) or block-causal attention over x_t alone."""
        q, k, v = self.qkv(x, cos, sin)
        return self.feed_forward(x + self.attn_out(self.merge(attend(q, k, v, mask))))

    def forward_joint(self, x, cos, sin, mask_t, mask_0):
        """x_t and x_0 side by side, [B, 2L, D]; the tables are doubled too."""
        length = x.shape[1] // 2
        q, k, v = self.qkv(x, cos, sin)
        q_noisy, q_clean = q.split(length, dim=2)
        noisy = attend(q_noisy, k, v, mask_t)
        clean = attend(q_clean, k[:, :, length:], v[:, :, length:], mask_0)
        return self.feed_forward(x + self.attn_out(self.merge(torch.cat((noisy, clean), dim=2))))

    def forward_joint_last(self, x, cos, sin, mask_t):
        """The last block: nothing reads the x_0 half any more, so only x_t is carried on, [B, L, D]."""
        length = x.shape[1] // 2
        q, k, v = self.qkv(x, cos, sin)
        noisy = attend(q[:, :, :length], k, v, mask_t)
        return self.feed_forward(x[:, :length] + self.attn_out(self.merge(noisy)))


class Backbone(nn.Module):
    def __init__(self, vocab=4096, dim=256, blocks=6, heads=4, length=256):
        super().__init__()
        assert dim == heads * 64, "the attention is written for heads of 64"
        self.config = dict(vocab=vocab, dim=dim, blocks=blocks, heads=heads, length=length)
        self.vocab_embed = nn.Module()
        self.vocab_embed.embedding = nn.Parameter(torch.randn(vocab, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(blocks))
        self.output_layer = nn.Module()
        self.output_layer.norm_final = nn.Module()
        self.output_layer.norm_final.weight = nn.Parameter(torch.ones(dim))
        self.output_layer.linear = nn.Module()
        self.output_layer.linear.bias = nn.Parameter(torch.zeros(vocab))
        cos, sin, _ = rope_tables(length, dim // heads)
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)
        self._masks = {}
        self.compiled = None  # training forwards of a block by name, once compiled
        for block in self.blocks:
            for linear in (block.attn_qkv, block.mlp[0]):
                nn.init.normal_(linear.weight, std=0.6 * dim**-0.5)
            for linear in (block.attn_out, block.mlp[2]):
                nn.init.zeros_(linear.weight)  # every block starts as the identity
            nn.init.zeros_(block.mlp[0].bias)
            nn.init.zeros_(block.mlp[2].bias)

    def matrices(self):
        """The matrices that Muon trains; the first of each block is Q, K and V, one below the other."""
        return [p for b in self.blocks for p in
                (b.attn_qkv.weight, b.attn_out.weight, b.mlp[0].weight, b.mlp[2].weight)]

    def compile_blocks(self):
        """Fuse the pointwise work of the training forwards (LayerNorm, RoPE, softmax, GELU).

        Shapes are static: every new batch size or length compiles once more. All blocks share the
        code, and evaluation, whose shapes differ, does not use it.
        """
        names = ("forward", "forward_joint", "forward_joint_last")
        self.compiled = {name: torch.compile(getattr(Block, name), dynamic=False) for name in names}

    def uncompile_blocks(self):
        self.compiled = None

    def run(self, name, layer, *inputs):
        """One of the forwards of a block, compiled when training and asked for."""
        if self.training and self.compiled:
            return self.compiled[name](layer, *inputs)
        return getattr(layer, name)(*inputs)

    def masks(self, kind, length, block):
        """Masks of a forward, made once: `joint` -> (for x_t, for x_0), `causal` -> of inference."""
        device = self.cos.device
        # Uncompiled, flex_attention writes all scores; on a CPU it has no gradient.
        flex = bool(self.training and self.compiled) and device.type == "cuda"
        key = (kind, length, block, flex)
        if key not in self._masks:
            if kind == "causal":
                self._masks[key] = block_causal_mask(length, block).to(device)
            elif flex:
                self._masks[key] = joint_block_masks(length, block, device)
            else:
                self._masks[key] = tuple(m.to(device) for m in joint_masks(length, block))
        return self._masks[key]

    def embed(self, ids):
        return F.embedding(ids, self.vocab_embed.embedding) * EMBED_SCALE

    def head(self, x):
        x = layer_norm(x, self.output_layer.norm_final.weight)
        return F.linear(x, self.vocab_embed.embedding, self.output_layer.linear.bias)

    def forward(self, noisy, clean=None, block=None, rows=None):
        """Logits for x_t = `noisy` [B, L].

        block None: full attention. With `block`: if `clean` (x_0) is given, the joined training forward, else the
        plain block-causal forward of inference. `rows` (flat positions b*L + l) restricts the head to those:
        [rows, V] instead of [B, L, V].
        """
        length = noisy.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        if clean is not None:
            mask_t, mask_0 = self.masks("joint", length, block)
            x = self.embed(torch.cat((noisy, clean), dim=1))
            cos, sin = torch.cat((cos, cos)), torch.cat((sin, sin))
            for layer in self.blocks[:-1]:
                x = self.run("forward_joint", layer, x, cos, sin, mask_t, mask_0)
            x = self.run("forward_joint_last", self.blocks[-1], x, cos, sin, mask_t)
        else:
            mask = None if block is None else self.masks("causal", length, block)
            x = self.embed(noisy)
            for layer in self.blocks:
                x = self.run("forward", layer, x, cos, sin, mask)
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows)
        return self.head(x)


# ---- noise -------------------------------------------------------------------------------------------------------
#
# Drawn on the generator's device, and nothing waits for it: shapes depend on no draw. The head is
# evaluated at `most` positions, the largest number that a batch can mask: the masked ones and a few
# others of weight 0. Few, because the draws of a batch are spread evenly (systematic sampling: draw
# i of N comes from the i-th of N equal parts of the distribution, and which block or sequence gets
# it is chance), so the number of masks hardly varies: of `most` rows, 99 % are masked in a batch of
# 300 sequences under full attention, 85 % in one of 6. The head over all positions would write 2.3
# times as many logits under full attention, 1.6 times in blocks of 4: in a step of 131,072 tokens
# over 4,096 ids 1.1 GB in bf16 instead of 0.6, and in f32 twice that.

GRID = 1 << 20  # steps of the common offset of evenly spread counts, in exact integer arithmetic


@functools.lru_cache
def most_spread(draws, values):
    """The largest sum of `draws` evenly spread whole numbers of 0 .. values - 1."""
    return sum((i * GRID + GRID - 1) * values // (draws * GRID) for i in range(draws))


def pick_positions(counts, scores):
    """Boolean [N, b]: the `counts[n]` positions with the lowest score in each row."""
    return scores.argsort(dim=1).argsort(dim=1) < counts[:, None]


def mask_range(low, high, block):
    """The least and the largest count of masks in a block, from shares of it."""
    least, largest = max(1, math.ceil(low * block)), max(1, int(high * block))
    if least > largest:
        raise SystemExit(f"--small-range {low}-{high}: no whole number of masks in a block of {block}")
    return least, largest


def mask_blocks(generator, batch, length, block, low=0.0, high=1.0, count=None):
    """Mask an exact number of positions in every block of `block` tokens; position 0 of a sequence never.

    The count is uniform on the whole numbers of [max(1, low*block), high*block], or `count` everywhere. Drawing the
    count itself, with loss = mean over the masked of a block, equals the 1/t-weighted objective in expectation
    without the variance of the realised mask fraction, and visits the states of first-hitting sampling.

    Returns masked [B, L] (bool), weight [B, L] (float32; sums to 1 over the batch) and `most`.
    """
    assert length % block == 0
    device, blocks = generator.device, length // block
    n = batch * blocks
    least, largest = mask_range(low, high, block) if count is None else (count, count)
    values = largest - least + 1
    # Count i of n is least + floor((i + offset) * values / n), 0 <= offset < 1, dealt to the blocks
    # in random order: how much is masked says nothing about the place in the sequence.
    order = torch.rand(n, generator=generator, device=device).argsort()
    offset = torch.randint(GRID, (), generator=generator, device=device)
    counts = least + (order * GRID + offset) * values // (n * GRID)
    scores = torch.rand(n, block, generator=generator, device=device)
    scores.view(batch, length)[:, 0] = torch.inf
    counts.view(batch, blocks)[:, 0].clamp_(max=block - 1)
    masked = pick_positions(counts, scores)
    weight = masked / counts.clamp(min=1)[:, None] / n
    return masked.view(batch, length), weight.view(batch, length), n * least + most_spread(n, values)


def mask_rates(ranges, quantile):
    """Mask rates [N] at `quantile` [N] (float64) of the mixture `ranges`, and the largest ones that
    lie up to 1/N below it."""
    total, start = sum(p for _, _, p in ranges), 0.0
    rates, largest = torch.zeros_like(quantile), torch.zeros_like(quantile)
    for low, high, probability in ranges:
        if not probability:
            continue
        share = probability / total
        here = low + (high - low) * ((quantile - start) / share).clamp(0, 1)
        rates = torch.where(quantile >= start, here, rates)
        reached = (quantile >= start) & (quantile - 1 / len(quantile) <= start + share)
        largest = torch.where(reached, torch.maximum(largest, here), largest)
        start += share
    return rates, largest


@functools.lru_cache
def most_masked(batch, length, ranges):
    """The most positions that `mask_full` can mask in a batch."""
    ends = torch.arange(1, batch + 1, dtype=torch.float64) / batch
    return int(mask_counts(mask_rates(ranges, ends)[1], length).sum())


def mask_counts(rates, length):
    return (rates * length).round().long().clamp(1, length - 1)


def mask_full(generator, batch, length, ranges, rate=None):
    """Mask an exact number of positions of the whole sequence (block = full); position 0 never.

    `ranges` is a tuple of (low, high, probability) of the mask rate; `rate` fixes it instead.
    Returns as `mask_blocks`. What lies in which row of a batch is chance, so rates rise with the row.
    """
    device = generator.device
    if rate is None:
        offset = torch.rand((), generator=generator, device=device, dtype=torch.float64)
        rates, _ = mask_rates(ranges, (torch.arange(batch, device=device) + offset) / batch)
        most = most_masked(batch, length, ranges)
    else:
        rates = torch.full((batch,), rate, dtype=torch.float64, device=device)
        most = batch * int(mask_counts(torch.tensor(rate, dtype=torch.float64), length))
    counts = mask_counts(rates, length)
    scores = torch.rand(batch, length, generator=generator, device=device)
    scores[:, 0] = torch.inf
    masked = pick_positions(counts, scores)
    return masked, masked / counts[:, None] / batch, most


def masked_loss(model, clean, masked, weight, most, block, autocast):
    """Weighted cross-entropy at the masked positions. `clean` [B, L] int64; block None = full attention."""
    mask_id, device = model.config["vocab"] - 1, model.cos.device
    clean, masked, weight = (t.to(device) for t in (clean, masked, weight))
    noisy = clean.masked_fill(masked, mask_id)
    # Flat positions [most], the masked ones first; `nonzero` would wait for the device to count them.
    rows = masked.flatten().byte().argsort(descending=True, stable=True)[:most]
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        logits = model(noisy, None if block is None else clean, block, rows)
    loss = F.cross_entropy(logits.float(), clean.flatten()[rows], reduction="none")
    return (loss * weight.flatten()[rows]).sum()


# ---- self-test ---------------------------------------------------------------------------------------------------

def check_close(name, found, expected, tolerance):
    """Largest difference over all pairs of tensors, relative to the largest expected value."""
    worst = max(float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected))
    print(f"{name}: largest relative difference {worst:.1e}")
    if not worst <= tolerance:
        raise SystemExit(f"{name}: expected at most {tolerance:.0e}")


def check_attention(device, length=160):
    """Every way to compute attention against the plain one: output and gradients of q, k and v.

    The library has no gradient of flex_attention on a CPU, so there its output alone is compared.
    """
    generator = torch.Generator().manual_seed(0)

    def results(attention, queries, keys, *how, gradients=True, **more):
        q, k, v = (torch.randn(2, 3, n, 64, generator=generator.manual_seed(n + i)).to(device).requires_grad_(gradients)
                   for i, n in enumerate((queries, keys, keys)))
        out = attention(q * 64**-0.5, k, v, *how, **more)
        if not gradients:
            return [out]
        (out * torch.randn(out.shape, generator=generator.manual_seed(7)).to(device)).sum().backward()
        return out.detach(), q.grad, k.grad, v.grad

    both = (length, length)
    check_close("full, library kernel", results(fused_attention, *both), results(plain_attention, *both), 1e-3)
    causal = block_causal_mask(length, 1).to(device)
    expected = results(plain_attention, *both, causal)
    check_close("causal, library kernel", results(fused_attention, *both, causal, causal=True), expected, 1e-3)
    for block in (4, 16, 32):
        additive, flex = joint_masks(length, block), joint_block_masks(length, block, device)
        for name, keys, mask, block_mask in zip(("x_t", "x_0"), (2 * length, length), additive, flex):
            expected = results(plain_attention, length, keys, mask.to(device))
            found = results(fused_attention, length, keys, mask.to(device))
            check_close(f"block {block}, {name}, library kernel", found, expected, 1e-3)
            found = results(attend, length, keys, block_mask, gradients=device != "cpu")
            check_close(f"block {block}, {name}, flex", found, expected, 1e-3)


def check_compiled(device, length=256):
    """Loss and gradient of the compiled blocks against those of the plain ones, in bf16."""
    torch.manual_seed(0)
    model = Backbone(vocab=512, dim=128, blocks=3, heads=2, length=length).to(device).train()
    with torch.no_grad():
        for matrix in model.matrices():  # none of them zero, so that every gradient counts
            matrix.normal_(std=0.05)
    generator = torch.Generator(device).manual_seed(1)
    clean = torch.randint(2, 511, (8, length), generator=generator, device=device)
    for block in (None, 4, 16):
        noise = (mask_full(generator, 8, length, ((0.05, 1.0, 1.0),)) if block is None
                 else mask_blocks(generator, 8, length, block))
        found = []
        for compiled in (False, True):
            model.zero_grad()
            model.compile_blocks() if compiled else model.uncompile_blocks()
            loss = masked_loss(model, clean, *noise, block, True)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters())])
        check_close(f"compiled blocks, {'full' if block is None else f'block {block}'}", found[1], found[0], 0.1)


def check_noise(device):
    """Exact counts, position 0 free, weights that sum to 1, at most `most`, the right mean rates."""
    generator, ranges = torch.Generator(device).manual_seed(2), ((0.05, 0.6, 0.75), (0.6, 1.0, 0.25))
    overlapping = ((0.0, 1.0, 1.0), (0.4, 0.6, 1.0))
    cases = [  # name, mean rate, block, draw
        ("full, batch 6", 0.44375, None, lambda: mask_full(generator, 6, 256, ranges)),
        ("full, batch 300", 0.44375, None, lambda: mask_full(generator, 300, 256, ranges)),
        ("full, overlapping ranges", 0.5, None, lambda: mask_full(generator, 50, 256, overlapping)),
        *((f"block {b}", (b + 1) / 2 / b, b, lambda b=b: mask_blocks(generator, 32, 256, b)) for b in (1, 4, 16, 64)),
        ("block 16, clipped", 23 / 32, 16, lambda: mask_blocks(generator, 32, 256, 16, 0.45, 0.95)),
    ]
    for name, rate, block, draw in cases:
        share, rows = [], []
        for _ in range(50):
            masked, weight, most = draw()
            count = masked.sum(1) if block is None else masked.view(len(masked), -1, block).sum(2)
            share.append(float(masked.float().mean()))
            rows.append(int(masked.sum()) / most)
            around = count[:, None] if block is None else count.repeat_interleave(block, 1)
            expected = masked / around.clamp(min=1) / count.numel()
            # The block of one that holds position 0 has nothing to mask; any other block has something.
            empty = len(masked) if block == 1 else 0
            total = 1 - empty / count.numel()
            if (masked[:, 0].any() or max(rows) > 1 or int((count == 0).sum()) != empty
                    or abs(float(weight.sum()) - total) > 1e-4 or not torch.allclose(weight, expected)):
                raise SystemExit(f"noise, {name}: wrong counts or weights")
        mean = sum(share) / len(share)
        print(f"noise, {name}: {mean:.4f} masked, expected about {rate:.4f}; {min(rows):.3f} of the rows used at least")
        if abs(mean - rate) > 0.03:
            raise SystemExit(f"noise, {name}: expected a mean rate of {rate:.4f}")


def main():
    ap = argparse.ArgumentParser(description="Check the attention, the compiled blocks and the noise.")
    ap.add_argument("--self-test", action="store_true", required=True)
    ap.add_argument("--device", default="cpu", help="cpu or cuda; blocks are compiled on cuda only")
    args = ap.parse_args()
    check_attention(args.device)
    if args.device != "cpu":
        check_compiled(args.device)
    check_noise(args.device)


if __name__ == "__main__":
    main()
