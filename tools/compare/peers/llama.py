"""llama.cpp: forwards with all logits, autoregression, and its diffusion command, on GGUF files.

Random files of equal shape are made here; `--gguf` adds a published one. Programs and bindings are
built from the sdist of llama-cpp-python by `--build-llama`.
"""

import importlib.util
import json
import pathlib
import re
import sys

import machine
import outputs
from contest import Contest, Side, Step
from ours import shapes_text, test_of
from peers import Missing

NAME = "llama"
HERE = pathlib.Path(__file__).resolve().parent.parent
CHILD = HERE / "children" / "llama_decode.py"
TYPES = ("f32", "bf16", "q8_0", "q4_0")
# Ours on a file of a type, and what logits may differ by.
OURS = {"f32": ("f32", "f32-f16kv"), "bf16": ("bf16", "bf16"), "q8_0": ("stored", "stored"), "q4_0": ("stored", "stored")}
SHAPES = {
    "owt": "--hidden 768 --layers 12 --heads 12 --kv-heads 12 --mlp 2048 --vocab 50258 --length 1024",
    "small": "--hidden 256 --layers 3 --heads 4 --kv-heads 4 --mlp 512 --vocab 1000 --length 1024",
}
PROMPT = "x"
TG = 128
AUTOREGRESSION = ["block=1,visible=block,unmask=left:1,temperature=0"]


def add_arguments(parser):
    group = parser.add_argument_group("llama: llama.cpp on GGUF files")
    group.add_argument("--llama", type=pathlib.Path, metavar="DIR", help="what --build-llama DIR made")
    group.add_argument("--llama-bin", type=pathlib.Path, metavar="DIR", help="its programs and libraries, where they are elsewhere")
    group.add_argument("--llama-sdist", type=pathlib.Path, metavar="DIR", help="the unpacked sdist of llama-cpp-python, likewise")
    group.add_argument("--types", default=",".join(TYPES), help="of the random files: " + ",".join(TYPES))
    group.add_argument("--shape", choices=SHAPES, default="owt", help="of the random files: owt has 162M parameters")
    group.add_argument("--gguf", type=pathlib.Path, action="append", default=[], metavar="FILE", help="a published autoregressive file as well")
    group.add_argument("--diffusion-steps", type=int, default=8, help="of llama-diffusion-cli over --length positions")


