#!/usr/bin/env python3
"""Tables and plots of docs/evidence.md and docs/joint.md from the results of experiments.py.

    python3 report.py [--results ../../benches/quality] [--docs ../../docs] [--check]

Between `<!-- table: NAME -->` and `<!-- end -->` a page holds what this script wrote; the rest is prose and stays as
it is. Plots go to docs/evidence/*.svg. `--check` writes nothing and fails where pages and results disagree.
"""
import argparse
import json
import math
import os
import re
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.normpath(os.path.join(HERE, "..", ".."))
RESAMPLES = 2000
PAGES = ("evidence.md", "joint.md")
# A method of the frontier that is a preset.
LIFT = "held-out:4 lift 0.1"
# Groups of other settings than the drafts' curve.
ALONE = ("joint_full", "joint_block", "joint_toy", "joint_speed")

# Nats above the drafts beyond which a row says nothing in a picture.
WORST_SHOWN = 0.7


class Results:
    """Rows of all groups; a group is a file, `LABEL.GROUP.json` for other checkpoints."""

    def __init__(self, folder):
        self.groups = {}
        for name in sorted(os.listdir(folder)):
            if name.endswith(".json"):
                with open(os.path.join(folder, name)) as f:
                    self.groups[name.removesuffix(".json")] = json.load(f)

    def rows(self, group):
        return self.groups[group]["rows"]

    def human(self, group):
        return self.groups[group]["human"]


def value(row, measure):
    figure = row["measures"].get(measure)
    return None if figure is None else figure["value"]


def show(row, measure, digits, interval=False):
    figure = row["measures"].get(measure)
    if figure is None:
        return ""
    text = f"{figure['value']:.{digits}f}"
    if interval and figure.get("low") is not None:
        text += f" [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"
    return text


def paired(row):
    """Difference in nats per token to the draft, and the share of samples that improved."""
    if not row.get("paired") or not row["paired"]["to"].startswith("draft"):
        return ["", ""]
    p = row["paired"]
    d = p["judge_nll"]
    return [f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]", f"{100 * p['improved']:.0f} %"]


def table(heads, lines):
    """Markdown; the first column to the left, the others to the right."""
    out = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return "\n".join(out + ["| " + " | ".join(line) + " |" for line in lines])


FULL = ["row", "judge ppl, pooled", "mean of samples", "nats to draft, paired", "better", "trigram", "entropy",
        "nats to drafts of equal entropy", "distinct-2",
        "set d-4", "self-BLEU", "reverse", "names", "gain", "copied", "changed", "NFE", "rows", "ms"]


def full_line(row, equal=None):
    cost = row.get("cost")
    costs = [f"{cost['nfe']:.0f}", f"{cost['rows']:.0f}", f"{cost['ms_per_sample']:.0f}"] if cost else [""] * 3
    return [row["name"], show(row, "judge_ppl_pooled", 1, True), show(row, "judge_ppl_mean", 1), *paired(row),
            show(row, "trigram_ppl", 1), show(row, "entropy", 3), against(equal[row["name"]]) if equal else "",
            show(row, "distinct_2", 3), show(row, "set_distinct_4", 3),
            show(row, "self_bleu_4", 3), show(row, "reverse_ppl", 0), show(row, "names", 2), show(row, "context_gain", 3),
            show(row, "copied_run", 1), show(row, "changed", 2), *costs]


SHORT = ["row", "judge ppl, pooled", "nats to its draft, paired", "entropy", "nats to drafts of equal entropy", "distinct-2",
         "nats to drafts of equal distinct-2", "set d-4", "names", "gain", "changed", "NFE", "rows"]


def short_line(row, equal):
    cost = row["cost"]
    return [row["name"], show(row, "judge_ppl_pooled", 1, True), paired(row)[0], show(row, "entropy", 3),
            against(equal["entropy"][row["name"]]), show(row, "distinct_2", 3), against(equal["distinct_2"][row["name"]]),
            show(row, "set_distinct_4", 3), show(row, "names", 2), show(row, "context_gain", 3), show(row, "changed", 2),
            f"{cost['nfe']:.0f}", f"{cost['rows']:.0f}"]


JOINT = ["revealed by", "judge, nats a token", "MAUVE (over clusterings)", "entropy", "distinct-1", "distinct-2", "set d-4", "NFE", "passes",
         "tokens/s"]


TOY = ["revealed by", "NFE", "passes", "distance to the exact joint, standard error"]


