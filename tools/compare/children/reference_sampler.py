"""Runs an official sampler, from its authors' checkout and unchanged, over one of our checkpoints.

  python tools/compare/children/reference_sampler.py llada --path DIR --model CHECKPOINT \\
      --length 96 --prompt '[1,2,3]' --threads 2

Prints one JSON object: for each text its tokens, and the median and best of --runs in ms.

`llada` is `generate` of generate.py (ML-GSAI/LLaDA), given a network in PyTorch that is written
here, since the published one is with the weights: Llama's under full attention. `bd3lms` is
`_semi_ar_sampler` of diffusion.py with all that it calls (kuleshov-group/bd3lms), over the network
of models/hf/modeling_bd3lm.py; what is changed so that it runs on a CPU stands in
tools/fixtures/official.py. Its class needs a trainer around it, so the methods are taken out of the
file as they are and called on a stand-in.

What is not theirs: MASK has no probability in LLaDA's logits, because this engine never writes one;
and for `greedy` of bd3lms `torch.randint` answers 0, so that the order is left to right.
"""

import argparse
import ast
import json
import pathlib
import statistics
import sys
import time
import types

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent.parent


def read_tensors(directory):
    state = {}
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, "pt") as f:
            state |= {name: f.get_tensor(name).float() for name in f.keys()}
    if not state:
        raise SystemExit(f"{directory}: no model*.safetensors")
    return state


# --- LLaDA ---


class Llada(nn.Module):
    """LLaDA's network: T rows, H heads of D, full attention."""

    device = torch.device("cpu")

    def __init__(self, directory):
        super().__init__()
        self.config = c = json.loads((directory / "config.json").read_text())
        if c.get("model_type") != "llada" or "d_model" not in c or c["n_kv_heads"] != c["n_heads"]:
            raise SystemExit(f"{directory}: expected a dense LLaDA with as many K/V heads as heads")
        self.state = {name.removeprefix("model.transformer."): value for name, value in read_tensors(directory).items()}
        self.heads, self.dim = c["n_heads"], c["d_model"] // c["n_heads"]
        inverse = 1.0 / c["rope_theta"] ** (torch.arange(0, self.dim, 2).float() / self.dim)
        angle = torch.arange(c["max_sequence_length"])[:, None] * inverse[None]
        angle = torch.cat((angle, angle), dim=-1)  # (length, D)
        self.cos, self.sin = angle.cos(), angle.sin()

    def norm(self, x, name):
        return F.rms_norm(x, (x.shape[-1],), self.state[name + ".weight"], self.config["rms_norm_eps"])

    def rotate(self, x):
        low, high = x.chunk(2, dim=-1)
        rows = x.shape[-2]
        return x * self.cos[:rows] + torch.cat((-high, low), dim=-1) * self.sin[:rows]

    @torch.no_grad()
    def __call__(self, ids, attention_mask=None):
        batch, rows = ids.shape
        x = self.state["wte.weight"][ids]
        for i in range(self.config["n_layers"]):
            at = f"blocks.{i}."
            h = self.norm(x, at + "attn_norm")
            q, k, v = (F.linear(h, self.state[f"{at}{name}_proj.weight"]).view(batch, rows, self.heads, self.dim).transpose(1, 2) for name in "qkv")
            a = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
            x = x + F.linear(a.transpose(1, 2).reshape(batch, rows, -1), self.state[at + "attn_out.weight"])
            h = self.norm(x, at + "ff_norm")
            h = F.silu(F.linear(h, self.state[at + "ff_proj.weight"])) * F.linear(h, self.state[at + "up_proj.weight"])
            x = x + F.linear(h, self.state[at + "ff_out.weight"])
        logits = F.linear(self.norm(x, "ln_f"), self.state["wte.weight" if self.config["weight_tying"] else "ff_out.weight"])
        logits[..., self.config["mask_token_id"]] = -torch.inf
        return types.SimpleNamespace(logits=logits)


