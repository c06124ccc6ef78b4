"""A joint distribution small enough to enumerate, and how far from it each way of revealing several tokens is.

  python toy.py make DIR [--redraft BINARY]           # model, trajectories, sampler, distribution.json
  python toy.py measure DIR [--out FILE.json]         # total-variation distances to it, drawn by the engine

Eight positions of two symbols with a random pairwise energy, symmetric under flipping all: p(s) ~ exp(sum_{i<j} J_ij s_i s_j), J_ij ~ N(0, 0.5^2).
Every position alone is a fair coin, so tokens revealed together, each by its own distribution, know nothing of each other. The model is a BD3-LM of
two layers, fitted to the exact conditionals of all 3^8 - 2^8 states with something masked; the sampler is trained as any other.
"""
import argparse
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "train"))
from export import bd3lm_config, bd3lm_tensors  # noqa: E402
from model import Backbone  # noqa: E402
from optim import Muon  # noqa: E402

LENGTH = 8
BOS, PAD, FIRST, MASK = 0, 1, 2, 4
ENTROPY = "block=full,unmask=entropy:"
ROWS = [("one token", f"{ENTROPY}1")] + [
    (f"{name} {k}", f"{ENTROPY}{k}{more}") for k in (2, 4, 8) for name, more in (("marginal", ""), ("joint", ",sampler=joint"))
]


def distribution(seed):
    """(outcomes [256, 8] of 0 and 1, probabilities [256])."""
    outcomes = np.array(list(itertools.product((0, 1), repeat=LENGTH)))
    spins = 2 * outcomes - 1
    energy = np.triu(np.random.default_rng(seed).normal(0, 0.5, (LENGTH, LENGTH)), 1)
    weight = np.exp(np.einsum("si,ij,sj->s", spins, energy, spins))
    return outcomes, weight / weight.sum()


def conditionals(outcomes, p):
    """(states [N, 8] of 0, 1 and 2 = masked, p(symbol 1 at i | what is revealed) [N, 8]) of all states with something masked."""
    states = np.array([s for s in itertools.product((0, 1, 2), repeat=LENGTH) if 2 in s])
    agrees = ((states[:, None] == 2) | (states[:, None] == outcomes[None])).all(-1) * p
    return states, (agrees @ outcomes) / agrees.sum(-1, keepdims=True)


def fit(states, target, steps, seed):
    """A model whose conditionals are those of the table, and the worst mean divergence left, nats."""
    torch.manual_seed(seed)
    model = Backbone(vocab=5, dim=64, blocks=2, heads=1, length=LENGTH + 1)
    ids = F.pad(torch.from_numpy(np.where(states == 2, MASK, states + FIRST)), (1, 0), value=BOS)
    target = torch.from_numpy(np.stack((1 - target, target), -1)).float()
    muon = Muon(model.matrices(), weight_decay=0.0)
    taken = {id(p) for p in muon.params}
    adam = torch.optim.Adam([p for p in model.parameters() if id(p) not in taken], betas=(0.9, 0.99))

    def divergence(rows):
        found = model(ids[rows])[:, 1:].log_softmax(-1)[..., FIRST : FIRST + 2]
        terms = torch.special.xlogy(target[rows], target[rows]) - target[rows] * found
        masked = ids[rows, 1:] == MASK
        return terms.sum(-1)[masked].mean()

    for step in range(steps):
        rate = min(1.0, (step + 1) / 50) * (1 - step / steps)
        loss = divergence(torch.randint(len(ids), (512,)))
        model.zero_grad()
        loss.backward()
        muon.step(0.02 * rate)
        adam.param_groups[0]["lr"] = 3e-3 * rate
        adam.step()
    with torch.no_grad():
        return model, float(divergence(torch.arange(len(ids))))


