"""PyTorch: BD3-LM written for speed (`children/pytorch_bd3lm.py`), eager and compiled."""

import functools
import importlib.util
import json
import pathlib
import sys

import machine
import outputs
from contest import Contest, Side, Step
from ours import nfe, shapes_text, test_of
from peers import Missing

NAME = "pytorch"
CHILD = pathlib.Path(__file__).parent.parent / "children" / "pytorch_bd3lm.py"
MODES = ("f32-eager", "f32-compile", "bf16-eager", "bf16-compile")

# One order and no draws, so that both must write the same tokens.
DRAFT = ["block=trained,unmask=left:1,temperature=0"]
DRAWN = ["block=trained,unmask=uniform:1,temperature=1,top_p=0.9"]
REFINE = [*DRAFT, "block=full,remask=0.35,by=snapshot,unmask=linear:12,order=confidence,temperature=0,kv=exact"]
# Ours at its best: the same NFE over fewer rows; several tokens a forward, drawn jointly.
FAST = [*DRAFT, REFINE[1].replace("kv=exact", "kv=refresh:12")]
JOINT = ["block=trained,sampler=joint:4,temperature=0"]


def add_arguments(parser):
    group = parser.add_argument_group("pytorch: a BD3-LM checkpoint through plain PyTorch")
    group.add_argument("--checkpoint", type=pathlib.Path, metavar="DIR", help="a BD3-LM [default: the model that ships]")
    group.add_argument("--modes", default=",".join(MODES), help="of " + ",".join(MODES))


def versions(o):
    missing = [name for name in ("torch", "safetensors", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise Missing(f"pytorch: {sys.executable} has no {', '.join(missing)}; get them by: pip install torch safetensors numpy")
    found = machine.answer([sys.executable, "-c", "import torch; print(torch.__version__)"])
    return {"PyTorch": found.out.strip()}


def contests(o, redraft):
    facts = redraft.inspect(o.checkpoint)
    if facts["family"] != "bd3lm":
        raise Missing(f"pytorch: --checkpoint {o.checkpoint}: the family is {facts['family']}, expected bd3lm")
    modes = o.modes.split(",")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise Missing(f"pytorch: --modes: expected some of {', '.join(MODES)}, found {', '.join(unknown)}")
    length = min(o.length, facts["model_length"] - 1)
    fits = [shape for shape in o.shapes if sum(shape) <= facts["model_length"]]
    notes = [f"{o.checkpoint.name}: {facts['parameters']:,} parameters, vocabulary {facts['vocab_size']:,}",
             "forwards: ours draws a token for every row, PyTorch draws nothing"]
    if len(fits) < len(o.shapes):
        past = ", ".join(test_of(shape) for shape in o.shapes if shape not in fits)
        notes.append(f"left out, past the model's {facts['model_length']} positions: {past}")
    if not fits:
        raise Missing(f"pytorch: {notes[-1]}; nothing to time")
    for mode in modes:
        yield contest_of(o, redraft, facts, mode, length, fits, notes)


def contest_of(o, redraft, facts, mode, length, shapes, notes):
    setting, model = mode.split("-")[0], o.checkpoint
    names = {"draft": f"draft, {length} tokens, greedy", "drawn": f"draft, {length} tokens, drawn",
             "refine": f"draft-then-refine, {length} tokens, greedy"}

    def child(*words):
        command = [sys.executable, CHILD, "--model", model, "--mode", mode, "--threads", o.threads, "--length", length,
                   "--bos", facts["bos_id"], "--runs", o.runs, *words]
        return command

    def read(ran):
        report = json.loads(ran.out)
        found = {test_of(tuple(map(int, shape.split("@")))): times["median"] for shape, times in report["forwards"].items()}
        found |= {names[name]: text["median"] for name, text in report["texts"].items()}
        return found | {"the reference's arithmetic of one draw for a block": report["sample"]["median"]}

    theirs = Side(f"PyTorch {mode}", [Step(child("--forward", shapes_text(shapes), "--texts", ",".join(names)), read)])

    def text(setting, name, schedule):
        return Step(*redraft.text(model, setting, names[name], schedule, length))

    def side(setting, checks):
        steps = [Step(*redraft.forwards(model, setting, shapes)), text(setting, "draft", DRAFT), text(setting, "drawn", DRAWN), text(setting, "refine", REFINE)]
        return Side(f"redraft {setting}", steps, checks)

    few = min(shapes, key=lambda shape: (shape[1] > 0, sum(shape)))
    checked = [few, *[shape for shape in shapes if shape[1] and shape != few][-1:]]
    ids = outputs.some_ids(max(map(sum, checked)), facts["mask_id"])

    @functools.cache
    def said():
        """Logits and greedy texts of one child: what is compiled is compared compiled, and to
        compile takes minutes."""
        file = redraft.place / "ids.json"
        file.write_text(json.dumps(ids))
        words = ["--logits", shapes_text(checked), "--ids", file, "--out", redraft.place, "--texts", "draft,refine", "--check-only"]
        return json.loads(machine.answer(child(*words)).out)["texts"]

    def logits_check(setting, shape, limits, what):
        def check():
            import numpy as np

            said()
            theirs = np.load(redraft.place / f"pytorch-{shapes_text([shape])}.npy")
            ours = redraft.logits(model, setting, shape, ids[: sum(shape)])
            return outputs.compare_logits(f"logits, {what}, {test_of(shape)}", ours, theirs, outputs.LOGIT_LIMITS[limits])

        return check

    def texts_check():
        report = said()
        ours = [redraft.generate(model, setting, schedule, length) for schedule in (DRAFT, REFINE)]
        for name, generated in zip(("draft", "refine"), ours):
            if nfe(generated) != report[name]["nfe"]:
                return outputs.Agreement(f"NFE of {names[name]}", {"difference": abs(nfe(generated) - report[name]["nfe"])}, {"difference": 0})
        tokens = [token for generated in ours for token in generated["tokens"]]
        exact = setting == "f32"
        what = "tokens of the greedy texts at equal NFE" + ("" if exact else ", told and not required in bf16, where near ties fall either way")
        return outputs.compare_tokens(what, tokens, report["draft"]["tokens"] + report["refine"]["tokens"], exact)

    best = [side("q4", [logits_check("q4", few, "q4", "what 4 bits lose")])]
    fast = [text("q4", "refine", FAST)]
    if (model / "joint" / "config.json").exists():
        fast.insert(0, text("q4", "draft", JOINT))
    best.append(Side("redraft q4, other schedules", fast, note="draft by joint:4 where the model has a sampler; refine with kv=refresh:12 (did-fast's); other texts than the peer's"))
    return Contest("PyTorch", f"{mode}, {model.name}", side(setting, [logits_check(setting, shape, setting, setting) for shape in checked] + [texts_check]), theirs, best,
                   [*notes, "drawn texts: each draws by its own generator, so the greedy ones are compared"])