def places(o):
    """(programs, sdist), or Missing."""
    programs = o.llama_bin or (o.llama and o.llama / "build" / "bin")
    sdist = o.llama_sdist or (o.llama and next(iter(sorted(o.llama.glob("llama_cpp_python-*/"))), None))
    build = "get it by: tools/compare/run --build-llama DIR, then --llama DIR"
    if not programs:
        raise Missing(f"llama: no --llama DIR; {build}")
    for name in ("llama-bench", "llama-diffusion-cli", "libllama.so"):
        if not (programs / name).exists():
            raise Missing(f"llama: {programs / name} is not there; {build}")
    if not sdist or not (sdist / "llama_cpp" / "llama_cpp.py").exists():
        raise Missing(f"llama: no unpacked sdist of llama-cpp-python beside it; {build}")
    missing = [name for name in ("gguf", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise Missing(f"llama: {sys.executable} has no {', '.join(missing)}; get them by: pip install gguf numpy")
    return programs.resolve(), sdist.resolve()


def environment(o):
    programs, sdist = places(o)
    return {"LD_LIBRARY_PATH": str(programs), "LLAMA_CPP_LIB_PATH": str(programs), "PYTHONPATH": str(sdist)}


def versions(o):
    programs, sdist = places(o)
    said = machine.run([programs / "llama-bench", "--version"], env=environment(o))
    found = re.search(r"version: (.*)", said.out + said.err)
    package = re.search(r"^Version: (.*)", (sdist / "PKG-INFO").read_text(), re.M)
    return {"llama.cpp": found.group(1) if found else "unknown", "llama-cpp-python": package.group(1) if package else "unknown"}


def random_checkpoint(o):
    """A random LLaDA of the shape, made once and kept in the work directory."""
    checkpoint = o.work / f"{o.shape}-llada"
    if not (checkpoint / "config.json").exists():
        o.tell(f"writing {checkpoint}")
        # Renamed when whole: what is there is taken for complete.
        part = checkpoint.with_suffix(".part")
        writer = HERE.parent / "random_checkpoint.py"
        machine.answer([sys.executable, writer, "--family", "llada", *SHAPES[o.shape].split(), "--out", part])
        part.rename(checkpoint)
    return checkpoint


def random_file(o, architecture, kind):
    """Its weights as a GGUF file of a type."""
    file = o.work / f"{o.shape}-{architecture}-{kind}.gguf"
    if not file.exists():
        checkpoint = random_checkpoint(o)
        o.tell(f"writing {file}")
        writer = HERE / "children" / "random_gguf.py"
        machine.answer([sys.executable, writer, "--checkpoint", checkpoint, "--architecture", architecture, "--type", kind, "--out", file])
    return file


# --- what llama.cpp's programs print ---


def read_bench(text):
    """{(n_prompt, n_gen): ms} of `llama-bench -o json`, of the median of its samples."""
    found = {}
    for entry in json.loads(text):
        samples = sorted(entry["samples_ns"])
        found[entry["n_prompt"], entry["n_gen"]] = samples[len(samples) // 2] / 1e6
    return found


def read_diffusion(log):
    """(ms a step, the text) of what llama-diffusion-cli logs."""
    found = re.search(r"total time: ([0-9.]+)ms, time per step: ([0-9.]+)ms, sampling time per step: ([0-9.]+)ms\n", log)
    if not found:
        raise machine.Failed(f"llama-diffusion-cli: no line of times in {log[-200:]!r}")
    return float(found.group(2)), log[found.end() :].removeprefix("\n").removesuffix("\n")


def spelled(tokens, words, controls):
    """The bytes of ids of a GPT-2 vocabulary without special ones, as llama.cpp spells them."""
    alphabet = bytes_of_letters()
    text = b""
    for token in tokens:
        if token not in controls:
            text += b"".join(alphabet.get(letter, letter.encode()) for letter in words[token])
    return text


def bytes_of_letters():
    """GPT-2's alphabet of bytes, read backwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + n): bytes([byte]) for n, byte in enumerate(others)}


# --- contests ---


def contests(o, redraft):
    places(o)
    types = o.types.split(",")
    if unknown := [kind for kind in types if kind not in TYPES]:
        raise Missing(f"llama: --types: expected some of {', '.join(TYPES)}, found {', '.join(unknown)}")
    for kind in types:
        yield Random(o, redraft, kind).contest()
    for file in o.gguf:
        if not file.exists():
            raise Missing(f"llama: --gguf {file} is not there; docs/gguf.md says how to download one")
        yield published(o, redraft, file)


class Calls:
    """Commands of llama.cpp."""

    def __init__(self, o):
        self.o, self.env = o, environment(o)
        self.programs, _ = places(o)

    def decode(self, file, *words):
        return [sys.executable, CHILD, "--model", file, "--threads", self.o.threads, "--runs", self.o.runs, *words]

    def forwards(self, file, shapes):
        def read(ran):
            found = json.loads(ran.out)["forwards"]
            return {test_of(tuple(map(int, shape.split("@")))): times["median"] for shape, times in found.items()}

        return Step(self.decode(file, "--forward", shapes_text(shapes)), read, self.env)

    def bench(self, file, prompts):
        """llama-bench: tg beside ours, pp by itself, since its logits are the last row's alone."""
        words = ["-p", ",".join(map(str, prompts)), "-n", TG, "-r", self.o.runs, "-t", self.o.threads, "-ngl", 0, "-o", "json"]

        def read(ran):
            found = read_bench(ran.out)
            named = {f"llama-bench pp{prompt}, logits of the last row alone": ms for (prompt, generated), ms in found.items() if not generated}
            return named | {f"autoregressive, {TG} tokens (tg{TG})": found[0, TG]}

        return Step([self.programs / "llama-bench", "-m", file, *words], read, self.env)

    def logits(self, redraft, file, shape, ids, *words):
        import numpy as np

        place, out = redraft.place / "ids.json", redraft.place / "llama.npy"
        place.write_text(json.dumps(ids))
        machine.answer(self.decode(file, "--logits", "@".join(map(str, shape)), "--ids", place, "--out", out, *words), env=self.env)
        return np.load(out)

    def diffusion(self, file):
        # Top-k 1 is its greedy: at temperature 0 it would draw from the softmax. Every confidence
        # is 1 then, and ties go to the lower position: left to right.
        rows = self.o.length + 1
        return [self.programs / "llama-diffusion-cli", "-m", file, "-p", PROMPT, "--diffusion-steps", self.o.diffusion_steps,
                "--diffusion-block-length", rows, "-ub", rows, "-b", rows, "-c", rows, "-t", self.o.threads, "-ngl", 0, "--temp", 0,
                "--top-k", 1, "--top-p", 1, "--seed", 1, "--log-colors", "off", "--no-log-prefix", "--no-log-timestamps"]


class Random:
    """One type of the random files."""

    def __init__(self, o, redraft, kind):
        self.o, self.redraft, self.kind, self.calls = o, redraft, kind, Calls(o)
        self.setting, self.limits = OURS[kind]
        # llama.cpp has an architecture without a cache for full attention; steps need the cache.
        self.full, self.cached = random_file(o, "llada", kind), random_file(o, "llama", kind)
        self.passes = [shape for shape in o.shapes if not shape[1]]
        self.steps = [shape for shape in o.shapes if shape[1]]
        self.diffusion = [f"block=full,visible=canvas,unmask=linear:{o.diffusion_steps},order=left,temperature=0"]
        self.per_step = f"diffusion, a step over {o.length + 1} positions"

    def contest(self):
        o, calls, prompts = self.o, self.calls, [rows for rows, _ in self.passes]
        other = [calls.forwards(self.full, self.passes)] if self.passes else []
        other += [calls.forwards(self.cached, self.steps)] if self.steps else []
        other += [calls.bench(self.cached, prompts or [0]), Step(calls.diffusion(self.full), lambda ran: {self.per_step: read_diffusion(ran.err)[0]}, calls.env)]
        checks = [self.logits_check(self.setting, shape, self.limits) for shape in [*self.passes[:1], *self.steps[-1:]]]
        if self.kind == "f32":
            checks += [self.greedy_check, self.diffusion_check]
        name = {"stored": f"redraft, the file's {self.kind}"}.get(self.setting, f"redraft {self.setting}")
        best = []
        if self.kind != "q4_0":
            best.append(Side("redraft q4", self.our_steps("q4"), [self.logits_check("q4", shape, "q4") for shape in self.passes[:1]]))
        notes = [f"random weights, shape {o.shape} ({SHAPES[o.shape].replace('--', '')})",
                 "forwards: ours draws a token for every row, llama.cpp's gives logits of every row and draws nothing; its K/V is f16",
                 f"diffusion: {o.diffusion_steps} steps, left to right and greedy; ms a step with sampling, by the command's own line"]
        return Contest("llama.cpp", f"{self.kind}, {o.shape}", Side(name, self.our_steps(self.setting), checks), Side(f"llama.cpp {self.kind}", other), best, notes)

    def our_steps(self, setting):
        redraft, steps = self.redraft, []
        if self.passes:
            steps.append(Step(*redraft.forwards(self.full, setting, self.passes)))
        if self.steps:
            steps.append(Step(*redraft.forwards(self.cached, setting, self.steps)))
        steps.append(Step(*redraft.text(self.cached, setting, f"autoregressive, {TG} tokens (tg{TG})", AUTOREGRESSION, TG)))
        return [*steps, Step(*redraft.text(self.full, setting, self.per_step, self.diffusion, self.o.length, per_step=True))]

    def logits_check(self, setting, shape, limits):
        file = self.cached if shape[1] else self.full

        def check():
            ids = outputs.some_ids(sum(shape), self.redraft.inspect(self.full)["mask_id"])
            ours = self.redraft.logits(file, setting, shape, ids)
            return outputs.compare_logits(f"logits, {test_of(shape)}", ours, self.calls.logits(self.redraft, file, shape, ids), outputs.LOGIT_LIMITS[limits])

        return check

    def greedy_check(self):
        # K/V of 16 bits let near ties fall either way, and all that follows differs then: this is
        # told, and the logits before it decide.
        ours = self.redraft.generate(self.cached, self.setting, AUTOREGRESSION, 32, "--prompt", PROMPT)
        place = self.redraft.place / "ids.json"
        place.write_text(json.dumps(ours["prompt"]["tokens"]))
        theirs = json.loads(machine.answer(self.calls.decode(self.cached, "--causal", "--ids", place, "--greedy", 32), env=self.calls.env).out)["tokens"]
        return outputs.compare_tokens("greedy autoregression, 32 tokens, told and not required", ours["tokens"], theirs, exact=False)

    def diffusion_check(self):
        """The text of llama-diffusion-cli, byte for byte what our ids spell."""
        import gguf

        fields = gguf.GGUFReader(self.full).fields
        words, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
        controls = {i for i, kind in enumerate(types) if kind != gguf.TokenType.NORMAL}
        ours = self.redraft.generate(self.full, self.setting, self.diffusion, self.o.length, "--prompt", PROMPT)
        _, text = read_diffusion(machine.answer(self.calls.diffusion(self.full), env=self.calls.env).err)
        theirs, expected = text.encode(errors="surrogateescape"), spelled(ours["tokens"], words, controls)
        same = sum(a == b for a, b in zip(theirs, expected))
        share = 1 - same / max(len(theirs), len(expected), 1)
        return outputs.Agreement("bytes of the diffusion text", {"bytes": len(expected), "different_share": share}, {"different_share": 0.5})


def published(o, redraft, file):
    """Autoregression and causal passes of a published file."""
    calls, facts = Calls(o), redraft.inspect(file)
    test = f"autoregressive, {TG} tokens (tg{TG})"

    def check():
        shape = (64, 0)
        ids = outputs.some_ids(64, facts["vocab_size"])
        ours = redraft.causal_logits(file, "stored", ids)
        return outputs.compare_logits("causal logits, 64 rows", ours, calls.logits(redraft, file, shape, ids, "--causal"), outputs.LOGIT_LIMITS["stored"])

    def floats():
        ids = outputs.some_ids(64, facts["vocab_size"])
        return outputs.compare_logits("causal logits, 64 rows, weights made q4", redraft.causal_logits(file, "q4", ids),
                                      redraft.causal_logits(file, "f32", ids), outputs.LOGIT_LIMITS["q4"])

    prompts = [rows for rows, position in o.shapes if not position]
    steps = [shape for shape in o.shapes if shape[1]] or [(1, 64)]
    mine = lambda setting: [Step(*redraft.text(file, setting, test, AUTOREGRESSION, TG)), Step(*redraft.forwards(file, setting, steps))]
    return Contest("llama.cpp", file.name, Side("redraft, the file's groups", mine("stored"), [check]),
                   Side("llama.cpp", [calls.bench(file, prompts or [0]), calls.forwards(file, steps)]),
                   [Side("redraft q4", mine("q4"), [floats])],
                   ["llama-bench's tg feeds tokens without choosing them; ours chooses the most probable one",
                    "steps: ours draws a token for every row, llama.cpp's gives logits of every row and draws nothing"])
