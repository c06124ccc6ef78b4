#!/usr/bin/env python3
"""Latencies of `redraft serve` under load, and whether load changes a token.

    pip install openai
    redraft serve &
    python3 tools/eval/server_load.py --url http://127.0.0.1:8080 [--concurrency 1,8,32] [--leave 3]

Sends the same requests (one seed each) at every concurrency, streamed, with provisional text. Prints
throughput, and p50 / p95 / p99 of the time to the first provisional text, to the first final text and to
the end, in milliseconds; compares the ids of every answer with those of concurrency 1. With --leave N,
every Nth client goes away after its first chunk, and the pages and places that are held afterwards are
read from /metrics and /ready.
"""

import argparse
import asyncio
import json
import time
import urllib.request

import openai

BEGINNINGS = ["Once upon a time", "One day", "The dog", "A little girl", "There was a boy", "In the park"]


async def one(client, args, row, leaves):
    """Times of one request in seconds, and its ids; none where the client left."""
    began = time.monotonic()
    provisional = final = None
    tokens = None
    stream = await client.completions.create(
        model=args.model, prompt=BEGINNINGS[row % len(BEGINNINGS)], max_tokens=args.length, seed=row, stream=True,
        extra_body={"schedule": args.schedule, "provisional": True, "ignore_eos": True},
    )
    async for chunk in stream:
        now = time.monotonic() - began
        if chunk.choices:
            if chunk.choices[0].text and final is None:
                final = now
            if chunk.choices[0].finish_reason:
                tokens = chunk.choices[0].redraft["tokens"]
        elif provisional is None:
            provisional = now
        if leaves:
            await stream.close()
            return None
    return provisional if provisional is not None else final, final, time.monotonic() - began, tokens


async def run(client, args, concurrency, leave):
    gate = asyncio.Semaphore(concurrency)

    async def gated(row):
        async with gate:
            return await one(client, args, row, leave and row % leave == 0)

    began = time.monotonic()
    answers = await asyncio.gather(*(gated(row) for row in range(args.requests)))
    return time.monotonic() - began, answers


def percentiles(seconds):
    ordered = sorted(seconds)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3
    return " / ".join(f"{at(share):.0f}" for share in (0.5, 0.95, 0.99))


def held(url):
    """Pages that requests hold, and places that are taken."""
    with urllib.request.urlopen(f"{url}/metrics") as text:
        lines = text.read().decode().splitlines()
    pages = next(line.rsplit(" ", 1)[1] for line in lines if line.startswith("redraft_kv_pages_used"))
    with urllib.request.urlopen(f"{url}/ready") as text:
        return int(float(pages)), json.load(text)["requests"]


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--key", default="none")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--schedule", default="did-lift")
    parser.add_argument("--leave", type=int, default=0)
    args = parser.parse_args()
    client = openai.AsyncOpenAI(base_url=f"{args.url}/v1", api_key=args.key, max_retries=0)
    args.model = (await client.models.list()).data[0].id
    expected = None
    print("| clients | tokens/s | first provisional ms (p50 / p95 / p99) | first final | end | ids |")
    print("|---|---|---|---|---|---|")
    for concurrency in map(int, args.concurrency.split(",")):
        # The first run has no one who leaves: its ids are what the others are compared with.
        seconds, answers = await run(client, args, concurrency, args.leave if expected else 0)
        stayed = [answer for answer in answers if answer is not None]
        expected = expected or [answer[3] for answer in answers]
        equal = sum(answer is not None and answer[3] == ids for answer, ids in zip(answers, expected))
        tokens = sum(len(answer[3]) for answer in stayed)
        columns = [percentiles([answer[i] for answer in stayed]) for i in range(3)]
        print(f"| {concurrency} | {tokens / seconds:.0f} | {' | '.join(columns)} | {equal} of {len(stayed)} equal |", flush=True)
    for _ in range(100):
        pages, places = held(args.url)
        if pages == 0 and places == 0:
            break
        await asyncio.sleep(0.05)
    print(f"held afterwards: {pages} pages, {places} places")


asyncio.run(main())
