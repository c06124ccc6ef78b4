"""The machine: what it is, how busy others keep it, and one measurement as a child process."""

import contextlib
import os
import pathlib
import platform
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass

# What products and conversions here and elsewhere ask a CPU for.
FEATURES = ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16",
            "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve")
TICKS = os.sysconf("SC_CLK_TCK")


def facts():
    """Name, features and cores of the CPU."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    values = {}
    for line in lines:
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())
    flags = set((values.get("flags") or values.get("Features") or "").split())
    return {
        "cpu": values.get("model name") or platform.processor() or platform.machine(),
        "family_model": f"{values.get('cpu family', '?')}/{values.get('model', '?')}",
        "features": [feature for feature in FEATURES if feature in flags],
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def parse_stat(text):
    """(busy seconds, seconds that a hypervisor took) of all cores since the start: /proc/stat."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(n) for n in text.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq) / TICKS, steal / TICKS


def busy():
    return parse_stat(pathlib.Path("/proc/stat").read_text())


def cpu_of(pid):
    """Seconds of CPU that a process has used, its threads included."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@dataclass
class Ran:
    """A child that has ended. `foreign`: cores that others kept busy meanwhile; `stolen`: those
    that the hypervisor gave away."""

    code: int
    out: str
    err: str
    wall_s: float
    foreign: float
    stolen: float


def run(command, env=None, pids=(), seconds=1800):
    """Runs a child to its end. `pids`: processes that work for it, whose CPU is not foreign."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # Other cores' work is told from the child's by the CPU time that the kernel accounts to it,
        # children of its own included once it has waited for them.
        (before, stolen), helpers, start = busy(), sum(map(cpu_of, pids)), time.monotonic()
        child = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                 env={**os.environ, **(env or {})}, start_new_session=True)
        timer = threading.Timer(seconds, lambda: os.killpg(child.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        finally:
            timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - start
        after, stolen_after = busy()
        own = used.ru_utime + used.ru_stime + sum(map(cpu_of, pids)) - helpers
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="surrogateescape"))
        return Ran(child.returncode, *texts, wall, max(0.0, (after - before - own) / wall), max(0.0, (stolen_after - stolen) / wall))


class Failed(Exception):
    """A program that should have answered did not."""


def answer(command, **more):
    """What a child prints, or Failed with its last words."""
    ran = run(command, **more)
    if ran.code:
        words = " | ".join(line for line in ran.err.strip().splitlines()[-3:]) or "it says nothing"
        raise Failed(f"{pathlib.Path(str(command[0])).name} ended with code {ran.code}: {words}")
    return ran
