#!/usr/bin/env python3
"""Peak resident memory of `redraft generate` against what it must hold: weights and K/V pages.

    python3 tools/random_checkpoint.py --like bd3lm-owt --out /some/dir
    python3 tools/peak_memory.py target/release/redraft /some/dir --length 1023 --dtype bf16

Weights are counted in the run's dtype, pages for the whole sequence (16 positions each). Prints one line per run and fails
above `--limit`. Standard library only; the peak is the kernel's own high-water mark of the child (ru_maxrss).
"""
import argparse
import json
import os
import subprocess
import sys
import time

PAGE = 16


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=1023)
    parser.add_argument("--dtype", choices=["f32", "bf16"], action="append")
    parser.add_argument("--preset", default="did")
    parser.add_argument("--limit", type=float, default=1.3)
    args = parser.parse_args()
    facts = json.loads(subprocess.run([args.binary, "inspect", args.model, "--format", "json"], check=True, capture_output=True).stdout)
    failed = False
    for dtype in args.dtype or ["f32", "bf16"]:
        weights = facts["parameters"] * (4 if dtype == "f32" else 2)
        pages = -(-(args.length + 1) // PAGE) * PAGE * facts["kv_bytes_per_token"][dtype]
        command = [args.binary, "generate", "--model", args.model, "--length", str(args.length), "--ignore-eos", "--dtype", dtype,
                   "--preset", args.preset, "--format", "json"]
        start = time.time()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        if status != 0:
            sys.exit(f"{' '.join(command)} failed with status {status}")
        result = json.loads(output)
        peak = usage.ru_maxrss * 1024
        ratio = peak / (weights + pages)
        failed |= ratio > args.limit
        print(f"{dtype}: peak {peak / 2**20:.0f} MiB, weights {weights / 2**20:.0f} MiB, pages {pages / 2**20:.0f} MiB, ratio {ratio:.3f} "
              f"(limit {args.limit}), {len(result['tokens'])} tokens in {time.time() - start:.1f} s, {result['device']}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
