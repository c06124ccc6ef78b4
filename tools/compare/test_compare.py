"""Tests of the comparison that need neither a peer nor numpy: `tools/compare/run --self-test`."""

import contextlib
import http.server
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import types
import unittest
from unittest import mock

import build_llama
import contest
import figures
import machine
import outputs
from contest import Contest, Side, Step
from ours import total_ms
from outputs import Agreement
from peers import Missing, llama, pytorch, reference, server, table

HERE = pathlib.Path(__file__).resolve().parent


def prints(value):
    return [sys.executable, "-c", f"print({json.dumps(json.dumps(value))})"]


def side(name, ms, checks=(), mark=None):
    """A side whose child prints times, and notes its turn."""
    command = prints(ms)
    if mark:
        command = [sys.executable, "-c", f"open({str(mark)!r}, 'a').write({name!r} + ' '); print({json.dumps(json.dumps(ms))})"]
    return Side(name, [Step(command, lambda ran: json.loads(ran.out))], list(checks))


def agrees():
    return Agreement("logits", {"relative_rms": 1e-6}, {"relative_rms": 1e-4})


def differs():
    return Agreement("logits", {"relative_rms": 0.5}, {"relative_rms": 1e-4})


class Rounds(unittest.TestCase):
    def test_sides_take_turns_and_another_begins_each_round(self):
        with tempfile.TemporaryDirectory() as scratch:
            mark = pathlib.Path(scratch) / "turns"
            sides = [side(name, {"a pass": ms}, [agrees], mark) for name, ms in (("ours", 2.0), ("peer", 3.0), ("best", 1.0))]
            result = contest.run(Contest("peer", "f32", sides[0], sides[1], sides[2:]), 3)
            self.assertEqual(mark.read_text().split(), "ours peer best peer best ours best ours peer".split())
        self.assertEqual([row["label"] for row in result["rows"]], [contest.SAME, contest.BEST])
        self.assertEqual([row["peer_over_ours"] for row in result["rows"]], [1.5, 3.0])
        self.assertEqual(len(result["load"]), 9)

    def test_nothing_is_timed_where_outputs_differ(self):
        with tempfile.TemporaryDirectory() as scratch:
            mark = pathlib.Path(scratch) / "turns"
            result = contest.run(Contest("peer", "f32", side("ours", {"a": 1.0}, [agrees, differs], mark), side("peer", {"a": 1.0}, mark=mark)), 2)
            self.assertFalse(mark.exists())
        self.assertEqual(result["rows"], [])
        self.assertIn("relative_rms 0.5 (at most 0.0001)", result["refused"][0]["why"])
        self.assertIn("REFUSED", figures.as_table(report(result)))

    def test_ours_at_its_best_is_refused_alone(self):
        result = contest.run(Contest("peer", "f32", side("ours", {"a": 1.0}, [agrees]), side("peer", {"a": 1.0}), [side("q4", {"a": 0.5}, [differs])]), 1)
        self.assertEqual([row["ours"] for row in result["rows"]], ["ours"])
        self.assertEqual(result["refused"][0]["side"], "q4")

    def test_a_child_that_fails_is_named(self):
        broken = Side("peer", [Step([sys.executable, "-c", "import sys; sys.exit('no such model')"], None)])
        result = contest.run(Contest("peer", "f32", side("ours", {"a": 1.0}), broken), 1)
        self.assertIn("no such model", result["refused"][0]["why"])
        self.assertEqual(result["rows"], [])

    def test_what_only_one_side_has_is_told(self):
        result = contest.run(Contest("peer", "f32", side("ours", {"a": 1.0, "b": 1.0}), side("peer", {"a": 1.0, "pp": 4.0})), 1)
        self.assertEqual(result["left_out"], ["b: ours has it, peer has not"])
        self.assertEqual(list(result["beside"]), ["pp"])

    def test_medians_and_spread(self):
        found = contest.spread([5.0, 1.0, 3.0])
        self.assertEqual((found["median"], found["lowest"], found["highest"]), (3.0, 1.0, 5.0))
        self.assertEqual(figures.ms(found), "3.00 (1.00 to 5.00)")
        self.assertEqual(figures.ms(contest.spread([1234.5])), "1,234")


def report(*results):
    return {"machine": machine.facts(), "threads": 2, "rounds": 1, "versions": {"redraft": "0"}, "results": list(results), "missing": ["llama: not there"]}