def joint_line(row, speeds):
    mauve = row["measures"].get("mauve")
    scored = f"{mauve['value']:.2f} ({mauve['low']:.2f}-{mauve['high']:.2f})" if mauve else "reference"
    return [row["name"], show(row, "judge_nll", 3, True), scored, show(row, "entropy", 3), show(row, "distinct_1", 3), show(row, "distinct_2", 3),
            show(row, "set_distinct_4", 3), *speed(row, speeds)]


JOINT_REFINE = ["row", "judge ppl, pooled", "judge, nats a token", "entropy", "nats to drafts of equal entropy", "distinct-2", "names", "gain", "NFE",
                "passes", "tokens/s"]


def joint_refine_line(row, equal, speeds):
    return [row["name"], show(row, "judge_ppl_pooled", 1), show(row, "judge_nll", 3, True), show(row, "entropy", 3), against(equal[row["name"]]),
            show(row, "distinct_2", 3), show(row, "names", 2), show(row, "context_gain", 3), *speed(row, speeds)]


def speed(row, speeds):
    rate = [f"{speeds[row['name']]:.0f}"] if speeds else []
    return [f"{row['cost']['nfe']:.0f}", f"{row['cost'].get('joint', 0):.0f}", *rate]


def against(found):
    """Difference to the best draft of equal diversity, as a cell."""
    return "outside" if found is None else f"{found[0]:+.3f} [{found[1]:+.3f}, {found[2]:+.3f}]"


# ---- the frontier ------------------------------------------------------------------------------------------------

SETTING = re.compile(r"^(.*), T ([0-9.]+), p ([0-9.]+)$")


class Curve:
    """The draft's own curve: loss against a diversity, along temperature and along nucleus, by linear interpolation.

    At a diversity the better of the two drafts is taken, so a method has to beat the best draft that is as diverse.
    """

    def __init__(self, rows):
        self.paths = {"temperature": [], "nucleus": []}
        for row in rows:
            method, t, p = SETTING.match(row["name"]).groups()
            if method == "draft":
                if float(p) == 0.9:
                    self.paths["temperature"].append(row)
                if float(t) == 1.0:
                    self.paths["nucleus"].append(row)

    def loss_at(self, wanted, losses, diversities):
        """`wanted` [R] diversities; `losses`, `diversities`: row name -> [R] values. NaN outside the curve."""
        best = np.full(len(wanted), np.inf)
        for path in self.paths.values():
            y = np.stack([losses[r["name"]] for r in path])
            x = np.stack([diversities[r["name"]] for r in path])
            order = np.argsort(x.mean(axis=1))
            x, y = x[order], y[order]
            for low in range(len(x) - 1):
                span = x[low + 1] - x[low]
                inside = (wanted >= x[low]) & (wanted <= x[low + 1]) & (span > 0)
                share = np.divide(wanted - x[low], span, out=np.zeros_like(span), where=span > 0)
                best = np.where(inside, np.minimum(best, y[low] + share * (y[low + 1] - y[low])), best)
        return np.where(np.isfinite(best), best, np.nan)


def resampled(rows, measure, indices):
    """Pooled loss, and the mean of a per-sample measure, of every row in every resample: row name -> [R] each."""
    losses, means = {}, {}
    for row in rows:
        s = row["samples"]
        tokens = np.array(s["judge_tokens"], dtype=float)
        sums = np.array(s["judge_nll"]) * tokens
        losses[row["name"]] = sums[indices].sum(axis=1) / tokens[indices].sum(axis=1)
        means[row["name"]] = np.array(s[measure])[indices].mean(axis=1)
    return losses, means


def at_equal(rows, drafts, measure):
    """Row name -> (loss minus the draft's at equal diversity, low, high) in nats per token, or None outside its curve.

    Rows and drafts of one seed are resampled together: sample i of all of them comes from the same draws.
    """
    count = len(drafts[0]["samples"]["judge_nll"])
    rng = np.random.default_rng(1)
    indices = np.concatenate([np.arange(count)[None], rng.integers(0, count, (RESAMPLES, count))])
    losses, means = resampled(rows, measure, indices)
    draft_losses, draft_means = resampled(drafts, measure, indices)
    curve = Curve(drafts)
    out = {}
    for row in rows:
        name = row["name"]
        difference = losses[name] - curve.loss_at(means[name], draft_losses, draft_means)
        known = difference[1:][np.isfinite(difference[1:])]
        if np.isfinite(difference[0]) and len(known) > RESAMPLES // 2:
            out[name] = (difference[0], *np.percentile(known, [2.5, 97.5]))
        else:
            out[name] = None
    return out


