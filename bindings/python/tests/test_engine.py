"""Texts, arrays, events and errors, from one thread."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

import redraft

Command = Callable[..., "dict[str, Any]"]
PROMPT = "Once upon a time"


@pytest.mark.parametrize("schedule", ["draft", "did", "did-joint"])
def test_tokens_are_those_of_the_command(engine: redraft.Engine, command: Command, schedule: str) -> None:
    expected = command("--prompt", PROMPT, "--length", "24", "--seed", "7", "--preset", schedule)
    found = engine.generate(PROMPT, length=24, seed=7, schedule=schedule)
    assert found.tokens.tolist() == expected["tokens"]
    assert (found.text, found.draft) == (expected["text"], expected["draft"]["text"])
    fields = found.to_dict()
    for of_the_engine in ("model", "device", "dtype"):
        del expected[of_the_engine]
    for timed in (expected, fields):
        del timed["timings"], timed["tokens_per_s"]
        for stage in timed["stages"]:
            del stage["ms"]
    assert fields == expected


def test_arrays(engine: redraft.Engine) -> None:
    found = engine.generate(PROMPT, length=16, seed=1, schedule="did", ignore_eos=True)
    shapes = {
        "tokens": ((16,), np.uint32),
        "draft_tokens": ((16,), np.uint32),
        "positions": ((16,), np.int64),
        "confidence": ((16,), np.float32),
        "log_prob": ((16,), np.float32),
        "revealed_at": ((16, 2), np.uint32),
    }
    for name, (shape, kind) in shapes.items():
        array = getattr(found, name)
        assert isinstance(array, np.ndarray) and (array.shape, array.dtype) == (shape, kind), name
        assert not array.flags.writeable
    assert ((0 < found.confidence) & (found.confidence <= 1)).all() and (found.log_prob <= 0).all()
    assert found.canvas[found.positions].tolist() == found.tokens.tolist()
    fields = found.to_dict()
    assert np.array(fields["confidence"], np.float32).tolist() == found.confidence.tolist()
    assert fields["revealed_at"] == found.revealed_at.tolist()
    assert "".join(found.pieces) == found.text == str(found)
    assert found.finish == "length" and len(found.stages) == 2 and found.timings["total_ms"] > 0
    again = pickle.loads(pickle.dumps(found))
    assert again.text == found.text and (again.confidence == found.confidence).all()


def test_a_batch_has_the_texts_of_its_requests_alone(engine: redraft.Engine) -> None:
    prompts = ["The dog", "A little girl", "One day"]
    together = engine.generate_batch(prompts, length=20, seed=3)
    for prompt, found in zip(prompts, together):
        assert engine.generate(prompt, length=20, seed=3).tokens.tolist() == found.tokens.tolist(), prompt


def test_every_kind_of_prompt(engine: redraft.Engine) -> None:
    tokens = engine.tokenize(PROMPT)
    assert engine.detokenize(tokens) == PROMPT
    bos = engine.generate(PROMPT, length=8).canvas[: -8].tolist()
    by_text = engine.generate(PROMPT, length=8, seed=2)
    assert engine.generate(np.array(bos), length=8, seed=2).text == by_text.text  # type: ignore[arg-type]
    filled = engine.generate(infill="The [____:4] sat on the mat.", seed=1)
    assert filled.text.startswith("The") and filled.text.endswith(" sat on the mat.") and len(filled.tokens) == 4
    canvas = [*bos, None, None, None]
    assert len(engine.generate(canvas=canvas, seed=1).tokens) == 3
    refined = engine.generate(PROMPT, draft=" there was a little girl. She green to the park.", schedule="did", seed=1)
    assert refined.draft == " there was a little girl. She green to the park."
    stopped = engine.generate(PROMPT, length=40, stop=[" there"], seed=7)
    assert stopped.finish == "stop-text" and " there" not in stopped.text


def test_deltas_join_to_the_text(engine: redraft.Engine) -> None:
    for schedule in ("draft", "did"):
        whole = engine.generate(PROMPT, length=40, seed=7, schedule=schedule)
        text, snapshots, done = "", 0, None
        with engine.stream(PROMPT, length=40, seed=7, schedule=schedule) as stream:
            for event in stream:
                assert done is None
                if isinstance(event, redraft.Delta):
                    text += event.text
                elif isinstance(event, redraft.Snapshot):
                    assert "".join(event.pieces) == event.text
                    assert event.positions.dtype == np.int64 and event.confidence.dtype == np.float32
                    assert len(event.positions) == len(event.tokens) == len(event.confidence)
                    assert (event.confidence[[token is None for token in event.tokens]] == 0).all()
                    snapshots += 1
                else:
                    done = event.generation
        assert done is not None and text == done.text == whole.text and snapshots > 0
        assert list(stream) == []


def test_cancel(engine: redraft.Engine) -> None:
    stream = engine.stream("One day", length=400, ignore_eos=True)
    stream.cancel()
    *_, last = stream
    assert isinstance(last, redraft.Done) and last.generation.finish == "cancelled"
    # Dropped streams cancel: nothing is left in flight.
    stream = engine.stream("One day", length=400, ignore_eos=True)
    next(stream)
    del stream
    deadline = time.monotonic() + 20
    while engine.stats["running"] + engine.stats["queued"] > 0:
        assert time.monotonic() < deadline, engine.stats
        time.sleep(0.01)
    assert engine.stats["kv_pages_used"] == 0


def test_errors_have_kinds(engine: redraft.Engine, model: Path, overflowing: Path, tmp_path: Path) -> None:
    with pytest.raises(redraft.ConfigError, match="no such model"):
        redraft.Engine("no/such/directory")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(redraft.WeightsError, match="safetensors"):
        redraft.Engine(tmp_path)
    with pytest.raises(redraft.TokenizerError, match="no.json"):
        redraft.Engine(model, tokenizer="no.json")
    with pytest.raises(redraft.DeviceError):
        redraft.Engine(model, device="cuda:77")
    with pytest.raises(redraft.RequestError, match="device: expected auto"):
        redraft.Engine(model, device="tpu")
    with pytest.raises(ValueError, match="top_p"):
        engine.generate("a", top_p=3)
    with pytest.raises(redraft.RequestError, match="presets"):
        engine.stream("a", schedule="best")
    with pytest.raises(redraft.RequestError, match="one of the keys"):
        engine.generate("a", infill="a [_:2]")
    with pytest.raises(redraft.RequestError, match="score"):
        engine.score("")
    with pytest.raises(TypeError, match="lenght"):
        engine.generate("a", lenght=3)  # type: ignore[call-arg]
    with redraft.Engine(model, device="cpu", threads=1, kv_pages=4) as small, pytest.raises(redraft.OutOfPages, match="pages"):
        small.generate("a", length=200)
    with pytest.raises(redraft.EngineGone, match="closed"):
        small.generate("a")
    small.close()
    weights = tmp_path / "model.safetensors"
    weights.symlink_to(weights)
    with pytest.raises(redraft.FileError, match="model.safetensors: ") as refused:
        redraft.Engine(tmp_path)
    assert isinstance(refused.value, OSError)
    with redraft.Engine(overflowing, device="cpu", threads=1) as broken, pytest.raises(redraft.KernelError, match="finite"):
        broken.generate([1, 2], length=4)
    assert all(issubclass(getattr(redraft, name), redraft.RedraftError) for name in dir(redraft) if name.endswith("Error"))


def test_scores_model_and_counters(engine: redraft.Engine) -> None:
    nll = engine.score(PROMPT)
    assert len(nll) == len(engine.tokenize(PROMPT)) and all(value > 0 for value in nll)
    assert engine.score(engine.tokenize(PROMPT)) == nll
    assert engine.model["generates"] and engine.model["vocab_size"] > 0
    assert engine.stats["tokens"] > 0 and engine.device_name.startswith("cpu")


def test_the_interpreter_goes_on_during_a_wait(engine: redraft.Engine) -> None:
    turns, over = 0, threading.Event()

    def turn() -> None:
        nonlocal turns
        while not over.is_set():
            turns += 1
            time.sleep(0.001)

    thread = threading.Thread(target=turn)
    thread.start()
    before = time.monotonic()
    engine.generate(PROMPT, length=200, seed=7, ignore_eos=True)
    waited, seen = time.monotonic() - before, turns
    over.set()
    thread.join()
    # With the lock held it would stand still.
    assert seen > waited / 0.001 / 20, f"{seen} turns in {waited} s"


def test_threads_share_an_engine(engine: redraft.Engine) -> None:
    alone = engine.generate("The dog", length=20, seed=5).text
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(engine.generate("The dog", length=20, seed=5).text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [alone] * 4


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_a_wait(model: Path) -> None:
    program = textwrap.dedent(
        """
        import signal, sys, time, redraft
        # What a shell starts in the background ignores the signal, and its children too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        engine = redraft.Engine(sys.argv[1], device="cpu", threads=1)
        engine.generate("One day", length=4)
        print("ready", flush=True)
        try:
            while True:
                engine.generate("One day", length=400, ignore_eos=True)
        except KeyboardInterrupt:
            deadline = time.monotonic() + 20
            while engine.stats["running"] and time.monotonic() < deadline:
                time.sleep(0.01)
            print("interrupted", engine.stats["running"], flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(model)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("interrupted 0\n", 0)


def test_a_program_may_end_in_mid_request(model: Path) -> None:
    program = (
        "import sys, redraft; engine = redraft.Engine(sys.argv[1], device='cpu');"
        "stream = engine.stream('One day', length=400, ignore_eos=True); print(type(next(stream)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(model)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["Snapshot"], "")


def test_types(tmp_path: Path) -> None:
    """The tests and the package under mypy --strict, and the stub beside the native module."""
    here = Path(__file__).parent
    config = here.parent / "pyproject.toml"
    cache = ["--cache-dir", str(tmp_path)]
    for line in (
        [sys.executable, "-m", "mypy", "--config-file", str(config), *cache, str(here), str(here.parent / "examples")],
        [sys.executable, "-m", "mypy", "--config-file", str(config), *cache, "-p", "redraft"],
        [sys.executable, "-m", "mypy.stubtest", "redraft._redraft", "--ignore-missing-stub"],
    ):
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_prints_a_table(model: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "draft_and_refine.py"
    done = subprocess.run([sys.executable, str(example), str(model)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens changed") == 3 and "[" in done.stdout
