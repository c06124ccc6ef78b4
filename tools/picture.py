#!/usr/bin/env python3
"""Draws draft -> remask -> refine as an SVG from a real run.

    redraft generate --prompt "Once upon a time" --seed 10 --length 90 --format json --trace trace.jsonl > run.json
    python3 tools/picture.py run.json trace.jsonl MODEL_DIR/tokenizer.json > docs/draft-refine.svg

Three panels of the same tokens: the draft tinted by snapshot confidence (red: unsure, green: sure), the draft with the
remasked tokens blanked, the final text with the regenerated tokens framed. Nothing but the standard library.
"""
import json
import sys
from html import escape

WIDTH, CHAR, LINE, PAD = 900, 7.8, 22, 16


def byte_decoder():
    """GPT-2's printable stand-ins for bytes, inverted: character -> byte."""
    printable = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    table = {chr(b): b for b in printable}
    spare = 256
    for b in range(256):
        if b not in printable:
            table[chr(spare)] = b
            spare += 1
    return table


def load_pieces(path):
    """Token id -> text."""
    tokenizer = json.load(open(path, encoding="utf-8"))
    decode = byte_decoder()
    pieces = {}
    for token, index in tokenizer["model"]["vocab"].items():
        pieces[index] = bytes(decode.get(c, 63) for c in token).decode("utf-8", "replace")
    for added in tokenizer.get("added_tokens", []):
        pieces[added["id"]] = added["content"]
    return pieces


def tint(confidence):
    """Light red at 0, over yellow, to light green at 1; by the square root, since most confidences are small."""
    c = min(max(confidence, 0.0), 1.0) ** 0.5
    red, green = min(1.0, 2 - 2 * c), min(1.0, 2 * c)
    return "#%02x%02x%02x" % (int(255 - 70 * (1 - red)), int(255 - 95 * (1 - green)), 165)


def panel(title, cells, top):
    """`cells` as (text, fill or None, frame or None), wrapped into lines. Returns SVG and the height used."""
    out = [f'<text x="{PAD}" y="{top + 18}" font-weight="bold" font-family="sans-serif" font-size="14">{escape(title)}</text>']
    x, y = PAD, top + 30
    for text, fill, frame in cells:
        newline = "\n" in text
        text = text.replace("\n", " ")
        width = max(len(text), 1) * CHAR
        if x + width > WIDTH - PAD or (newline and x > PAD and not text.strip()):
            x, y = PAD, y + LINE
            if newline and not text.strip():
                continue
            if text.startswith(" "):
                text, width = text[1:], max(len(text) - 1, 1) * CHAR
        lead = CHAR if text.startswith(" ") and len(text) > 1 else 0
        if fill or frame:
            stroke = f' stroke="{frame}" stroke-width="1.5"' if frame else ""
            out.append(f'<rect x="{x + lead:.1f}" y="{y}" width="{width - lead:.1f}" height="{LINE - 4}" rx="3" fill="{fill or "none"}"{stroke}/>')
        out.append(f'<text x="{x:.1f}" y="{y + 14}" xml:space="preserve">{escape(text)}</text>')
        x += width
    return out, y + LINE - top


def main():
    run_path, trace_path, tokenizer_path = sys.argv[1:4]
    run = json.loads(open(run_path, encoding="utf-8").readline())
    pieces = load_pieces(tokenizer_path)
    events = [json.loads(line) for line in open(trace_path, encoding="utf-8")]
    events = [e for e in events if e["sample"] == run["sample"]]
    first = run["prompt_tokens"]
    drafted = {}
    for event in events:
        if event["event"] == "reveal" and event["stage"] == 0:
            drafted.update(zip(event["positions"], event["confidence"]))
    remasked = set(run["stages"][-1]["remasked"])
    draft = [pieces.get(t, "") for t in run["draft"]["tokens"]]
    final = [pieces.get(t, "") for t in run["tokens"]]
    positions = range(first, first + len(draft))

    panels = [
        ("1  draft: blocks of 4 tokens, tinted by the model's confidence at the moment of reveal",
         [(t, tint(drafted[p]), None) for t, p in zip(draft, positions)]),
        (f"2  remask: the {len(remasked)} least confident of {len(draft)} tokens are masked again",
         [("\u00a0" + "\u00b7" * max(len(t.strip()), 1) if p in remasked else t, "#333333" if p in remasked else None, None)
          for t, p in zip(draft, positions)]),
        (f"3  refine: a global pass regenerates them in {run['stages'][-1]['nfe']} forwards; {run['stages'][-1]['changed']} came back different",
         [(t, "#cfe2ff" if p in remasked else None, "#1f5fbf" if p in remasked and a != t else None) for a, t, p in zip(draft, final, positions)]),
    ]
    body, top = [], 10
    for title, cells in panels:
        lines, height = panel(title, cells, top)
        body += lines
        top += height + 14
    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" font-family="monospace" font-size="13">')
    print(f'<rect width="{WIDTH}" height="{top}" fill="white"/>')
    print("\n".join(body))
    print("</svg>")


if __name__ == "__main__":
    main()
