"""Prints a table of drafts beside the refined texts.

    python bindings/python/examples/draft_and_refine.py [MODEL_DIR]
"""

from __future__ import annotations

import sys
import textwrap

import redraft

WIDTH = 46
PROMPTS = ["Once upon a time", "The little dog", "One day, a girl"]


def marked(found: redraft.Generation, tokens_changed: set[int]) -> str:
    """The refined text, with brackets around what the refining changed."""
    return "".join(f"[{piece}]" if i in tokens_changed else piece for i, piece in enumerate(found.pieces))


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else "models/redraft-stories-10m"
    with redraft.Engine(path) as engine:
        texts = engine.generate_batch(PROMPTS, schedule="did", length=48, seed=7, ignore_eos=True)
    rule = f"+-{'-' * WIDTH}-+-{'-' * WIDTH}-+"
    print(f"{rule}\n| {'draft':{WIDTH}} | {'refined, [changed]':{WIDTH}} |\n{rule}")
    for prompt, found in zip(PROMPTS, texts):
        changed = {int(i) for i in (found.tokens != found.draft_tokens).nonzero()[0]}
        columns = [textwrap.wrap(prompt + text, WIDTH) for text in (found.draft, marked(found, changed))]
        for i in range(max(map(len, columns))):
            left, right = (column[i] if i < len(column) else "" for column in columns)
            print(f"| {left:{WIDTH}} | {right:{WIDTH}} |")
        forwards = sum(stage["nfe"] for stage in found.stages)
        weakest = float(found.confidence.min())
        print(f"{rule}\n  {len(changed)} of {len(found.tokens)} tokens changed, {forwards} forwards, weakest confidence {weakest:.2f}\n{rule}")


if __name__ == "__main__":
    main()
