#!/usr/bin/env python3
"""Plot held-out losses of a training log:  python3 plot.py WORK/run/log.jsonl losses.svg"""
import json
import sys


def plot_log(log_path, out_path):
    import matplotlib

    matplotlib.use("svg" if out_path.endswith(".svg") else "agg")
    import matplotlib.pyplot as plt

    with open(log_path) as f:
        records = [json.loads(line) for line in f]
    evals = [r for r in records if "eval" in r]
    steps = [r for r in records if "progress" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    known = {"step", "minutes", "progress", "tokens", "lr", "grad"}
    for key in sorted({k for r in steps for k in r} - known):
        points = [(r["minutes"], r[key]) for r in steps if key in r]
        if points:
            left.plot(*zip(*points), label=key, linewidth=0.8)
    left.set(title="training loss", xlabel="minutes", ylabel="nats per masked token", ylim=(1, 7))
    left.legend()
    for key in evals[-1]["eval"] if evals else []:
        right.plot([r["minutes"] for r in evals], [r["eval"][key] for r in evals], marker=".", label=key, linewidth=0.8)
    right.set(title="held-out loss (averaged weights)", xlabel="minutes", ylim=(1, 7))
    if evals:
        right.legend(fontsize=6, ncol=2)
    figure.tight_layout()
    # no date in the file: the same log gives the same picture
    figure.savefig(out_path, metadata={"Date": None} if out_path.endswith(".svg") else None)
    plt.close(figure)


if __name__ == "__main__":
    plot_log(sys.argv[1], sys.argv[2])
