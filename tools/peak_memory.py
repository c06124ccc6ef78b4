#!/usr/bin/env python3
"""Peak resident memory of `redraft generate` against what it must hold: weights and K/V pages.

    python3 tools/random_checkpoint.py --like bd3lm-owt --out /some/dir
    python3 tools/peak_memory.py target/release/redraft /some/dir --length 1023 --dtype bf16

Weights are counted in the run's dtype, a table that is the head too once, and pages for the whole sequence (16 positions each). The
resident pages of the child are read a hundred times a second: those of its own (anonymous) and those of mapped files, which the
system can drop; `peak` is their largest sum, and at least the kernel's own high-water mark.
Prints one line per run and fails above `--limit`. Standard library only, Linux.
"""
import argparse
import json
import os
import subprocess
import sys
import time

PAGE = 16
MIB = 1 << 20


def resident(pid):
    """Bytes of (anonymous, file-backed) pages of a process, zeros where it is gone."""
    try:
        with open(f"/proc/{pid}/status") as status:
            fields = dict(line.split(":", 1) for line in status if line.startswith("Rss"))
    except OSError:
        return 0, 0
    kib = lambda name: int(fields.get(name, "0 kB").split()[0])
    return 1024 * (kib("RssAnon") + kib("RssShmem")), 1024 * kib("RssFile")


def watch(command, expendable):
    """Runs a command. Returns (stdout, largest anonymous, largest file-backed, largest sum, seconds)."""

    def first_to_go():
        # Where memory runs out, this process goes and nothing else.
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")

    start, anonymous, mapped, both = time.time(), 0, 0, 0
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=first_to_go if expendable else None)
    # Read as it comes: a long text would fill the pipe.
    os.set_blocking(child.stdout.fileno(), False)
    output = b""
    while True:
        output += child.stdout.read() or b""
        found = resident(child.pid)
        anonymous, mapped, both = max(anonymous, found[0]), max(mapped, found[1]), max(both, sum(found))
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(0.01)
    seconds = time.time() - start
    output += child.stdout.read() or b""
    if status != 0:
        sys.exit(f"{' '.join(command)} failed with status {status}")
    return output, anonymous, mapped, max(both, usage.ru_maxrss * 1024), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=1023)
    parser.add_argument("--dtype", choices=["f32", "bf16"], action="append")
    parser.add_argument("--preset", default="did")
    parser.add_argument("--stage", action="append", default=[], help="stages instead of a preset, as for generate")
    parser.add_argument("--limit", type=float, default=1.2, help="of the whole run, activations included [1.2]")
    parser.add_argument("--expendable", action="store_true", help="ask the system to end this run first where memory is short")
    args = parser.parse_args()
    facts = json.loads(subprocess.run([args.binary, "inspect", args.model, "--format", "json"], check=True, capture_output=True).stdout)
    failed = False
    schedule = [flag for stage in args.stage for flag in ("--stage", stage)] or ["--preset", args.preset]
    for dtype in args.dtype or ["f32", "bf16"]:
        weights = facts["parameters"] * (4 if dtype == "f32" else 2)
        pages = -(-(args.length + 1) // PAGE) * PAGE * facts["kv_bytes_per_token"][dtype]
        command = [args.binary, "generate", "--model", args.model, "--length", str(args.length), "--ignore-eos", "--dtype", dtype,
                   "--device", "cpu", *schedule, "--format", "json"]
        output, anonymous, mapped, peak, seconds = watch(command, args.expendable)
        result = json.loads(output)
        ratio = peak / (weights + pages)
        failed |= ratio > args.limit
        print(f"{'+'.join(facts['dtypes'])} -> {dtype}: peak {peak / MIB:.0f} MiB (own {anonymous / MIB:.0f}, files {mapped / MIB:.0f}), "
              f"weights {weights / MIB:.0f} MiB, pages {pages / MIB:.0f} MiB, ratio {ratio:.3f} (limit {args.limit}); "
              f"loaded in {result['timings']['load_ms'] / 1e3:.1f} s, {len(result['tokens'])} tokens in {seconds:.1f} s, {result['device']}",
              flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
