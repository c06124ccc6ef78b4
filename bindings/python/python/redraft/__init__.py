"""redraft: a draft-then-refine inference engine for diffusion language models.

    import redraft

    with redraft.Engine("models/redraft-stories-10m") as engine:
        print(engine.generate("Once upon a time", length=64, seed=7).text)
"""

from ._engine import AsyncStream, Engine, Prompt, RequestOptions, Stream
from ._errors import (
    ConfigError,
    DeviceError,
    EngineGone,
    FileError,
    KernelError,
    OutOfPages,
    RedraftError,
    RequestError,
    TokenizerError,
    WeightsError,
)
from ._results import Delta, Done, Event, Generation, Snapshot

__all__ = [
    "AsyncStream",
    "ConfigError",
    "Delta",
    "DeviceError",
    "Done",
    "Engine",
    "EngineGone",
    "Event",
    "FileError",
    "Generation",
    "KernelError",
    "OutOfPages",
    "Prompt",
    "RedraftError",
    "RequestError",
    "RequestOptions",
    "Snapshot",
    "Stream",
    "TokenizerError",
    "WeightsError",
]
