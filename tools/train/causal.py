"""An autoregressive decoder in the Qwen2 layout, the judge of generated text.

Same size, tokenizer and data as the diffusion model, so its perplexities are relative figures, good for comparing texts
with each other. Parameter names equal the published ones without the `model.` prefix. As in model.py, embedding and head
share one matrix E here: the network reads `EMBED_SCALE * E` and writes `RMS(x) @ E.T`; the export writes both.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import EMBED_SCALE, attend, rope_tables, rotate

RMS_EPS = 1e-6


class RmsNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, RMS_EPS)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x, cos, sin, mask):
        b, t, d = x.shape
        q, k, v = (p(x).view(b, t, self.heads, d // self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin) * (d // self.heads) ** -0.5, rotate(k, cos, sin)
        q, k, v = (a.to(v.dtype).transpose(1, 2) for a in (q, k, v))
        return self.o_proj(attend(q, k, v, mask, causal=True).transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    def __init__(self, dim, wide):
        super().__init__()
        self.gate_proj = nn.Linear(dim, wide, bias=False)
        self.up_proj = nn.Linear(dim, wide, bias=False)
        self.down_proj = nn.Linear(wide, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, dim, heads, wide, dropout):
        super().__init__()
        self.input_layernorm, self.self_attn = RmsNorm(dim), Attention(dim, heads)
        self.post_attention_layernorm, self.mlp = RmsNorm(dim), Mlp(dim, wide)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cos, sin, mask):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """ids [B, L] -> logits [B, L, V]; those at position i predict token i + 1."""

    def __init__(self, vocab=4096, dim=256, blocks=6, heads=4, length=256, dropout=0.1):
        super().__init__()
        self.config = dict(vocab=vocab, dim=dim, blocks=blocks, heads=heads, length=length)
        self.embed_tokens = nn.Module()
        self.embed_tokens.weight = nn.Parameter(torch.randn(vocab, dim) * 0.02)
        self.layers = nn.ModuleList(Layer(dim, heads, 3 * dim, dropout) for _ in range(blocks))
        self.norm = RmsNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.compiled = None  # the training forward of a layer, once compiled
        cos, sin, _ = rope_tables(length, dim // heads)
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("mask", torch.zeros(length, length).masked_fill(future, float("-inf")), persistent=False)
        for layer in self.layers:
            attn, mlp = layer.self_attn, layer.mlp
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj):
                nn.init.normal_(linear.weight, std=0.6 * dim**-0.5)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            for linear in (attn.o_proj, mlp.down_proj):
                nn.init.zeros_(linear.weight)  # every layer starts as the identity

    def matrices(self):
        """The matrices that Muon trains."""
        return [p for layer in self.layers for p in layer.parameters() if p.dim() == 2]

    def compile_blocks(self):
        """Fuse the pointwise work of the training forward; shapes are static, layers share the code."""
        self.compiled = torch.compile(Layer.forward, dynamic=False)

    def uncompile_blocks(self):
        self.compiled = None

    def forward(self, ids):
        length = ids.shape[1]
        x = self.dropout(F.embedding(ids, self.embed_tokens.weight) * EMBED_SCALE)
        run = self.compiled if self.training and self.compiled else Layer.forward
        for layer in self.layers:
            x = run(layer, x, self.cos[:length], self.sin[:length], self.mask[:length, :length])
        return F.linear(self.norm(x), self.embed_tokens.weight)


def next_token_losses(model, ids, autocast):
    """Cross-entropy in nats of tokens 1 .. L-1 given those before, [B, L - 1]."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        logits = model(ids[:, :-1])
    targets = ids[:, 1:]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