def frontier_table(results):
    rows = results.rows("frontier")
    by_entropy, by_distinct = (at_equal(rows, results.rows("drafts"), m) for m in ("entropy", "distinct_2"))

    lines = []
    for row in rows:
        method, t, p = SETTING.match(row["name"]).groups()
        own = method == "draft"
        lines.append([method, t, p, show(row, "judge_ppl_pooled", 1), show(row, "entropy", 3), show(row, "distinct_2", 3),
                      show(row, "set_distinct_4", 3), show(row, "context_gain", 3), show(row, "names", 2),
                      "" if own else against(by_entropy[row["name"]]), "" if own else against(by_distinct[row["name"]]),
                      f"{row['cost']['rows']:.0f}"])
    human = results.human("frontier")
    lines.insert(0, ["**human**", "", "", show(human, "judge_ppl_pooled", 1), show(human, "entropy", 3), show(human, "distinct_2", 3),
                     show(human, "set_distinct_4", 3), show(human, "context_gain", 3), show(human, "names", 2), "", "", ""])
    return table(["method", "T", "p", "judge ppl", "entropy", "distinct-2", "set d-4", "gain", "names",
                  "nats to the draft at equal entropy", "at equal distinct-2", "rows"], lines)


def summary_table(results):
    """Mean over the settings that lie on the draft's curve, by method."""
    rows = results.rows("frontier")
    lines = []
    found = {m: at_equal(rows, results.rows("drafts"), m) for m in ("entropy", "distinct_2")}
    methods = list(dict.fromkeys(SETTING.match(r["name"]).group(1) for r in rows))
    for method in methods:
        if method == "draft":
            continue
        line = [method]
        for measure in ("entropy", "distinct_2"):
            values = [v for name, v in found[measure].items() if SETTING.match(name).group(1) == method and v]
            better = sum(v[2] < 0 for v in values)
            worse = sum(v[1] > 0 for v in values)
            mean = sum(v[0] for v in values) / len(values) if values else float("nan")
            line += [f"{mean:+.3f} ({100 * (math.exp(mean) - 1):+.0f} %)", f"{better} / {worse} of {len(values)}"]
        lines.append(line)
    return table(["method", "nats to the draft at equal entropy, mean over settings", "settings clearly better / worse",
                  "at equal distinct-2", "settings clearly better / worse"], lines)


# ---- plots -------------------------------------------------------------------------------------------------------

def plots(results, folder):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "redraft"  # the same results give the same file
    os.makedirs(folder, exist_ok=True)

    def save(figure, name):
        figure.tight_layout()
        figure.savefig(os.path.join(folder, name), metadata={"Date": None})
        plt.close(figure)

    if "frontier" in results.groups:
        rows, human = results.rows("frontier"), results.human("frontier")
        figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
        for panel, (measure, label) in zip(panels, (("entropy", "unigram entropy, nats"), ("distinct_2", "distinct-2 per sample"),
                                                    ("set_distinct_4", "distinct-4 over the set"))):
            methods = list(dict.fromkeys(SETTING.match(r["name"]).group(1) for r in rows))
            for index, method in enumerate(methods):
                mine = [r for r in rows if SETTING.match(r["name"]).group(1) == method]
                for path, style in (("temperature", "-"), ("nucleus", ":")):
                    on = [r for r in mine if float(SETTING.match(r["name"]).group(3 if path == "temperature" else 2))
                          == (0.9 if path == "temperature" else 1.0)]
                    points = sorted((value(r, measure), value(r, "judge_ppl_pooled")) for r in on)
                    panel.plot(*zip(*points), style, marker=".", color=f"C{index}", linewidth=1.6 if method == "draft" else 1,
                               label=method if path == "temperature" else None)
            if human:
                panel.plot(value(human, measure), value(human, "judge_ppl_pooled"), "k*", markersize=11, label="human")
            panel.set(xlabel=label, yscale="log")
        panels[0].set_ylabel("judge perplexity, pooled")
        panels[0].legend(fontsize=7)
        save(figure, "frontier.svg")

    if "ratio" in results.groups:
        rows = results.rows("ratio")
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
        for panel, measure, label in zip(panels, ("judge_ppl_pooled", "entropy"), ("judge perplexity, pooled", "unigram entropy")):
            draft = value(rows[0], measure)
            panel.axhline(draft, color="gray", linewidth=0.8, label="draft")
            for by in ("snapshot", "held-out:4", "random"):
                points = [(float(r["name"].split()[1]), value(r, measure)) for r in rows if r["name"].split()[0] == by]
                panel.plot(*zip(*points), marker=".", label=by)
            panel.set(xlabel="remasked share", ylabel=label)
        panels[0].legend(fontsize=8)
        save(figure, "ratio.svg")

    if "drafts" in results.groups:
        drafts, points = results.rows("drafts"), {}
        for group in ("headline", "scores", "rounds", "ratio", "steps", "stages", "reuse", "sharpness", "compute"):
            rows = results.rows(group) if group in results.groups else []
            equal = at_equal(rows, drafts, "entropy")
            points |= {r["name"]: (r["cost"]["rows"], equal[r["name"]][0], value(r, "judge_ppl_pooled")) for r in rows if equal[r["name"]]}
        points = {name: point for name, point in points.items() if point[1] < WORST_SHOWN}
        figure, panel = plt.subplots(figsize=(8.5, 5))
        x, y, c = zip(*points.values())
        panel.axhline(0, color="gray", linewidth=0.8)
        figure.colorbar(panel.scatter(x, y, c=c, cmap="viridis", s=18), label="judge perplexity, pooled")
        best = math.inf
        for name, (rows, difference, _) in sorted(points.items(), key=lambda item: item[1]):
            if difference < best:
                best = difference
                panel.annotate(name, (rows, difference), fontsize=7, xytext=(3, -9), textcoords="offset points")
        panel.set(xlabel="rows a sample", ylabel="nats a token to the best draft of equal entropy", xscale="log")
        save(figure, "pareto.svg")


