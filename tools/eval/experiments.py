#!/usr/bin/env python3
"""The experiments behind docs/evidence.md: which rows each table needs, and the runs of `redraft bench --quality`.

    python3 experiments.py --texts TEXTS [--only ratio,steps] [--samples 200] [--out ../../benches/quality]

A group is one run of the binary over one list of rows and one JSON file of results; groups whose file is there already
with the same rows are left alone, and a row that another group has measured is taken from there (`--again` runs all anew:
needed when weights or engine changed). Every row of a group shares seed and draft with the first one where their draft
stages agree, so differences are paired. Tables and plots: report.py.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.normpath(os.path.join(HERE, "..", ".."))

DRAFT = "block=4,unmask=uniform:1"
FEW = "linear:4,order=uniform"


def refine(ratio=0.35, by="snapshot", block="full", unmask="linear:12,order=uniform", kv="refresh:12", **more):
    """One refining stage; `more` are further keys of the stage grammar.

    One full pass, then masked and new rows only: `reuse` holds it against exact passes.
    """
    extra = "".join(f",{key}={value}" for key, value in more.items())
    return f"block={block},remask={ratio},by={by},unmask={unmask},kv={kv}{extra}"


def row(name, *stages, temperature=1.0, top_p=0.9, **settings):
    return {"name": name, "stages": list(stages), "temperature": temperature, "top_p": top_p, **settings}


def headline(prefix="", **settings):
    """Draft, and a full refine at 0.35 by each score."""
    yield row(prefix + "draft", DRAFT, **settings)
    for by in ("snapshot", "random", "post-hoc", "held-out:2", "held-out:4", "held-out:8"):
        yield row(f"{prefix}refine {by}", DRAFT, refine(by=by), **settings)
    yield row(prefix + "did-lift", DRAFT, refine(0.1, "held-out:4", unmask=FEW, score="lift"), **settings)


def ratios():
    yield row("draft", DRAFT)
    for by, values in (
        ("snapshot", (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 0.9)),
        ("random", (0.1, 0.35, 0.75)),
        ("held-out:4", (0.05, 0.15, 0.35, 0.5, 0.75)),
    ):
        for ratio in values:
            yield row(f"{by} {ratio}", DRAFT, refine(ratio, by))


def blocks():
    yield row("draft", DRAFT)
    for by in ("snapshot", "random"):
        for block in (4, 16, 64, "full"):
            # One token per forward inside small blocks, as a draft does; twelve forwards a sequence for the long ones.
            unmask = "uniform:1" if block in (4, 16) else "linear:12,order=uniform"
            yield row(f"{by} block {block}", DRAFT, refine(by=by, block=block, unmask=unmask, kv="exact"))


def steps():
    yield row("draft", DRAFT)
    for count in (1, 2, 4, 12, 24):
        yield row(f"uniform, {count} forwards", DRAFT, refine(unmask=f"linear:{count},order=uniform", kv="exact"))
    yield row("uniform, one token a forward", DRAFT, refine(unmask="uniform:1", kv="exact"))
    for by in ("snapshot", "random"):
        yield row(f"confidence, 12 forwards, {by}", DRAFT, refine(by=by, unmask="linear:12,order=confidence", kv="exact"))
        yield row(f"threshold 0.5, {by}", DRAFT, refine(by=by, unmask="threshold:0.5", kv="exact"))


def stages():
    yield row("draft", DRAFT)
    yield row("one round", DRAFT, refine())
    yield row("two rounds of full", DRAFT, refine(), refine())
    yield row("three rounds of full", DRAFT, refine(), refine(), refine())
    yield row("4 -> 64 -> full, 0.35 then 0.35", DRAFT, refine(block=64), refine())
    yield row("4 -> 64 -> full, 0.35 then 0.2", DRAFT, refine(block=64), refine(0.2))
    yield row("two rounds of full, random", DRAFT, refine(by="random"), refine(by="random"))


def compute():
    """The same or more work given to the draft, and less, with refining to make up for it."""
    yield row("draft", DRAFT)
    for block, n in ((16, 1), (64, 4), ("full", 8)):
        yield row(f"draft block {block}, {n} a forward", f"block={block},unmask=uniform:{n}")
    for n in (2, 4):
        draft = f"block=4,unmask=uniform:{n}"
        yield row(f"draft, {n} a forward", draft)
        yield row(f"draft, {n} a forward, refine snapshot 0.35", draft, refine())
        yield row(f"draft, {n} a forward, refine held-out:4 lift 0.1", draft, refine(0.1, "held-out:4", score="lift"))


def reuse():
    yield row("draft", DRAFT)
    # Held-out scoring writes over the draft's K/V, so it cannot refine from them.
    for by, policies in (("snapshot", ("exact", "refresh:4", "refresh:12", "draft")), ("held-out:4", ("exact", "refresh:12"))):
        for kv in policies:
            yield row(f"{by}, kv={kv}", DRAFT, refine(by=by, kv=kv))


def truncation():
    yield row("draft", DRAFT)
    for ratio in (0.35, 0.9):
        for kind in ("raw", "truncated"):
            yield row(f"{kind} {ratio}", f"{DRAFT},confidence={kind}", refine(ratio))


def scores():
    """What makes a token weak: the scoring rule, where it looks, and how much is taken."""
    yield row("draft", DRAFT)
    for ratio in (0.1, 0.35):
        yield row(f"snapshot {ratio}", DRAFT, refine(ratio))
        yield row(f"random {ratio}", DRAFT, refine(ratio, "random"))
        for by in ("post-hoc", "held-out:4"):
            for score in ("probability", "typicality", "lift"):
                yield row(f"{by} {score} {ratio}", DRAFT, refine(ratio, by, score=score))


def rounds():
    """A little at a time: n rounds of a tenth, each scored anew."""
    yield row("draft", DRAFT)
    for by, score in (("held-out:4", "typicality"), ("held-out:4", "lift"), ("random", None)):
        for n in (1, 2, 4, 8):
            more = {"score": score} if score else {}
            name = f"{by} {score}" if score else by
            yield row(f"{n} x 0.1 {name}", DRAFT, *[refine(0.1, by, unmask=FEW, **more)] * n)


# Sharper or softer sampling of a whole schedule: the curve on which every method is compared.
DRAFT_SETTINGS = [(t, 0.9) for t in (1.1, 1.0, 0.95, 0.9, 0.85, 0.8, 0.7)] + [(1.0, p) for p in (1.0, 0.95, 0.85, 0.8, 0.7)]
SETTINGS = [(t, 0.9) for t in (1.0, 0.9, 0.8)] + [(1.0, 1.0)]

METHODS = {
    "snapshot 0.35": [DRAFT, refine()],
    "held-out:4 0.35": [DRAFT, refine(by="held-out:4")],
    "held-out:4 lift 0.1": [DRAFT, refine(0.1, "held-out:4", score="lift")],
    "4 x held-out:4 typicality 0.1": [DRAFT, *[refine(0.1, "held-out:4", unmask=FEW, score="typicality")] * 4],
    "4 x held-out:4 lift 0.1": [DRAFT, *[refine(0.1, "held-out:4", unmask=FEW, score="lift")] * 4],
}


def drafts():
    for t, p in DRAFT_SETTINGS:
        yield row(f"draft, T {t}, p {p}", DRAFT, temperature=t, top_p=p)


def frontier():
    yield from drafts()
    for method, schedule in METHODS.items():
        for t, p in SETTINGS:
            yield row(f"{method}, T {t}, p {p}", *schedule, temperature=t, top_p=p)


def sharpness():
    """A refine that samples sharper or softer than its draft."""
    yield row("draft", DRAFT)
    for name, ratio, by, more in (("snapshot 0.35", 0.35, "snapshot", {}), ("held-out:4 lift 0.1", 0.1, "held-out:4", {"score": "lift"})):
        for t, p in ((0.8, 0.9), (1.0, 0.9), (1.0, 1.0)):
            yield row(f"{name}, refine T {t}, p {p}", DRAFT, refine(ratio, by, temperature=t, top_p=p, **more))


ONE = "one token"
REFERENCE = "one token, another seed"


def several(block, counts):
    """One token a forward, twice; K at once, each by its own distribution; K with a joint sampler. Undistorted, in the order of the least entropy."""
    stage = f"block={block},unmask=entropy:"
    yield row(ONE, f"{stage}1", top_p=1.0)
    yield row(REFERENCE, f"{stage}1", top_p=1.0, seed=1001)
    for k in counts:
        yield row(f"marginal {k}", f"{stage}{k}", top_p=1.0)
        yield row(f"joint {k}", f"{stage}{k},sampler=joint", top_p=1.0)


def joint_full():
    yield from several("full", (2, 3, 4, 8))


def joint_block():
    yield from several(4, (2, 3, 4))


def joint_refine():
    """Drafts of one, two and four tokens a forward, refined alike."""
    refines = {"": [], ", refine snapshot 0.35": [refine()], ", refine held-out:4 lift 0.1": [refine(0.1, "held-out:4", unmask=FEW, score="lift")]}
    drafts = {"draft": DRAFT, "draft by entropy": "block=4,unmask=entropy:1"} | {f"draft {name} {k}": f"block=4,unmask=entropy:{k}{more}" for k in (2, 4) for name, more in JOINT.items()}
    for draft, stage in drafts.items():
        for name, stages in refines.items():
            yield row(draft + name, stage, *stages)


def joint_frontier():
    """The joint draft, and the preset did-joint, sharper and softer."""
    draft = "block=4,unmask=entropy:4,sampler=joint"
    for t, p in SETTINGS:
        yield row(f"draft joint 4, T {t}, p {p}", draft, temperature=t, top_p=p)
        yield row(f"did-joint, T {t}, p {p}", draft, refine(0.1, "held-out:4", unmask=FEW, score="lift"), temperature=t, top_p=p)


JOINT = {"marginal": "", "joint": ",sampler=joint"}
SPEED = "joint_speed"
# Groups that are always run as a whole, so that their times are of one run: positions, samples, and the row that MAUVE holds the others against.
OWN = {
    "joint_full": {"length": 127, "samples": 320, "reference": REFERENCE},
    "joint_block": {"length": 127, "samples": 1000, "reference": REFERENCE},
    "joint_refine": {},
}

GROUPS = {
    "drafts": drafts, "headline": headline, "scores": scores, "rounds": rounds, "ratio": ratios, "reuse": reuse,
    "stages": stages, "sharpness": sharpness, "block": blocks, "steps": steps, "compute": compute, "truncation": truncation,
    "frontier": frontier, "joint_full": joint_full, "joint_block": joint_block, "joint_refine": joint_refine,
    "joint_frontier": joint_frontier,
}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--texts", required=True, help="folder with human.txt and train.txt, see texts.py")
    ap.add_argument("--redraft", default=os.path.join(ROOT, "target", "release", "redraft"))
    ap.add_argument("--out", default=os.path.join(ROOT, "benches", "quality"))
    ap.add_argument("--only", help="groups, comma separated: " + ", ".join(GROUPS))
    ap.add_argument("--samples", type=int, default=200)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--threads", type=int, help="CPU threads of each run [default: all cores]")
    ap.add_argument("--model", help="checkpoint instead of the one that ships")
    ap.add_argument("--label", default="", help="put before the names of the result files, for other checkpoints")
    ap.add_argument("--again", action="store_true", help="run groups whose results are there")
    args = ap.parse_args()
    groups = [*GROUPS, SPEED]
    wanted = args.only.split(",") if args.only else groups
    unknown = [g for g in wanted if g not in groups]
    if unknown:
        ap.error(f"--only: unknown {', '.join(unknown)}; groups: {', '.join(groups)}")
    os.makedirs(args.out, exist_ok=True)
    samples = args.samples
    for group in wanted:
        if group == SPEED:
            measure_speed(args)
            continue
        rows, own = list(GROUPS[group]()), OWN.get(group)
        args.samples = (own or {}).get("samples", samples)
        path = os.path.join(args.out, f"{args.label}{group}.json")
        if not args.again and same_rows(path, rows, args):
            print(f"{group}: there already", file=sys.stderr)
            continue
        known = {} if args.again or own is not None else measured(args)
        run(args, rows, path, known, own or {})
        print(f"{group}: {len(rows)} rows -> {path}", file=sys.stderr)


def measure_speed(args):
    """Tokens per second of one sample at a time, for the schedules of the joint groups: medians of `bench`, and of three rounds over all of them, to be
    run on an idle machine."""
    path, times = os.path.join(args.out, f"{args.label}{SPEED}.json"), {}
    for _ in range(3):
        for group, own in OWN.items():
            for r in GROUPS[group]():
                command = [args.redraft, "bench", "--dtype", "bf16", "--runs", "5", "--format", "json"]
                command += ["--length", str(own["length"])] if "length" in own else []
                command += ["--model", args.model] if args.model else []
                for stage in r["stages"]:
                    command += ["--stage", f"{stage},temperature={r['temperature']},top_p={r['top_p']}"]
                report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
                times.setdefault((group, r["name"]), []).append(report["rows"][0]["tokens_per_s"])
    rows = [{"group": group, "name": name, "tokens_per_s": round(statistics.median(found), 1)} for (group, name), found in times.items()]
    with open(path + ".tmp", "w") as out:
        json.dump({"device": report["device"], "rows": rows}, out, indent=1)
        out.write("\n")
    os.replace(path + ".tmp", path)


def spec(r):
    """What a row generates, whatever its name."""
    return json.dumps({key: value for key, value in r.items() if key != "name"}, sort_keys=True)


def load(path, args):
    """A file of results of the same checkpoint, samples and seed; None if there is none."""
    if not os.path.exists(path):
        return None
    with open(path) as f:
        found = json.load(f)
    same = (found["samples"], found["seed"]) == (args.samples, args.seed)
    return found if same else None


def same_rows(path, rows, args):
    found = load(path, args)
    return found is not None and [(r["name"], r["spec"]) for r in found["rows"]] == [(r["name"], spec(r)) for r in rows]


def measured(args):
    """Rows of groups that are there: spec -> its measures. The engine is deterministic, so a row is measured once."""
    known = {}
    for group in GROUPS.keys() - OWN.keys():
        found = load(os.path.join(args.out, f"{args.label}{group}.json"), args)
        for r in found["rows"] if found else []:
            known.setdefault(r["spec"], r)
    return known


def run(args, rows, path, known, own):
    # The first row is what the others are paired with.
    asked = [rows[0], *(r for r in rows[1:] if spec(r) not in known)]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as list_of_rows, tempfile.NamedTemporaryFile(suffix=".jsonl") as texts:
        for r in asked:
            list_of_rows.write(json.dumps(r) + "\n")
        list_of_rows.flush()
        command = [args.redraft, "bench", "--quality", "--rows", list_of_rows.name, "--samples", str(args.samples),
                   "--seed", str(args.seed), "--dtype", "bf16", "--per-sample", "--format", "json",
                   "--human", os.path.join(args.texts, "human.txt"), "--train", os.path.join(args.texts, "train.txt")]
        command += ["--threads", str(args.threads)] if args.threads else []
        if args.model:
            command += ["--model", args.model]
        if "reference" in own:
            command += ["--length", str(own["length"]), "--save", texts.name]
        report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        if "reference" in own:
            import mauve_scores  # needs numpy, torch and more, which the other groups do not

            scores = mauve_scores.scores(texts.name, report["judge"], own["reference"])
            for r in report["rows"]:
                r["measures"]["mauve"] = scores.get(r["name"])
    # Values of single samples: those that report.py resamples, at four digits.
    kept = ("judge_nll", "judge_tokens", "entropy", "distinct_2")
    for r in report["rows"] + ([report["human"]] if report["human"] else []):
        r["samples"] = {k: [v if v is None else round(v, 4) for v in r["samples"][k]] for k in kept}
    fresh = {spec(r): found | {"spec": spec(r)} for r, found in zip(asked, report["rows"])}
    report["rows"] = [(fresh.get(spec(r)) or known[spec(r)]) | {"name": r["name"]} for r in rows]
    # Wherever this was called from.
    for named in (report, *report["rows"]):
        named |= {k: os.path.relpath(named[k], ROOT) for k in ("model", "judge") if os.path.isabs(named.get(k, ""))}
    with open(path + ".tmp", "w") as out:
        json.dump(report, out, separators=(",", ":"))
        out.write("\n")
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    main()
