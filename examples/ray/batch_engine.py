"""Ray Data: a file of prompts through engines that live in actors.

    python3 examples/ray/batch_engine.py prompts.txt texts.jsonl [--workers 2] [--schedule did]

Each actor loads the model once. The rows of a batch share the engine's forwards. A batch whose actor
dies is given to another, and gets the same texts: a row's seed is its number.
"""

import argparse
import asyncio
import json
import os
from typing import Any

import ray


class Writer:
    """An engine that writes a batch of rows."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        import redraft

        self.engine = redraft.Engine(model, device="cpu", threads=threads)
        self.options = options

    async def write(self, batch: dict[str, Any]) -> list[Any]:
        """All rows together, so that they share forwards."""
        rows = zip(batch["row"], batch["prompt"])
        return await asyncio.gather(
            *(self.engine.agenerate(str(prompt), seed=int(row), **self.options) for row, prompt in rows)
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        generations = asyncio.run(self.write(batch))
        batch["text"] = [generation.text for generation in generations]
        batch["tokens"] = [generation.tokens.tolist() for generation in generations]
        return batch


def write(rows: list[dict[str, Any]], model: str, workers: int, threads: int, batch: int, **options: Any) -> list[dict[str, Any]]:
    """Rows of {"row", "prompt"} with their texts and tokens, in the order of their numbers."""
    written = ray.data.from_items(rows).map_batches(
        Writer,
        fn_constructor_args=(os.path.abspath(model), threads, options),
        batch_size=batch,
        num_cpus=threads,
        compute=ray.data.ActorPoolStrategy(size=workers),
        # An actor that dies is replaced, and its batch is done again.
        max_restarts=-1,
        max_task_retries=-1,
    )
    return sorted(written.take_all(), key=lambda row: row["row"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", help="a prompt a line")
    parser.add_argument("texts", help="where an object a row goes")
    parser.add_argument("--model", default="models/redraft-stories-10m")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--schedule", default="did-lift")
    args = parser.parse_args()
    with open(args.prompts, encoding="utf-8") as lines:
        rows = [{"row": row, "prompt": line.rstrip("\n")} for row, line in enumerate(lines)]
    ray.init()
    written = write(rows, args.model, args.workers, args.threads, args.batch, length=args.length, schedule=args.schedule)
    with open(args.texts, "w", encoding="utf-8") as out:
        for row in written:
            out.write(json.dumps({"row": int(row["row"]), "prompt": row["prompt"], "text": row["text"]}) + "\n")


if __name__ == "__main__":
    main()