# ---- the page ----------------------------------------------------------------------------------------------------

def tables(results):
    out, speeds = {}, {}
    for row in results.rows("joint_speed") if "joint_speed" in results.groups else []:
        speeds.setdefault(row["group"], {})[row["name"]] = row["tokens_per_s"]
    for name, group in results.groups.items():
        label, base = name[: name.rfind(".") + 1], name.rsplit(".", 1)[-1]
        drafts, rows = results.groups.get(label + "drafts"), group["rows"]
        equal = drafts and base not in ALONE and {m: at_equal(rows, drafts["rows"], m) for m in ("entropy", "distinct_2")}
        if base == "joint_speed":
            continue
        if base == "headline":
            lines = [full_line(r, equal and equal["entropy"]) for r in rows]
            if group["human"]:
                lines.insert(0, full_line(group["human"] | {"name": "**human**"}))
            out[name] = table(FULL, lines)
        elif base == "frontier":
            out[name], out["frontier-summary"] = frontier_table(results), summary_table(results)
        elif base == "joint_toy":
            out[name] = table(TOY, [[r["name"], f"{r['nfe']:g}", f"{r['passes']:g}", f"{r['distance']:.4f} ± {r['error']:.4f}"] for r in rows])
        elif base == "joint_refine":
            out[name] = table(JOINT_REFINE, [joint_refine_line(r, equal["entropy"], speeds[base]) for r in rows])
        elif base == "joint_frontier":
            lift = {f"did-lift{r['name'].removeprefix(LIFT)}": r for r in results.rows("frontier") if r["name"].startswith(LIFT)}
            pairs = [*rows, *({**r, "name": name} for name, r in lift.items())]
            equal = at_equal(pairs, drafts["rows"], "entropy")
            out[name] = table(JOINT_REFINE[:-1], [joint_refine_line(r, equal, None) for r in pairs])
        elif base in ("joint_full", "joint_block"):
            out[name] = table(JOINT, [joint_line(r, speeds[base]) for r in rows])
        elif base != "drafts":
            out[name] = table(SHORT, [short_line(r, equal) for r in rows])
    return out


def filled(page, found):
    """The page with its tables written anew. A marker without results is an error: nothing stands there unmeasured."""

    def replace(match):
        name = match.group(1)
        if name not in found:
            sys.exit(f"the page asks for table `{name}`; there are results for {', '.join(sorted(found))}")
        return f"<!-- table: {name} -->\n{found[name]}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", replace, page, flags=re.S)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--results", default=os.path.join(ROOT, "benches", "quality"))
    ap.add_argument("--docs", default=os.path.join(ROOT, "docs"))
    ap.add_argument("--check", action="store_true", help="fail if the pages do not hold these results")
    args = ap.parse_args()
    results = Results(args.results)
    found = tables(results)
    for name in PAGES:
        path = os.path.join(args.docs, name)
        with open(path) as f:
            page = f.read()
        new = filled(page, found)
        if args.check and new != page:
            sys.exit(f"{path}: its tables are not those of {args.results}; run report.py")
        if new != page:
            with open(path + ".tmp", "w") as f:
                f.write(new)
            os.replace(path + ".tmp", path)
    if not args.check:
        plots(results, os.path.join(args.docs, "evidence"))


if __name__ == "__main__":
    main()