def llada(o):
    file = o.path / "generate.py" if o.path.is_dir() else o.path
    loop = types.ModuleType("llada_generate")
    exec(compile(file.read_text(), str(file), "exec"), loop.__dict__)
    model = Llada(o.model)
    prompt = torch.tensor([o.prompt])

    def run():
        out = loop.generate(model, prompt, steps=o.steps * (o.length // o.block), gen_length=o.length, block_length=o.block,
                            temperature=0.0, cfg_scale=0.0, remasking="low_confidence", mask_id=model.config["mask_token_id"])
        return out[0, len(o.prompt) :].tolist()

    return {"greedy": run}


# --- BD3-LM ---

METHODS = ("_semi_ar_sampler", "_ddpm_caching_update", "_nucleus_sample", "_sample_prior", "_check_stop_conds", "_compute_entropy",
           "_sigma_from_p", "_process_sigma", "_subs_parameterization", "forward")


def methods_of(file, scope):
    """`METHODS` of the class Diffusion and the functions beside it, compiled as they stand."""
    tree = ast.parse(file.read_text())
    outside = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    (diffusion,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Diffusion"]
    inside = [node for node in diffusion.body if isinstance(node, ast.FunctionDef) and node.name in METHODS]
    lacking = set(METHODS) - {node.name for node in inside}
    if lacking:
        raise SystemExit(f"{file}: no {', '.join(sorted(lacking))} in Diffusion")
    exec(compile(ast.Module(body=outside + inside, type_ignores=[]), str(file), "exec"), scope)
    return {name: scope[name] for name in METHODS}


def bd3lms(o):
    sys.path.insert(0, str(ROOT / "tools" / "fixtures"))
    import official

    config_class, model_class = official.load_bd3lm(o.path)
    values = json.loads((o.model / "config.json").read_text())
    config = config_class(**{key: value for key, value in values.items() if key not in ("architectures", "auto_map", "torch_dtype")})
    model = model_class(config)
    missing, extra = model.load_state_dict(read_tensors(o.model), strict=False)
    if extra or any(not name.startswith("sampling_eps") for name in missing):
        raise SystemExit(f"{o.model}: tensors do not fit the official network: missing {missing}, unknown {extra}")
    model.eval().float()
    noise = {}
    exec(compile((o.path / "noise_schedule.py").read_text(), "noise_schedule.py", "exec"), noise)

    class Backbone:
        def __call__(self, x, sigma, store_kv=False, sample_mode=False):
            return model(input_ids=x, timesteps=sigma, sample_mode=sample_mode, store_kv=store_kv, output_hidden_states=False, return_dict=False)

        def reset_kv_cache(self, eval_batch_size):
            official.reset_cache(model)

    scope = {"torch": torch, "np": np, "F": F, "tqdm": lambda steps, **_: steps}
    standin = type("Diffusion", (), methods_of(o.path / "diffusion.py", scope))()
    names = types.SimpleNamespace
    standin.__dict__.update(
        config=names(
            model=names(length=config.model_length),
            algo=names(name="bd3lm", backbone="hf_dit"),
            sampling=names(kv_cache=True, first_hitting=True, nucleus_p=0.9, var_length=False),
            loader=names(eval_batch_size=1),
        ),
        backbone=Backbone(), noise=noise["LogLinearNoise"](), tokenizer=names(bos_token_id=o.prompt[0], eos_token_id=o.prompt[0]),
        block_size=config.block_size, mask_index=config.vocab_size - 1, vocab_size=config.vocab_size, cross_attn=True,
        parameterization="subs", time_conditioning=False, neg_infinity=-1e6, device=torch.device("cpu"), dtype=torch.float32,
    )
    strides, rest = divmod(o.length + 1, config.block_size)
    if rest:
        raise SystemExit(f"--length {o.length}: BOS and the text must fill whole blocks of {config.block_size}")

    def run(nucleus):
        standin.config.sampling.nucleus_p = nucleus
        # Steps are an upper bound under the first-hitting sampler, which ends with the block.
        x, _ = standin._semi_ar_sampler(n_samples=1, num_steps=5000, num_strides=strides, seqlen=None, context_size=config.model_length)
        if x is None:
            raise SystemExit("the official sampler rejected its own text (entropy below 4)")
        return x[0, 1:].tolist()

    def greedy():
        random = torch.randint
        torch.randint = lambda low, high, size, **_: torch.zeros(size, dtype=torch.long)
        try:
            return run(0.0)
        finally:
            torch.randint = random

    return {"greedy": greedy, "drawn": lambda: run(0.9)}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=("llada", "bd3lms"))
    parser.add_argument("--path", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--block", type=int, default=32, help="llada: positions decoded together")
    parser.add_argument("--steps", type=int, default=8, help="llada: forwards of a block")
    parser.add_argument("--prompt", type=json.loads, required=True, help="JSON array of ids; of bd3lms BOS alone")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--check-only", action="store_true", help="greedy tokens and no times")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    texts = {"llada": llada, "bd3lms": bd3lms}[o.kind](o)
    answer = {"torch": torch.__version__, "texts": {}}
    for name, run in texts.items():
        if o.check_only and name != "greedy":
            continue
        tokens, times = run(), []
        for _ in range(0 if o.check_only else o.runs):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        answer["texts"][name] = {"tokens": tokens} | ({"median": statistics.median(times), "best": min(times)} if times else {})
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
