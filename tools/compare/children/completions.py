"""Loads a server of the OpenAI API with streamed completions and times them.

  python tools/compare/children/completions.py --url URL --model NAME --concurrency 1,8

Prints one JSON object: for each concurrency the median time to the first text and to the end of a
request in ms, wall clock in ms a token over all requests, and their texts. Every stream is asked
for `usage.completion_tokens`: without it, or where it cannot be right, there is no number. The
standard library is enough.
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import statistics
import time
import urllib.parse

PROMPTS = ["Once upon a time", "One day", "The dog", "A little girl", "There was a boy", "In the park", "The old man", "It was late"]


class Wrong(Exception):
    """The server's answer cannot be counted."""


def events(response):
    """The JSON objects of a stream of server-sent events, up to [DONE]."""
    for line in response:
        line = line.strip()
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if event.get("error"):
            raise Wrong(f"an error in the stream: {event['error']}")
        yield event
    raise Wrong("the stream ended without [DONE]")


def check_usage(usage, finish, max_tokens):
    """Tokens that were written, if the count can be right."""
    count = (usage or {}).get("completion_tokens")
    if not isinstance(count, int) or isinstance(count, bool):
        raise Wrong("no usage.completion_tokens in the stream, so tokens cannot be counted")
    if not 0 < count <= max_tokens:
        raise Wrong(f"usage.completion_tokens is {count} where 1 to {max_tokens} were asked for")
    if finish == "length" and count != max_tokens:
        raise Wrong(f"usage.completion_tokens is {count}, and the text ended by length at {max_tokens}")
    return count


def complete(o, prompt, seed):
    """{first_ms, total_ms, tokens, text} of one streamed completion."""
    url = urllib.parse.urlsplit(o.url)
    connect = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = connect(url.hostname, url.port, timeout=o.seconds)
    body = {"model": o.model, "prompt": prompt, "max_tokens": o.max_tokens, "temperature": o.temperature, "seed": seed,
            "stream": True, "stream_options": {"include_usage": True}, **o.extra}
    headers = {"Content-Type": "application/json"}
    if os.environ.get("COMPARE_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['COMPARE_API_KEY']}"
    start = time.monotonic()
    connection.request("POST", url.path.rstrip("/").removesuffix("/v1") + "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise Wrong(f"{response.status} {response.reason}: {response.read(300).decode(errors='replace')}")
    first, text, usage, finish = None, "", None, None
    for event in events(response):
        for choice in event.get("choices") or []:
            if choice.get("text"):
                first = first if first is not None else time.monotonic()
                text += choice["text"]
            finish = choice.get("finish_reason") or finish
        usage = event.get("usage") or usage
    end = time.monotonic()
    connection.close()
    tokens = check_usage(usage, finish, o.max_tokens)
    return {"first_ms": ((first or end) - start) * 1e3, "total_ms": (end - start) * 1e3, "tokens": tokens, "text": text}


def load(o, concurrency):
    count = max(o.requests, concurrency)
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda i: complete(o, PROMPTS[i % len(PROMPTS)], i), range(count)))
    wall = (time.monotonic() - start) * 1e3
    tokens = sum(answer["tokens"] for answer in answers)
    return {
        "requests": count,
        "tokens": tokens,
        "first_ms": statistics.median(answer["first_ms"] for answer in answers),
        "total_ms": statistics.median(answer["total_ms"] for answer in answers),
        "ms_per_token": wall / tokens,
        "tokens_per_s": 1e3 * tokens / wall,
        "texts": [answer["text"] for answer in answers],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", default="1,8")
    parser.add_argument("--requests", type=int, default=8, help="at each concurrency, and as many as that at least")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--extra", type=json.loads, default={}, help="further keys of a request, as a JSON object")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit of a request")
    o = parser.parse_args()
    try:
        complete(o, PROMPTS[0], 0)  # whatever a first request costs
        print(json.dumps({"at": {str(at): load(o, at) for at in map(int, o.concurrency.split(","))}}))
    except (Wrong, OSError, http.client.HTTPException, ValueError) as error:
        raise SystemExit(f"{o.url}: {error}")


if __name__ == "__main__":
    main()
