"""The examples on a local cluster of two workers.

    python3 examples/ray/check.py [--model DIR] [--command target/release/redraft] [--rows 48]

Checks that Ray Data (engines in actors, and HTTP) and Ray Serve give the tokens of one process, that a
worker which is killed in mid-run loses no row, and that a replica which is killed is replaced. Prints
what it saw, and rows per second of one process and of the cluster.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any, Optional

import ray
import redraft

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import batch_engine  # noqa: E402
import batch_http  # noqa: E402

BEGINNINGS = ["Once upon a time", "One day", "The dog", "A little girl", "There was a boy", "In the park"]


def check(name: str, holds: bool, seen: Any = "") -> None:
    if not holds:
        sys.exit(f"FAILED {name}: {seen}")
    print(f"ok {name}", flush=True)


def alone(rows: list[dict[str, Any]], model: str, **options: Any) -> list[list[int]]:
    """Tokens of each row from one engine in this process."""
    async def write() -> list[Any]:
        with redraft.Engine(model, device="cpu", threads=1) as engine:
            asked = (engine.agenerate(row["prompt"], seed=row["row"], **options) for row in rows)
            return [generation.tokens.tolist() for generation in await asyncio.gather(*asked)]

    return asyncio.run(write())


def workers() -> list[int]:
    """Processes of the actors that own an engine."""
    found = subprocess.run(["pgrep", "-f", "ray::.*(Writer|MapWorker)"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def kill_one(after: float, killed: list[int]) -> None:
    """Kills an actor once some time has passed and there is one."""
    time.sleep(after)
    for _ in range(200):
        pids = workers()
        if pids:
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])
            return
        time.sleep(0.05)


def tokens(written: list[dict[str, Any]]) -> list[list[int]]:
    return [[int(token) for token in row["tokens"]] for row in written]


def post(url: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/redraft-stories-10m")
    parser.add_argument("--command", default="target/release/redraft")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--length", type=int, default=96)
    args = parser.parse_args()
    model = os.path.abspath(args.model)
    rows = [{"row": row, "prompt": BEGINNINGS[row % len(BEGINNINGS)]} for row in range(args.rows)]
    options = {"length": args.length, "schedule": "did", "ignore_eos": True}

    began = time.monotonic()
    expected = alone(rows, model, **options)
    print(f"one process, one thread: {len(rows) / (time.monotonic() - began):.1f} rows/s", flush=True)

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    began = time.monotonic()
    written = batch_engine.write(rows, model, workers=2, threads=1, batch=8, **options)
    seconds = time.monotonic() - began
    print(f"Ray Data, two actors: {len(rows) / seconds:.1f} rows/s, start of the actors included", flush=True)
    check("Ray Data gives the tokens of one process", tokens(written) == expected)

    killed: list[int] = []
    killer = threading.Thread(target=kill_one, args=(seconds * 0.6, killed))
    killer.start()
    written = batch_engine.write(rows, model, workers=2, threads=1, batch=4, **options)
    killer.join()
    check("an actor was killed in mid-run", len(killed) == 1)
    check("no row was lost, and none is another", tokens(written) == expected, [row["row"] for row in written])

    server = subprocess.Popen(
        [args.command, "serve", "--model", model, "--addr", "127.0.0.1:0", "--device", "cpu", "--json-logs"],
        stderr=subprocess.PIPE, text=True,
    )
    try:
        url: Optional[str] = None
        assert server.stderr is not None
        for line in server.stderr:
            if found := re.search(r"listening on (http://[^\"]+)", line):
                url = found[1]
                break
        check("the server listens", url is not None)
        threading.Thread(target=server.stderr.read, daemon=True).start()
        began = time.monotonic()
        written = batch_http.write(rows, str(url), workers=1, max_tokens=args.length, schedule="did", ignore_eos=True)
        print(f"Ray Data over HTTP: {len(rows) / (time.monotonic() - began):.1f} rows/s", flush=True)
        check("HTTP gives the tokens of one process", tokens(written) == expected)
    finally:
        server.terminate()
        server.wait()

    os.environ.update(REDRAFT_MODEL=model, REDRAFT_MIN_REPLICAS="2", REDRAFT_MAX_REPLICAS="2")
    import serve_app
    from ray import serve

    serve.run(serve_app.app)
    base = "http://127.0.0.1:8000"
    asked = [{"prompt": row["prompt"], "seed": row["row"], **options} for row in rows[:8]]
    answers = [json.loads(post(f"{base}/generate", body)) for body in asked]
    check("Ray Serve gives the tokens of one process", [answer["tokens"] for answer in answers] == expected[:8])
    lines = [json.loads(line) for line in post(f"{base}/stream", asked[0]).splitlines()]
    text = "".join(line.get("delta", "") for line in lines)
    check("its stream joins to the text", text == lines[-1]["done"]["text"] == answers[0]["text"], text)
    check("and shows what may change", any("provisional" in line for line in lines))
    try:
        post(f"{base}/generate", {"prompt": "a", "schedule": "banana"})
        check("a wrong request is refused", False)
    except urllib.error.HTTPError as error:
        check("a wrong request is refused", error.code == 400, error)
    killed = []
    kill_one(0, killed)
    answer = None
    for _ in range(100):
        try:
            answer = json.loads(post(f"{base}/generate", asked[1]))
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    check("a replica was killed, and the text is still the same", bool(killed) and answer is not None and answer["tokens"] == expected[1])
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
