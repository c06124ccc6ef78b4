from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

import redraft

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "models" / "redraft-stories-10m"


@pytest.fixture(scope="session")
def model() -> Path:
    return MODEL


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """A tiny model whose logits are infinite: its last layer holds the largest numbers of f32."""
    whole, dir = ROOT / "tests" / "fixtures" / "bd3lm-plain", tmp_path / "overflowing"
    dir.mkdir()
    for name in ["config.json", "tokenizer.json"]:
        (dir / name).write_bytes((whole / name).read_bytes())
    file = bytearray((whole / "model.safetensors").read_bytes())
    data = 8 + int.from_bytes(file[:8], "little")
    start, end = json.loads(file[8:data])["backbone.output_layer.linear.weight"]["data_offsets"]
    file[data + start : data + end] = np.full((end - start) // 4, np.finfo("<f4").max, "<f4").tobytes()
    (dir / "model.safetensors").write_bytes(file)
    return dir


@pytest.fixture(scope="session")
def engine() -> Iterator[redraft.Engine]:
    with redraft.Engine(MODEL, device="cpu", threads=2) as engine:
        yield engine


@pytest.fixture(scope="session")
def command() -> Callable[..., dict[str, Any]]:
    """`redraft generate --format json` with more arguments. REDRAFT_COMMAND names another binary than
    that of the README's build."""
    binary = os.environ.get("REDRAFT_COMMAND", str(ROOT / "target" / "release" / "redraft"))

    def run(*arguments: str) -> dict[str, Any]:
        line = [binary, "generate", "--model", str(MODEL), "--device", "cpu", "--format", "json", *arguments]
        fields: dict[str, Any] = json.loads(subprocess.run(line, check=True, capture_output=True).stdout)
        return fields

    return run
