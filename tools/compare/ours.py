"""This engine's side: commands of the release binary, and what their answers say."""

import json
import pathlib

import machine
import outputs

# Flags of a setting. Where weights have 8 or 4 bits, what stays floats has 16, as in llama.cpp.
SETTINGS = {
    "f32": ["--dtype", "f32"],
    "bf16": ["--dtype", "bf16"],
    "q8": ["--weights", "q8", "--dtype", "bf16"],
    "q4": ["--weights", "q4", "--dtype", "bf16"],
    # A GGUF file's own groups.
    "stored": ["--dtype", "bf16"],
}


def test_of(shape):
    rows, position = shape
    count = "1 row" if rows == 1 else f"{rows} rows"
    return f"step, {count} after {position} cached" if position else f"full pass, {count}"


def shapes_text(shapes):
    return ",".join(f"{rows}@{position}" for rows, position in shapes)


class Redraft:
    def __init__(self, o):
        self.binary, self.o = o.binary, o
        self.place = o.work / "outputs"
        self.place.mkdir(parents=True, exist_ok=True)

    def version(self):
        return machine.answer([self.binary, "--version"]).out.strip().removeprefix("redraft ")

    def common(self, setting):
        return [*SETTINGS[setting], "--device", "cpu", "--threads", self.o.threads]

    def inspect(self, model):
        return json.loads(machine.answer([self.binary, "inspect", model, "--format", "json"]).out)

    def bench(self, model, setting, *words):
        common = [*self.common(setting), "--runs", self.o.runs, "--format", "json"]
        return [self.binary, "bench", "--model", model, *words, *common]

    def forwards(self, model, setting, shapes):
        """Times single forwards, each with the draw of its tokens from the whole distribution."""
        words = ["--forward", shapes_text(shapes), "--forward-top-p", "1", "--no-schedules"]

        def read(ran):
            found = json.loads(ran.out)["forwards"]
            return {test_of((entry["rows"], entry["position"])): entry["median_ms"] for entry in found}

        return self.bench(model, setting, *words), read

    def text(self, model, setting, test, schedule, length, per_step=False):
        """Times whole texts of a schedule: stages, or the name of a preset. The command wants a
        forward beside it, which is as short as can be."""
        read = lambda ran: {test: total_ms(json.loads(ran.out), per_step)}
        return self.bench(model, setting, *stage_flags(schedule), "--length", length, "--forward", "1@0", "--forward-top-p", "1"), read

    def prompted(self, model, setting, test, schedule, length, prompt):
        """Times a text after a prompt, which `bench` does not take: the first one after loading."""
        command = self.generate_command(model, setting, schedule, length, "--prompt", prompt)
        return command, lambda ran: {test: json.loads(ran.out)["timings"]["total_ms"]}

    def logits(self, model, setting, shape, ids):
        """(ROWS, V): rows that see the prefix and each other, over a prefix that sees itself."""
        rows, position = shape
        file, out = self.place / "ids.json", self.place / "ours.safetensors"
        file.write_text(json.dumps(ids))
        machine.answer([self.binary, "forward", "--model", model, "--tokens-file", file, "--block-len", position or "full",
                        "--out", out, *self.common(setting)])
        return outputs.read_logits(out)[position:]

    def causal_logits(self, model, setting, ids):
        file, out = self.place / "ids.json", self.place / "ours.safetensors"
        file.write_text(json.dumps(ids))
        machine.answer([self.binary, "forward", "--model", model, "--tokens-file", file, "--out", out, *self.common(setting)])
        return outputs.read_logits(out)

    def generate_command(self, model, setting, schedule, length, *words):
        return [self.binary, "generate", "--model", model, *stage_flags(schedule), "--length", length, "--ignore-eos", "--format", "json",
                *words, *self.common(setting)]

    def generate(self, *what):
        """What `generate` answers for one text of full length."""
        return json.loads(machine.answer(self.generate_command(*what)).out)


def stage_flags(schedule):
    if isinstance(schedule, str):
        return ["--preset", schedule]
    return [word for stage in schedule for word in ("--stage", stage)]


def total_ms(bench, per_step=False):
    """Of the one row that `bench --format json` has for one schedule, length and batch."""
    (row,) = bench["rows"]
    steps = sum(stage["forwards"] for stage in row["stages"])
    return row["total_ms"] / steps if per_step else row["total_ms"]


def nfe(generated):
    return sum(stage["nfe"] for stage in generated["stages"])
