"""Turns a published joint sampler into a directory that `redraft --joint` opens.

  python tools/train_joint/convert.py CHECKPOINT --base MODEL_DIR --out DIR

CHECKPOINT is what ADJUST's code saves (arXiv 2509.22738): a Lightning checkpoint or a safetensors file in which the sampler's tensors are named
`drafter.*`, with whatever else beside them. Kept as they are, less the prefix: `down_project.0`, `norm_embed.0`, `norm_hidden.0`, `norm_postattn.0`
and `layers.0.0.*`. Refused: parameters that are not shared between calls, more than one layer, a layer without attention, features of several
layers. Needs torch and safetensors.
"""
import argparse
import json
import pathlib
import re
import sys

import torch
from safetensors.torch import load_file, save_file

FIRST = "down_project.0.weight"
# By model_type: the name that the engine has for the family, and the keys of its sizes.
LLAMA = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
FAMILIES = {
    "Dream": ("dream", LLAMA),
    "llada": ("llada", ("d_model", "n_heads", "n_kv_heads", "mlp_hidden_size", ("embedding_size", "vocab_size"))),
    "sdar": ("sdar", LLAMA),
    "bd3lm": ("bd3lm", ("hidden_dim", "n_heads", "n_heads", None, "vocab_size")),
}
NAMES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")


def tensors(path):
    """The sampler's tensors without what stands in front of their names."""
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    found = [name for name in state if name.endswith(FIRST)]
    if len(found) != 1:
        raise SystemExit(f"{path}: expected one tensor named *{FIRST}, found {found or 'none'}")
    prefix = found[0].removesuffix(FIRST)
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def problems(state):
    """Why the engine cannot run these parameters."""
    copies = {name for name in state if re.match(r"(down_project|norm_embed|norm_hidden|norm_postattn)\.[1-9]|layers\.[1-9]", name)}
    layers = {name for name in state if re.match(r"layers\.0\.[1-9]", name)}
    if copies:
        yield f"parameters of their own for every call ({min(copies)}): expected shared ones"
    if layers:
        yield f"more than one layer ({min(layers)})"
    if any(name.startswith("features_linear_layer") for name in state):
        yield "features of several layers (features_linear_layer): expected those of the last alone"
    if not any(name.startswith("layers.0.0.") and ("q_proj" in name or "attn_qkv" in name) for name in state):
        yield "a layer without attention"


def sizes(base):
    """config.json of the sampler, from that of its model."""
    config = json.loads((base / "config.json").read_text())
    if config.get("model_type") not in FAMILIES:
        raise SystemExit(f"{base}: model_type {config.get('model_type')!r}: expected one of {', '.join(FAMILIES)}")
    family, keys = FAMILIES[config["model_type"]]
    value = lambda key: next(config[k] for k in ((key,) if isinstance(key, str) else key) if config.get(k) is not None)
    out = {"model_type": "joint-sampler", "base_family": family}
    return out | {name: 4 * config["hidden_dim"] if key is None else value(key) for name, key in zip(NAMES, keys)}


def main():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("checkpoint", type=pathlib.Path)
    parse.add_argument("--base", type=pathlib.Path, required=True, help="directory of the model it was trained over")
    parse.add_argument("--out", type=pathlib.Path, required=True)
    o = parse.parse_args()
    state, config = tensors(o.checkpoint), sizes(o.base)
    if found := list(problems(state)):
        raise SystemExit(f"{o.checkpoint}: " + "; ".join(found))
    width = state[FIRST].shape
    if tuple(width) != (config["hidden_size"], 2 * config["hidden_size"]):
        raise SystemExit(f"{o.checkpoint}: {FIRST} is {tuple(width)}, the model's width is {config['hidden_size']}")
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: t.contiguous() for name, t in state.items()}, o.out / "model.safetensors", metadata={"format": "pt"})
    print(f"{o.out}: {len(state)} tensors, {sum(t.numel() for t in state.values()):,} parameters", file=sys.stderr)


if __name__ == "__main__":
    main()