def run(redraft, directory, schedule, samples, seed, *more):
    """Lines of `generate --format json`: unconditional, undistorted."""
    command = [redraft, "generate", "--model", directory, "--prompt", "", "--length", str(LENGTH), "--ignore-eos", "--temperature", "1", "--top-p", "1"]
    command += ["--samples", str(samples), "--seed", str(seed), "--stage", schedule, "--format", "json", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        yield from process.stdout
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {process.returncode}")


def make(o):
    outcomes, p = distribution(o.seed)
    states, target = conditionals(outcomes, p)
    model, left = fit(states, target, o.steps, o.seed)
    print(f"model: divergence from the exact conditionals {left:.5f} nats")
    o.dir.mkdir(parents=True, exist_ok=True)
    config, weights = bd3lm_config(model.config, torch.float32, LENGTH + 1), bd3lm_tensors(model.state_dict(), model.config, torch.float32)
    save_file(weights, o.dir / "model.safetensors", metadata={"format": "pt"})
    (o.dir / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (o.dir / "distribution.json").write_text(json.dumps({"first_symbol": FIRST, "probabilities": [round(v, 9) for v in p.tolist()]}) + "\n")
    words = {"<|endoftext|>": BOS, "<|pad|>": PAD, "a": FIRST, "b": FIRST + 1, "<|mask|>": MASK}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>", "<|mask|>"])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(o.dir / "tokenizer.json"))
    trace = o.dir / "trace.jsonl"
    for _ in run(o.redraft, o.dir, f"{ENTROPY}1", 6000, 1, "--trace", trace):
        pass
    train = [sys.executable, HERE / "train.py", "--model", o.dir, "--full", trace, "--out", o.dir / "joint", "--minutes", str(o.minutes), "--batch", "256"]
    subprocess.run([*train, "--muon-lr", "0.01", "--look", "1"], check=True)
    trace.unlink()


def total_variation(counts, p):
    return 0.5 * (np.abs(counts[:-1] / counts.sum() - p).sum() + counts[-1] / counts.sum())


def measure(o):
    p = np.array(json.loads((o.dir / "distribution.json").read_text())["probabilities"])
    rng, places = np.random.default_rng(0), 1 << np.arange(LENGTH)[::-1]
    # Any sample has a distance: that of exact draws, as many.
    exact = [total_variation(np.append(rng.multinomial(o.samples, p / p.sum()), 0), p) for _ in range(200)]
    found = {"samples": o.samples, "exact_draws": round(float(np.mean(exact)), 4), "rows": []}
    print(f"{o.samples} samples; as many exact draws: {found['exact_draws']}")
    for name, schedule in ROWS:
        counts, forwards = np.zeros(len(p) + 1, int), np.zeros(2, int)
        more = ["--joint", o.dir / "joint"] if "joint" in schedule else []
        for line in run(o.redraft, o.dir, schedule, o.samples, 2, *more):
            result = json.loads(line)
            symbols = np.array(result["tokens"]) - FIRST
            # Ids that are no symbols come last.
            counts[symbols @ places if ((symbols == 0) | (symbols == 1)).all() else -1] += 1
            forwards += [result["stages"][0]["nfe"], result["stages"][0]["forwards"]["joint"]]
        again = [total_variation(rng.multinomial(o.samples, counts / o.samples), p) for _ in range(200)]
        nfe, passes = (forwards / o.samples).tolist()
        row = {"name": name, "nfe": nfe, "passes": passes, "distance": round(float(total_variation(counts, p)), 4), "error": round(float(np.std(again)), 4)}
        found["rows"].append(row)
        print(row, flush=True)
    if o.out:
        o.out.write_text(json.dumps(found, indent=1) + "\n")


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("what", choices=("make", "measure"))
    parse.add_argument("dir", type=pathlib.Path)
    parse.add_argument("--redraft", type=pathlib.Path, default=HERE.parents[1] / "target/release/redraft")
    parse.add_argument("--samples", type=int, default=100_000)
    parse.add_argument("--out", type=pathlib.Path, help="also write what was measured as JSON")
    parse.add_argument("--steps", type=int, default=3000, help="of fitting the model")
    parse.add_argument("--minutes", type=float, default=4, help="of training the sampler")
    parse.add_argument("--seed", type=int, default=0, help="of the distribution")
    o = parse.parse_args()
    {"make": make, "measure": measure}[o.what](o)


if __name__ == "__main__":
    main()
