"""Ray Data: a file of prompts through `redraft serve`, by Ray's own HTTP processor.

    redraft serve &
    python3 examples/ray/batch_http.py prompts.txt texts.jsonl [--url http://127.0.0.1:8080]

A request that fails is sent again: it gets the same text, since its seed is the number of its row.
"""

import argparse
import json
import os
from typing import Any

import ray
from ray.data.llm import HttpRequestProcessorConfig, build_processor


def write(rows: list[dict[str, Any]], url: str, workers: int, **options: Any) -> list[dict[str, Any]]:
    """Rows of {"row", "prompt"} with their texts and tokens, in the order of their numbers."""
    key = os.environ.get("REDRAFT_API_KEY")
    config = HttpRequestProcessorConfig(
        url=f"{url}/v1/completions",
        headers={"Authorization": f"Bearer {key}"} if key else {},
        concurrency=workers,
        batch_size=16,
        max_retries=5,
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {"payload": {"prompt": row["prompt"], "seed": row["row"], **options}, "row": row["row"]},
        postprocess=lambda row: {
            "row": row["row"],
            "text": row["http_response"]["choices"][0]["text"],
            "tokens": row["http_response"]["choices"][0]["redraft"]["tokens"],
        },
    )
    return sorted(processor(ray.data.from_items(rows)).take_all(), key=lambda row: row["row"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", help="a prompt a line")
    parser.add_argument("texts", help="where an object a row goes")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--schedule", default="did-lift")
    args = parser.parse_args()
    with open(args.prompts, encoding="utf-8") as lines:
        rows = [{"row": row, "prompt": line.rstrip("\n")} for row, line in enumerate(lines)]
    ray.init()
    written = write(rows, args.url, args.workers, max_tokens=args.length, schedule=args.schedule)
    with open(args.texts, "w", encoding="utf-8") as out:
        for row in written:
            out.write(json.dumps({"row": int(row["row"]), "prompt": rows[row["row"]]["prompt"], "text": row["text"]}) + "\n")


if __name__ == "__main__":
    main()
