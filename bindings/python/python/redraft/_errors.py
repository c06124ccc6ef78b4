"""Exceptions by kind. Each has the text of the library: the file, key or argument, what was expected
and what was found."""

from __future__ import annotations


class RedraftError(Exception):
    """Base of all errors of the engine."""


class ConfigError(RedraftError):
    """config.json is absent, malformed or describes something unsupported."""


class WeightsError(RedraftError):
    """A weight file is absent or malformed."""


class TokenizerError(RedraftError):
    """The tokenizer is absent, malformed, or does not fit the model."""


class RequestError(RedraftError, ValueError):
    """The request or the settings cannot be served as asked."""


class OutOfPages(RequestError):
    """The request is larger than all K/V pages of the engine together."""


class DeviceError(RedraftError):
    """The device is absent or refused, or the engine's thread failed."""


class KernelError(RedraftError):
    """A kernel failed, or produced numbers that cannot be used."""


class FileError(RedraftError, OSError):
    """The operating system refused a read or a write."""


class EngineGone(RedraftError):
    """The engine was closed, or ended, before the request did."""
