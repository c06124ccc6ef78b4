"""The authors' own samplers from their checkouts, unchanged (`children/reference_sampler.py`)."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import machine
import outputs
from contest import Contest, Side, Step
from peers import Missing, llama

NAME = "reference"
CHILD = pathlib.Path(__file__).parent.parent / "children" / "reference_sampler.py"
# kind: (a file that the checkout has, where it is published, what it imports)
KINDS = {
    "llada": ("generate.py", "https://github.com/ML-GSAI/LLaDA", ("torch", "safetensors", "transformers")),
    "bd3lms": ("diffusion.py", "https://github.com/kuleshov-group/bd3lms", ("torch", "safetensors", "transformers", "einops")),
}
BLOCK, STEPS = 32, 8
LLADA = [f"block={BLOCK},visible=canvas,from=prompt,unmask=linear:{STEPS},order=confidence,temperature=0,top_p=1"]
# Without one every row would be MASK alone: equal rows, and ties that anything decides.
PROMPT = "A long time ago"
DRAFT = ["block=trained,unmask=left:1,temperature=0"]
DRAWN = ["block=trained,unmask=uniform:1,temperature=1,top_p=0.9"]


def add_arguments(parser):
    group = parser.add_argument_group("reference: official samplers from their checkouts")
    group.add_argument("--reference", action="append", default=[], metavar="KIND=DIR", help=f"KIND is {' or '.join(KINDS)}; may be repeated")
    group.add_argument("--llada", type=pathlib.Path, metavar="DIR", help="checkpoint for llada [default: the random one of --shape]")


def asked(o):
    """[(kind, checkout)], or Missing."""
    if not o.reference:
        raise Missing(f"reference: no --reference KIND=DIR; get a checkout by: git clone {KINDS['llada'][1]}")
    found = []
    for text in o.reference:
        kind, _, place = text.partition("=")
        if kind not in KINDS or not place:
            raise Missing(f"reference: --reference {text}: expected KIND=DIR, KIND one of {', '.join(KINDS)}")
        file, url, needed = KINDS[kind]
        place = pathlib.Path(place)
        if not ((place / file).exists() or place.is_file() and place.name == file):
            raise Missing(f"reference: {place / file} is not there; get it by: git clone {url}")
        if lacking := [name for name in needed if importlib.util.find_spec(name) is None]:
            raise Missing(f"reference: {sys.executable} has no {', '.join(lacking)}, which {file} needs; get them by: pip install {' '.join(lacking)}")
        found.append((kind, place.resolve()))
    return found


def versions(o):
    found = {}
    for kind, place in asked(o):
        folder = place if place.is_dir() else place.parent
        said = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        found[f"{kind} checkout"] = said.stdout.strip() if said.returncode == 0 else "no git"
    found["PyTorch"] = machine.answer([sys.executable, "-c", "import torch; print(torch.__version__)"]).out.strip()
    return found


def contests(o, redraft):
    for kind, place in asked(o):
        yield (of_llada if kind == "llada" else of_bd3lms)(o, redraft, place)


def of_llada(o, redraft, place):
    model = o.llada or llama.random_checkpoint(o)
    length = max(o.length + 1, BLOCK) // BLOCK * BLOCK
    notes = [f"{model.name}: blocks of {BLOCK}, {STEPS} forwards each, the most confident first, {length} tokens",
             "the network is ours in plain PyTorch, f32; the loop is LLaDA's generate.py",
             "ours is the first text after loading, the peer's the median of several"]
    return contest_of(o, redraft, "llada", place, model, length, {"greedy": LLADA}, notes, ("--prompt", PROMPT))


def of_bd3lms(o, redraft, place):
    facts = redraft.inspect(o.checkpoint)
    if facts["family"] != "bd3lm":
        raise Missing(f"reference: --checkpoint {o.checkpoint}: the family is {facts['family']}, expected bd3lm")
    length = min(o.length, facts["model_length"] - 1)
    notes = [f"{o.checkpoint.name}: network and sampler of the checkout, K/V cache and first-hitting sampler on, f32",
             "greedy runs left to right on both sides; the order and the draws of `drawn` are each side's own"]
    return contest_of(o, redraft, "bd3lms", place, o.checkpoint, length, {"greedy": DRAFT, "drawn": DRAWN}, notes)


def contest_of(o, redraft, kind, place, model, length, schedules, notes, prompt=()):
    names = {name: f"{kind}'s own loop, {length} tokens, {name}" for name in schedules}
    ids = redraft.generate(model, "f32", schedules["greedy"], length, *prompt)["prompt"]["tokens"]

    def child(*words):
        return [sys.executable, CHILD, kind, "--path", place, "--model", model, "--length", length, "--block", BLOCK, "--steps", STEPS,
                "--prompt", json.dumps(ids), "--threads", o.threads, "--runs", o.runs, *words]

    def check():
        theirs = json.loads(machine.answer(child("--check-only")).out)["texts"]["greedy"]["tokens"]
        ours = redraft.generate(model, "f32", schedules["greedy"], length, *prompt)["tokens"]
        return outputs.compare_tokens("tokens of the greedy text", ours, theirs)

    def read(ran):
        return {names[name]: text["median"] for name, text in json.loads(ran.out)["texts"].items()}

    def text(setting, name):
        if prompt:
            return Step(*redraft.prompted(model, setting, names[name], schedules[name], length, prompt[1]))
        return Step(*redraft.text(model, setting, names[name], schedules[name], length))

    def side(setting, checks):
        return Side(f"redraft {setting}", [text(setting, name) for name in schedules], checks)

    best = side("q4", [])
    best.note = "weights of 4 bits: the same schedule, other texts"
    return Contest(f"official {kind}", model.name, side("f32", [check]), Side(f"{kind} checkout, f32", [Step(child(), read)]), [best], notes)
