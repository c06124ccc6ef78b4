"""The frozen BD3-LM and the one-layer sampler over it (ADJUST, arXiv 2509.22738), for training.

Shapes: B sequences, L positions, D model width, V vocabulary entries. Names of the sampler's parameters are the published ones.
"""
import json
import pathlib
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "train"))
from model import Block, attend, joint_masks, layer_norm, rope_tables  # noqa: E402
from shards import read_weights  # noqa: E402

EPS = 1e-5


def rms(x, weight):
    return F.rms_norm(x.float(), (x.shape[-1],), weight, EPS)


def beside(block, x, past, rotations, mask):
    """`block` over x_t [B, L, D] with the keys and values `past` of x_0 behind its own; `mask` is [L, 2L]."""
    q, *own = block.qkv(x, *rotations)
    k, v = (torch.cat(pair, 2) for pair in zip(own, past))
    return block.feed_forward(x + block.attn_out(block.merge(attend(q, k, v, mask))))


class Base(nn.Module):
    """A BD3-LM directory (`adaln: false`) without gradients."""

    def __init__(self, directory):
        super().__init__()
        self.config = config = json.loads((pathlib.Path(directory) / "config.json").read_text())
        if config.get("adaln", True):
            raise SystemExit(f"{directory}: a sampler is trained over models without adaLN; fold it into the weights first")
        state = {name.removeprefix("backbone."): t.float() for name, t in read_weights(directory).items()}
        dim, heads = config["hidden_dim"], config["n_heads"]
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(config["n_blocks"]))
        self.blocks.load_state_dict({n.removeprefix("blocks."): t for n, t in state.items() if n.startswith("blocks.")})
        self.register_buffer("table", state["vocab_embed.embedding"])
        self.register_buffer("head", state["output_layer.linear.weight"])
        self.register_buffer("bias", state["output_layer.linear.bias"])
        self.register_buffer("final", state["output_layer.norm_final.weight"])
        cos, sin, _ = rope_tables(config["model_length"], dim // heads)
        self.register_buffer("cos", cos[:, None])
        self.register_buffer("sin", sin[:, None])
        self.mask_id = config["mask_token_id"]
        # What the engine never draws, besides MASK: padding.
        self.banned = [self.mask_id] + [i for i in [config.get("pad_token_id")] if i not in (None, config["eos_token_id"])]
        self.requires_grad_(False)

    @property
    def device(self):
        return self.table.device

    def rotations(self, length):
        return self.cos[:length], self.sin[:length]

    @torch.no_grad()
    def states(self, ids):
        """Final rows under full attention, [B, L, D]."""
        x, (cos, sin) = F.embedding(ids, self.table), self.rotations(ids.shape[1])
        for block in self.blocks:
            x = block(x, cos, sin, None)
        return layer_norm(x, self.final)

    @torch.no_grad()
    def block_states(self, noisy, clean, masks):
        """Final rows under block attention: (those of every x_t in `noisy`, a list of [B, L]; those of x_0 [B, L]), each [B, L, D]. A noisy block
        sees itself and the clean blocks before it; x_0 is run once for all of them. `masks` as of `joint_masks`."""
        rotations, count = self.rotations(clean.shape[1]), len(noisy)
        x, prefix = F.embedding(torch.cat(noisy), self.table), F.embedding(clean, self.table)
        for block in self.blocks:
            past = block.qkv(prefix, *rotations)[1:]
            prefix = block(prefix, *rotations, masks[1])
            x = beside(block, x, [t.repeat(count, 1, 1, 1) for t in past], rotations, masks[0])
        *x, prefix = layer_norm(torch.cat((x, prefix)), self.final).split(len(clean))
        return x, prefix

    def log_probs(self, rows):
        """(rows, V), what is never drawn left out."""
        logits = F.linear(rows, self.head, self.bias).float()
        logits[:, self.banned] = -torch.inf
        return logits.log_softmax(-1)


class Sampler(nn.Module):
    """h <- h + rms_p(layer(W_d [rms_e(E[x]); rms_h(h)] + b_d)), the same parameters in every call."""

    def __init__(self, base):
        super().__init__()
        dim, heads = base.config["hidden_dim"], base.config["n_heads"]
        self.down_project = nn.ModuleList([nn.Linear(2 * dim, dim)])
        self.layers = nn.ModuleList([nn.ModuleList([Block(dim, heads)])])
        for name in ("norm_embed", "norm_hidden", "norm_postattn"):
            module = nn.Module()
            module.weight = nn.Parameter(torch.ones(dim))
            setattr(self, name, nn.ModuleList([module]))
        # The first call changes little, and the layer begins as the identity.
        nn.init.constant_(self.norm_postattn[0].weight, 0.02)
        layer = self.layers[0][0]
        for weight in (layer.attn_out.weight, layer.mlp[2].weight, layer.mlp[2].bias):
            nn.init.zeros_(weight)

    def matrices(self):
        """What Muon trains."""
        layer = self.layers[0][0]
        return [m.weight for m in (self.down_project[0], layer.attn_qkv, layer.attn_out, layer.mlp[0], layer.mlp[2])]

    def load(self, directory):
        self.load_state_dict({name: t.float() for name, t in read_weights(directory).items()})

    def inputs(self, base, ids, h):
        e = rms(F.embedding(ids, base.table), self.norm_embed[0].weight)
        return self.down_project[0](torch.cat((e, rms(h, self.norm_hidden[0].weight)), -1))

    def forward(self, base, ids, h):
        """One call under full attention."""
        cos, sin = base.rotations(ids.shape[1])
        return h + rms(self.layers[0][0](self.inputs(base, ids, h), cos, sin, None), self.norm_postattn[0].weight)

    def prefix(self, base, clean, h):
        """Keys and values of x_0, which no call changes."""
        return self.layers[0][0].qkv(self.inputs(base, clean, h), *base.rotations(clean.shape[1]))[1:]

    def in_blocks(self, base, ids, h, prefix, masks):
        """One call inside the blocks, behind [`prefix`]."""
        v = beside(self.layers[0][0], self.inputs(base, ids, h), prefix, base.rotations(ids.shape[1]), masks[0])
        return h + rms(v, self.norm_postattn[0].weight)

    def save(self, directory, base, facts):
        """A sampler's directory: what `redraft --joint` opens. `facts` are kept in config.json for the reader."""
        directory.mkdir(parents=True, exist_ok=True)
        config = base.config
        sizes = {
            "model_type": "joint-sampler",
            "base_family": config["model_type"],
            "hidden_size": config["hidden_dim"],
            "vocab_size": config["vocab_size"],
            "num_attention_heads": config["n_heads"],
            "num_key_value_heads": config["n_heads"],
            "intermediate_size": 4 * config["hidden_dim"],
        }
        (directory / "config.json").write_text(json.dumps(sizes | facts, indent=2) + "\n")
        state = {name: t.detach().bfloat16().cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