class Outputs(unittest.TestCase):
    def test_limits(self):
        self.assertTrue(agrees().agreed)
        self.assertFalse(differs().agreed)
        self.assertFalse(Agreement("nan", {"relative_rms": math.nan}, {"relative_rms": 1.0}).agreed)
        self.assertFalse(Agreement("absent", {}, {"relative_rms": 1.0}).agreed)

    def test_tokens(self):
        self.assertTrue(outputs.compare_tokens("t", [1, 2], [1, 2]).agreed)
        found = outputs.compare_tokens("t", [1, 2, 3], [1, 4])
        self.assertFalse(found.agreed)
        self.assertEqual(found.figures, {"tokens": 3, "different": 2, "first_difference_at": 1})
        self.assertTrue(outputs.compare_tokens("told alone", [1], [2], exact=False).agreed)

    @unittest.skipUnless(importlib.util.find_spec("numpy"), "no numpy")
    def test_logits(self):
        import numpy as np

        rows = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
        shifted = outputs.compare_logits("same", rows + 3, rows, outputs.LOGIT_LIMITS["f32"])
        self.assertTrue(shifted.agreed, shifted)
        for wrong in (rows[::-1], rows * 1.5, rows[:4]):
            self.assertFalse(outputs.compare_logits("other", wrong, rows, outputs.LOGIT_LIMITS["stored"]).agreed)


class Machine(unittest.TestCase):
    def test_stat(self):
        busy, stolen = machine.parse_stat("cpu  100 200 300 4000 50 6 7 8 0 0\ncpu0 1 2 3\n")
        self.assertAlmostEqual(busy * machine.TICKS, 613)
        self.assertAlmostEqual(stolen * machine.TICKS, 8)

    def test_a_child_is_not_foreign_to_itself(self):
        loop = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\nprint('done')"
        with mock.patch.object(machine, "busy", side_effect=[(10.0, 0.0), (10.6, 0.0)]):
            ran = machine.run([sys.executable, "-c", loop])
        self.assertEqual((ran.code, ran.out), (0, "done\n"))
        self.assertLess(ran.foreign * ran.wall_s, 0.11)

    def test_foreign_work_warns(self):
        ran = machine.Ran(0, '{"a": 1.0}', "", 1.0, 0.8, 0.0)
        with mock.patch.object(machine, "answer", return_value=ran):
            result = contest.run(Contest("peer", "f32", side("ours", {}), side("peer", {})), 1)
        self.assertIn("0.80 cores at most", result["warning"])

    def test_a_child_that_hangs_is_stopped(self):
        ran = machine.run([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.2)
        self.assertEqual(ran.code, -9)


class LlamaCpp(unittest.TestCase):
    def test_bench(self):
        text = json.dumps([{"n_prompt": 128, "n_gen": 0, "samples_ns": [3e6, 1e6, 2e6]}, {"n_prompt": 0, "n_gen": 128, "samples_ns": [8e6]}])
        self.assertEqual(llama.read_bench(text), {(128, 0): 2.0, (0, 128): 8.0})

    def test_diffusion(self):
        log = "diffusion step: 3/4\r\ntotal time: 13.51ms, time per step: 3.38ms, sampling time per step: 0.09ms\n\n og\n og\n"
        self.assertEqual(llama.read_diffusion(log), (3.38, " og\n og"))
        with self.assertRaises(machine.Failed):
            llama.read_diffusion("error: failed to load model")

    def test_ids_are_spelled_by_bytes(self):
        self.assertEqual(llama.spelled([0, 1, 2], ["Ġog", "Ċ", "<|mask|>"], {2}), b" og\n")
        self.assertEqual(len(set(llama.bytes_of_letters().values())), 256)

    def test_what_is_missing_is_named(self):
        o = types.SimpleNamespace(llama=None, llama_bin=None, llama_sdist=None)
        with self.assertRaisesRegex(Missing, "--build-llama DIR"):
            llama.places(o)
        with tempfile.TemporaryDirectory() as scratch:
            o.llama = pathlib.Path(scratch)
            with self.assertRaisesRegex(Missing, "llama-bench is not there"):
                llama.places(o)

    def test_the_build_says_what_it_lacks(self):
        with mock.patch.object(build_llama.shutil, "which", return_value=None), self.assertRaisesRegex(SystemExit, "no cmake on PATH"):
            build_llama.build(pathlib.Path("nowhere"), 1)


class Ours(unittest.TestCase):
    def test_texts(self):
        bench = {"rows": [{"total_ms": 30.0, "stages": [{"forwards": 8}, {"forwards": 2}]}]}
        self.assertEqual((total_ms(bench), total_ms(bench, per_step=True)), (30.0, 3.0))

    def test_the_same_schedule_comes_first_and_exact(self):
        self.assertTrue(pytorch.REFINE[1].endswith("kv=exact") and pytorch.FAST[1] == pytorch.REFINE[1].replace("exact", "refresh:12"))


class Reference(unittest.TestCase):
    def test_what_is_missing_is_named(self):
        for given, said in (([], "git clone"), (["other=."], "expected KIND=DIR"), (["llada=nowhere"], "generate.py is not there")):
            with self.subTest(given), self.assertRaisesRegex(Missing, said):
                reference.asked(types.SimpleNamespace(reference=given))


class Fake(http.server.BaseHTTPRequestHandler):
    """A server of the OpenAI API that writes one word a token."""

    usage = True
    text = "word "

    def do_GET(self):
        self.answer("application/json", json.dumps({"data": [{"id": "fake"}]}).encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = asked["max_tokens"]
        chunks = [{"choices": [{"text": self.text, "finish_reason": None}]} for _ in range(count)]
        chunks.append({"choices": [{"text": "", "finish_reason": "length"}]})
        if self.usage and asked["stream_options"]["include_usage"]:
            chunks.append({"choices": [], "usage": {"completion_tokens": count if self.usage is True else self.usage}})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
        self.answer("text/event-stream", "".join(lines).encode())

    def answer(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def fake(**more):
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Fake,), more))
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


