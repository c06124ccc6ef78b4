from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

import redraft

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "models" / "redraft-stories-10m"


@pytest.fixture(scope="session")
def model() -> Path:
    return MODEL


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
