"""Any server of the OpenAI API beside `redraft serve`: streamed completions, one and several."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import machine
import outputs
from contest import Contest, Side, Step
from peers import Missing

NAME = "server"
CHILD = pathlib.Path(__file__).parent.parent / "children" / "completions.py"


def add_arguments(parser):
    group = parser.add_argument_group("server: a server of the OpenAI API; a key stands in COMPARE_API_KEY")
    group.add_argument("--server", metavar="URL", help="where it listens, with or without /v1")
    group.add_argument("--model", metavar="NAME", help="its model's name")
    group.add_argument("--server-pid", type=int, action="append", default=[], metavar="PID", help="its process, whose CPU then does not count as foreign")
    group.add_argument("--served", type=pathlib.Path, metavar="MODEL", help="what ours serves: the same weights [default: the model that ships]")
    group.add_argument("--concurrency", default="1,8", help="requests at once [default: 1,8]")
    group.add_argument("--max-tokens", type=int, default=64)
    group.add_argument("--schedule", metavar="NAME", help="ours, to do what the peer does [default: ar for an autoregressive model, else draft]")
    group.add_argument("--best-schedule", metavar="NAME", help="ours at its best, such as did-joint")
    group.add_argument("--server-extra", type=json.loads, default={}, metavar="JSON", help='further keys for both, e.g. {"ignore_eos": true}')
    group.add_argument("--other-model", action="store_true", help="the peer serves other weights: texts are not compared, and the label says so")


def versions(o):
    if not o.server or not o.model:
        raise Missing("server: expected --server URL and --model NAME of a running server of the OpenAI API")
    address = base(o.server) + "/v1/models"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=authorization()), timeout=10) as answer:
            names = [model.get("id") for model in json.load(answer).get("data", [])]
            program = answer.headers.get("Server", "not told")
    except urllib.error.HTTPError as error:
        raise Missing(f"server: {address} answers {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        raise Missing(f"server: nothing answers at {address} ({error}); start it first") from None
    if o.model not in names:
        raise Missing(f"server: {o.server} serves {', '.join(map(str, names))}, not {o.model}")
    return {f"server of {o.model}": program}


def base(url):
    return url.rstrip("/").removesuffix("/v1")


def authorization():
    key = os.environ.get("COMPARE_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextlib.contextmanager
def serving(o, model, flags):
    """(URL, process) of our own server, up until the block ends."""
    sequences = max(map(int, o.concurrency.split(",")))
    command = [o.binary, "serve", "--addr", "127.0.0.1:0", "--device", "cpu", "--threads", o.threads, "--model", model, "--max-sequences", sequences, *flags]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield address_in(log, child), child.pid
        finally:
            child.terminate()
            try:
                child.wait(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def address_in(log, child, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        log.seek(0)
        text = log.read().decode(errors="replace")
        if found := re.search(r"http://127\.0\.0\.1:\d+", text):
            return found.group(0)
        if child.poll() is not None:
            raise machine.Failed(f"redraft serve ended with code {child.returncode}: {text.strip()[-300:]}")
        time.sleep(0.05)
    raise machine.Failed("redraft serve did not start")


def contests(o, redraft):
    model = o.served or o.checkpoint
    facts = redraft.inspect(model)
    schedule = o.schedule or ("ar" if facts.get("mask_id") is None else "draft")
    with serving(o, model, ["--dtype", "f32"]) as same, contextlib.ExitStack() as stack:
        best = stack.enter_context(serving(o, model, ["--weights", "q4", "--dtype", "bf16"]))
        yield contest_of(o, same, best, schedule, model)


def contest_of(o, same, best, schedule, model):
    def child(url, name, extra, concurrency=None):
        return [sys.executable, CHILD, "--url", url, "--model", name, "--concurrency", concurrency or o.concurrency, "--max-tokens", o.max_tokens,
                "--requests", 8, "--extra", json.dumps({**o.server_extra, **extra})]

    def read(ran):
        found = {}
        for at, values in json.loads(ran.out)["at"].items():
            found[f"first text, {at} at once"] = values["first_ms"]
            found[f"whole request, {at} at once"] = values["total_ms"]
            found[f"a token of all requests, {at} at once"] = values["ms_per_token"]
        return found

    def ours(server, schedule, name, checks=()):
        url, pid = server
        return Side(name, [Step(child(url, served_name(url), {"schedule": schedule}), read, pids=(pid,))], list(checks))

    def check():
        def texts(url, name, extra):
            return json.loads(machine.answer(child(url, name, extra, "1")).out)["at"]["1"]["texts"]

        mine, theirs = texts(same[0], served_name(same[0]), {"schedule": schedule}), texts(o.server, o.model, {})
        return compare_texts(mine, theirs)

    label = f"redraft serve, {schedule}" + (", another model than the peer's" if o.other_model else "")
    bests = [ours(best, o.best_schedule or schedule, f"redraft serve, q4, {o.best_schedule or schedule}")]
    bests[0].note = "weights of 4 bits" + (f", schedule {o.best_schedule}" if o.best_schedule else "") + ": other texts than the peer's"
    notes = [f"ours serves {model.name}; prompts, token limit, temperature 0 and seeds are the same for both",
             "usage.completion_tokens was checked in every answer; 1000 / (ms a token of all requests) is tokens per second"]
    if o.other_model:
        notes.append("--other-model: texts were not compared, and the ratio is not one of engines alone")
    if not o.server_pid:
        notes.append("without --server-pid the peer's own CPU counts as foreign in its rounds")
    # Both of ours wait in idle while the other is measured.
    theirs = Side(f"server of {o.model}", [Step(child(o.server, o.model, {}), read, pids=tuple(o.server_pid))])
    return Contest(o.server, o.model, ours(same, schedule, label, [] if o.other_model else [check]), theirs, bests, notes)


def compare_texts(mine, theirs, characters=24):
    """Greedy texts of two engines begin alike; near ties part some of them, a few at once."""
    different = sum(a[:characters] != b[:characters] for a, b in zip(mine, theirs)) + abs(len(mine) - len(theirs))
    figures = {"texts": len(theirs), "different_share": different / max(len(theirs), 1), "equal_to_the_end": sum(a == b for a, b in zip(mine, theirs))}
    return outputs.Agreement(f"first {characters} characters of greedy texts", figures, {"different_share": 0.25})


def served_name(url):
    with urllib.request.urlopen(url + "/v1/models", timeout=30) as answer:
        return json.load(answer)["data"][0]["id"]
