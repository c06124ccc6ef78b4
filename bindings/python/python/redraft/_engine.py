"""Engines and streams, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import functools
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Optional, TypedDict, TypeVar, Union

from . import _redraft
from ._results import Done, Event, Generation, event_of, generation_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

_T = TypeVar("_T")

Prompt = Union[str, Sequence[int]]
"""A text, or token ids."""


class RequestOptions(TypedDict, total=False):
    """What may be asked of a text; all of it is optional. One of the prompt, ``messages``,
    ``infill``, ``canvas`` and ``draft`` says what is given."""

    messages: Union[Sequence[Mapping[str, Any]], Mapping[str, Any]]
    """A chat: dicts with ``role`` and ``content``, or a dict with ``messages``, ``tools``, ..."""
    infill: str
    """A text with holes: ``"The [____:3] sat."`` has one of three tokens."""
    canvas: Sequence[Optional[int]]
    """Every position: a token id, or None where the model writes."""
    draft: str
    """A text to refine, after the prompt."""
    schedule: Union[str, Sequence[str]]
    """A preset (``draft``, ``did``, ``did-lift``, ...), or stages."""
    length: int
    """Tokens to generate."""
    seed: int
    sample: int
    """Index of this sample among those of one seed."""
    priority: int
    """Lower values go first where not all requests fit. No text depends on it."""
    temperature: float
    top_p: float
    top_p_rule: str
    """``within`` or ``crossing``."""
    top_k: int
    stop: Union[str, Sequence[str]]
    ignore_eos: bool
    stop_entropy: float
    bos: str
    """``auto``, ``yes`` or ``no``."""


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy, and paths, as JSON has them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (Iterable, Mapping)):
        return list(value)
    raise TypeError(f"expected what JSON has, found {type(value).__name__}")


def _to_json(prompt: Optional[Prompt], options: Mapping[str, Any]) -> str:
    unknown = options.keys() - RequestOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}, expected any of {', '.join(RequestOptions.__annotations__)}")
    request = {key: value for key, value in options.items() if value is not None}
    if prompt is not None:
        request["prompt"] = prompt
    return json.dumps(request, default=_plain)


def _wake(loop: asyncio.AbstractEventLoop, woken: asyncio.Future[None]) -> None:
    """Called by a thread of the native module."""
    try:
        loop.call_soon_threadsafe(_tell, woken)
    except RuntimeError:
        # The loop is closed: nobody waits.
        pass


def _tell(woken: asyncio.Future[None]) -> None:
    # The task may have been cancelled meanwhile.
    if not woken.done():
        woken.set_result(None)


async def _ready(poll: Callable[[Callable[[], object]], Optional[_T]]) -> _T:
    """What `poll` has, once it has something."""
    loop = asyncio.get_running_loop()
    while True:
        woken: asyncio.Future[None] = loop.create_future()
        found = poll(functools.partial(_wake, loop, woken))
        if found is not None:
            return found
        await woken


class Stream(Iterator[Event]):
    """Events of a request as an iterator that waits: :class:`Delta`, :class:`Snapshot`, and
    :class:`Done` at the end. A stream that is dropped cancels its request."""

    def __init__(self, request: _redraft.Request) -> None:
        self._request: Optional[_redraft.Request] = request

    def __next__(self) -> Event:
        event = self._request.next() if self._request is not None else None
        if event is None:
            self._request = None
            raise StopIteration
        return event_of(event)

    def cancel(self) -> None:
        """Ends the request at the next forward; :class:`Done` then has what was revealed."""
        if self._request is not None:
            self._request.cancel()

    def close(self) -> None:
        """Cancels the request; there are no more events."""
        self.cancel()
        self._request = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        self.close()


class AsyncStream(AsyncIterator[Event]):
    """Events of a request for ``async for``; no thread waits for them. A task that is cancelled
    while it waits cancels the request, and so does a stream that is dropped."""

    def __init__(self, request: _redraft.Request) -> None:
        self._request: Optional[_redraft.Request] = request

    async def __anext__(self) -> Event:
        if self._request is None:
            raise StopAsyncIteration
        try:
            event = event_of(await _ready(self._request.poll))
        except BaseException:
            await self.aclose()
            raise
        if isinstance(event, Done):
            self._request = None
        return event

    def cancel(self) -> None:
        """Ends the request at the next forward; :class:`Done` then has what was revealed."""
        if self._request is not None:
            self._request.cancel()

    async def aclose(self) -> None:
        """Cancels the request; there are no more events."""
        self.cancel()
        self._request = None

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        await self.aclose()


class Engine:
    """A loaded model on a thread of its own. Threads and tasks may share it: their requests are
    batched, and each has the text that it would have alone.

    ``path`` is a Hugging Face directory or a GGUF file. ``device`` is ``auto``, ``cpu`` or
    ``cuda:0``; ``dtype`` ``f32`` or ``bf16``; ``weights`` ``f32``, ``bf16``, ``q8`` or ``q4``;
    ``threads`` those of the CPU. ``max_sequences`` requests are in flight at once (8), with
    ``max_rows`` rows in one forward (512), and pages for ``max_positions`` positions each, or
    ``kv_pages`` pages of ``page_size`` positions in all. ``tokenizer`` is the path of another
    tokenizer.json, ``models`` more models for stages that name them, ``joint`` the directory of a
    joint sampler."""

    def __init__(
        self,
        path: Union[str, os.PathLike[str]],
        *,
        device: str = "auto",
        dtype: Optional[str] = None,
        weights: Optional[str] = None,
        threads: Optional[int] = None,
        max_sequences: Optional[int] = None,
        max_rows: Optional[int] = None,
        max_positions: Optional[int] = None,
        kv_pages: Optional[int] = None,
        page_size: Optional[int] = None,
        tokenizer: Union[str, os.PathLike[str], None] = None,
        models: Sequence[Union[str, os.PathLike[str]]] = (),
        joint: Union[str, os.PathLike[str], None] = None,
    ) -> None:
        settings = {
            "device": device,
            "dtype": dtype,
            "weights": weights,
            "threads": threads,
            "max_sequences": max_sequences,
            "max_rows": max_rows,
            "max_positions": max_positions,
            "kv_pages": kv_pages,
            "page_size": page_size,
            "tokenizer": tokenizer,
            "models": models,
            "joint": joint,
        }
        self._native = _redraft.Engine(os.fspath(path), json.dumps(settings, default=_plain))

    def generate(self, prompt: Optional[Prompt] = None, **options: Unpack[RequestOptions]) -> Generation:
        """Writes one text. Ctrl-C ends the wait and cancels the request."""
        return generation_of(self._native.submit(_to_json(prompt, options)).wait())

    def generate_batch(self, prompts: Iterable[Prompt], **options: Unpack[RequestOptions]) -> list[Generation]:
        """Writes one text for each prompt, all in one batch. The first error is raised, and cancels
        the rest."""
        requests = [self._native.post(_to_json(prompt, options)) for prompt in prompts]
        return [generation_of(request.wait()) for request in requests]

    def stream(self, prompt: Optional[Prompt] = None, **options: Unpack[RequestOptions]) -> Stream:
        """One text as it is written."""
        return Stream(self._native.submit(_to_json(prompt, options)))

    async def agenerate(self, prompt: Optional[Prompt] = None, **options: Unpack[RequestOptions]) -> Generation:
        """:meth:`generate` for asyncio. Cancelling the task cancels the request."""
        request = self._native.post(_to_json(prompt, options))
        try:
            return generation_of(await _ready(request.poll_done))
        except BaseException:
            request.cancel()
            raise

    def astream(self, prompt: Optional[Prompt] = None, **options: Unpack[RequestOptions]) -> AsyncStream:
        """:meth:`stream` for ``async for``. A request that the engine refuses is raised by the first
        event."""
        return AsyncStream(self._native.post(_to_json(prompt, options)))

    def score(self, text: Prompt) -> list[float]:
        """Negative log-likelihood of each token in nats, under the model's own factorisation."""
        if isinstance(text, str):
            return self._native.score(text)
        return self._native.score_tokens([int(token) for token in text])

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, without a first token of the model's own."""
        return self._native.tokenize(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of ids; special tokens have none."""
        return self._native.detokenize([int(token) for token in tokens])

    @property
    def model(self) -> dict[str, Any]:
        """What the model is: architecture, vocab_size, max_length, block_len, ..."""
        model: dict[str, Any] = json.loads(self._native.model())
        return model

    @property
    def stats(self) -> dict[str, Any]:
        """What is in flight, and the work done, after the last forward. Never waits."""
        stats: dict[str, Any] = json.loads(self._native.stats())
        return stats

    @property
    def device_name(self) -> str:
        """Device, instruction set or GPU, and threads."""
        return self._native.device_name()

    def close(self) -> None:
        """Finishes the requests in flight, and frees the model. May be called twice."""
        self._native.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        self.close()