class Servers(unittest.TestCase):
    def load(self, url, *words):
        command = [sys.executable, HERE / "children" / "completions.py", "--url", url, "--model", "fake", "--max-tokens", "5", *words]
        return subprocess.run([str(word) for word in command], capture_output=True, text=True)

    def test_every_request_is_counted(self):
        with fake() as url:
            ended = self.load(url + "/v1", "--concurrency", "1,3", "--requests", "4")
        self.assertEqual(ended.returncode, 0, ended.stderr)
        at = json.loads(ended.stdout)["at"]
        self.assertEqual([at[key]["tokens"] for key in ("1", "3")], [20, 20])
        self.assertEqual(at["1"]["texts"], ["word " * 5] * 4)
        self.assertLessEqual(at["1"]["first_ms"], at["1"]["total_ms"])

    def test_a_count_that_cannot_be_right_is_refused(self):
        for usage, said in ((False, "no usage.completion_tokens"), (4, "ended by length at 5"), (6, "1 to 5 were asked for")):
            with self.subTest(usage=usage), fake(usage=usage) as url:
                ended = self.load(url)
                self.assertEqual(ended.returncode, 1)
                self.assertIn(said, ended.stderr)

    def test_versions_tell_a_server_that_is_not_there(self):
        with fake() as url:
            self.assertIn("server of fake", server.versions(types.SimpleNamespace(server=url, model="fake")))
            with self.assertRaisesRegex(Missing, "serves fake, not other"):
                server.versions(types.SimpleNamespace(server=url, model="other"))
        with self.assertRaisesRegex(Missing, "nothing answers"):
            server.versions(types.SimpleNamespace(server=url, model="fake"))

    def test_texts_must_begin_alike(self):
        a, b = "a" * 40, "b" * 40
        self.assertTrue(server.compare_texts([a] * 8, [a] * 6 + [b] * 2).agreed)
        self.assertFalse(server.compare_texts([a] * 8, [a] * 5 + [b] * 3).agreed)


class CommandLine(unittest.TestCase):
    def run_tool(self, *words):
        ended = subprocess.run([sys.executable, HERE / "run", *map(str, words)], capture_output=True, text=True)
        return ended.returncode, ended.stdout, ended.stderr

    def test_misuse(self):
        with tempfile.TemporaryDirectory() as scratch:
            for words in ((), ("nobody",), ("server", "--binary", f"{scratch}/none"), ("server", "--binary", sys.executable, "--rounds", "0")):
                self.assertEqual(self.run_tool(*words)[0], 2, words)

    @unittest.skipUnless(os.name == "posix", "a shell script as a binary")
    def test_a_missing_peer_is_told_and_fails(self):
        with tempfile.TemporaryDirectory() as scratch:
            binary, out = pathlib.Path(scratch) / "redraft", pathlib.Path(scratch) / "out.json"
            binary.write_text("#!/bin/sh\necho redraft 9.9\n")
            binary.chmod(0o755)
            code, said, _ = self.run_tool("llama", "reference", "server", "--binary", binary, "--work", scratch, "--out", out)
            self.assertEqual(code, 1)
            self.assertEqual(said.count("NOT COMPARED"), 3, said)
            found = json.loads(out.read_text())
            self.assertEqual(found["versions"]["redraft"], "9.9")
            self.assertEqual(found["results"], [])
            self.assertTrue(found["machine"]["cpu"])

    def test_every_peer_has_the_interface(self):
        for name, peer in table().items():
            self.assertEqual(peer.NAME, name)
            for part in ("add_arguments", "versions", "contests"):
                self.assertTrue(callable(getattr(peer, part)), (name, part))
        columns = figures.columns([("a", "bb"), ("ccc", "d")])
        self.assertEqual(columns, ["| a   | bb |", "|-----|----|", "| ccc | d  |"])
        self.assertIn("NOT COMPARED: llama", figures.as_table(report()))

