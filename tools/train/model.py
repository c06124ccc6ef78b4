"""The BD3-LM transformer (`adaln: false`, no time input) with the mix-scale training forward.

Shapes: B sequences, L tokens, D model width, H heads of size 64, V vocabulary entries.

Parameter names equal the published tensor names (without the `backbone.` prefix), with one difference: here the
input embedding and the head share one matrix E. The network reads `EMBED_SCALE * E` and writes `LN(x) @ E.T + bias`;
`export.py` writes the two matrices separately, so nothing of this is visible from outside.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

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


def block_causal_mask(length, block):
    """Additive [L, L] mask of inference: everything up to the end of the own block is visible."""
    return joint_masks(length, block)[1]


def rotate(x, cos, sin):
    """Half-split RoPE on [B, T, H, 64]; tables are [T, 1, 64]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def attend(q, k, v, mask):
    """Plain bmm-softmax-bmm: with heads of 64 on a CPU this beats the library kernel by far."""
    scores = torch.matmul(q, k.transpose(-2, -1))
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(dim=-1), v)


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
        """Fuse the pointwise work of the blocks (LayerNorm, RoPE, softmax, GELU); shapes are static."""
        for block in self.blocks:
            block.forward = torch.compile(block.forward)
            block.forward_joint = torch.compile(block.forward_joint)
            block.forward_joint_last = torch.compile(block.forward_joint_last)

    def masks(self, kind, length, block):
        key = (kind, length, block)
        if key not in self._masks:
            make = joint_masks if kind == "joint" else block_causal_mask
            mask = make(length, block)
            device = self.cos.device
            self._masks[key] = tuple(m.to(device) for m in mask) if kind == "joint" else mask.to(device)
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
                x = layer.forward_joint(x, cos, sin, mask_t, mask_0)
            x = self.blocks[-1].forward_joint_last(x, cos, sin, mask_t)
        else:
            mask = None if block is None else self.masks("causal", length, block)
            x = self.embed(noisy)
            for layer in self.blocks:
                x = layer.forward(x, cos, sin, mask)
        if rows is not None:
            x = x.reshape(-1, x.shape[-1])[rows]
        return self.head(x)


# ---- noise -------------------------------------------------------------------------------------------------------

def pick_positions(counts, scores, exempt_first):
    """Boolean [N, b]: the `counts[n]` positions with the lowest score in each row; column 0 is left out if asked."""
    if exempt_first is not None:
        scores[exempt_first, 0] = np.inf
    rank = scores.argsort(axis=1).argsort(axis=1)
    return rank < counts[:, None]


def mask_blocks(rng, batch, length, block, low=0.0, high=1.0, count=None):
    """Mask an exact number of positions in every block of `block` tokens; position 0 of a sequence never.

    The count is uniform on the whole numbers of [max(1, low*block), high*block], or `count` everywhere. Drawing the
    count itself, with loss = mean over the masked of a block, equals the 1/t-weighted objective in expectation
    without the variance of the realised mask fraction, and visits the states of first-hitting sampling.

    Returns masked [B, L] (bool) and weight [B, L] (float32; sums to 1 over the batch).
    """
    assert length % block == 0
    blocks = length // block
    n = batch * blocks
    least, most = max(1, int(np.ceil(low * block))), max(1, int(high * block))
    counts = rng.integers(least, most + 1, n) if count is None else np.full(n, count)
    first = np.arange(0, n, blocks)  # the block that holds position 0
    counts[first] = np.minimum(counts[first], block - 1)
    masked = pick_positions(counts, rng.random((n, block)), first)
    weight = masked / np.maximum(counts, 1)[:, None] / n
    return masked.reshape(batch, length), weight.reshape(batch, length).astype(np.float32)


def mask_full(rng, batch, length, ranges, rate=None):
    """Mask an exact number of positions of the whole sequence (block = full); position 0 never.

    `ranges` is a list of (low, high, probability) of the mask rate; `rate` fixes it instead.
    """
    if rate is None:
        low, high, prob = (np.array(c) for c in zip(*ranges))
        which = rng.choice(len(prob), batch, p=prob / prob.sum())
        rates = rng.uniform(low[which], high[which])
    else:
        rates = np.full(batch, rate)
    counts = np.clip(np.round(rates * length).astype(int), 1, length - 1)
    masked = pick_positions(counts, rng.random((batch, length)), np.arange(batch))
    weight = masked / counts[:, None] / batch
    return masked, weight.astype(np.float32)


def masked_loss(model, clean, masked, weight, block, autocast):
    """Weighted cross-entropy at the masked positions. `clean` [B, L] int64; block None = full attention."""
    mask_id, device = model.config["vocab"] - 1, model.cos.device
    clean, masked_t = clean.to(device), torch.from_numpy(masked).to(device)
    noisy = clean.masked_fill(masked_t, mask_id)
    rows = torch.from_numpy(np.flatnonzero(masked)).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        logits = model(noisy, None if block is None else clean, block, rows)
    loss = F.cross_entropy(logits.float(), clean.reshape(-1)[rows], reduction="none")
    return (loss * torch.from_numpy(weight).to(device).reshape(-1)[rows]).sum()
