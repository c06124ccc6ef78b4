"""What two programs answer to the same input, compared before anything is timed."""

import json
import math
import struct
from dataclasses import dataclass, field


@dataclass
class Agreement:
    """One comparison: figures that were seen, and the limits that some of them must keep."""

    what: str
    figures: dict
    limits: dict = field(default_factory=dict)

    @property
    def agreed(self):
        # A figure that is not a number, or not there, is over every limit.
        return all(self.figures.get(name, math.nan) <= limit for name, limit in self.limits.items())

    def __str__(self):
        said = []
        for name, value in self.figures.items():
            limit = f" (at most {self.limits[name]:g})" if name in self.limits else ""
            said.append(f"{name} {value:.3g}{limit}" if isinstance(value, float) else f"{name} {value}{limit}")
        return f"{self.what}: {', '.join(said)}"

    def as_json(self):
        return {"what": self.what, "figures": self.figures, "limits": self.limits, "agreed": self.agreed}


def compare_tokens(what, ours, theirs, exact=True):
    """Ids of two texts; `exact` refuses any difference, otherwise the count is only told."""
    different = sum(a != b for a, b in zip(ours, theirs)) + abs(len(ours) - len(theirs))
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
    figures = {"tokens": max(len(ours), len(theirs)), "different": different}
    if first is not None:
        figures["first_difference_at"] = first
    return Agreement(what, figures, {"different": 0} if exact else {})


# Largest relative error of logits (rms of the difference over rms of the logits, each row less its
# mean) and mean KL in nats. Limits are some times what agreeing programs were seen to differ by
# over the random 162M shape of 12 layers; unrelated logits differ by 1.4.
LOGIT_LIMITS = {
    # Both compute in f32 and sum in other orders.
    "f32": {"relative_rms": 1e-4, "mean_kl": 1e-6},
    # Weights in f32; llama.cpp keeps K/V in f16.
    "f32-f16kv": {"relative_rms": 3e-2, "mean_kl": 5e-3},
    # Both round weights alike, the rest in their own ways: each is 0.027 from f32.
    "bf16": {"relative_rms": 1e-1, "mean_kl": 2e-2},
    # The same stored groups; each rounds rows to 8 bits in its own way: 0.08 from f32.
    "stored": {"relative_rms": 2e-1, "mean_kl": 1e-1},
    # Weights made q4 here beside the peer's unquantised ones: what the format loses. Random weights
    # lose far more than trained ones, 0.58 at 12 layers, so this tells a wrong forward and no more.
    "q4": {"relative_rms": 8e-1},
}


def compare_logits(what, ours, theirs, limits):
    """(T, V) arrays. A constant added to all logits of a row changes nothing that they mean."""
    import numpy as np

    if ours.shape != theirs.shape:
        return Agreement(f"{what}: shapes {ours.shape} and {theirs.shape}", {"relative_rms": math.nan}, limits)
    square = size = kl = equal = 0.0
    for a, b in zip(ours.astype(np.float64), theirs.astype(np.float64)):
        a, b = a - a.mean(), b - b.mean()
        square += ((a - b) ** 2).sum()
        size += (b**2).sum()
        log_a, log_b = a - np.logaddexp.reduce(a), b - np.logaddexp.reduce(b)
        kl += (np.exp(log_b) * (log_b - log_a)).sum()
        equal += a.argmax() == b.argmax()
    rows = len(ours)
    figures = {"relative_rms": float((square / size) ** 0.5), "mean_kl": float(kl / rows), "same_argmax": float(equal / rows)}
    return Agreement(what, figures, limits)


def read_logits(file):
    """The f32 tensor `logits` that `redraft forward` writes."""
    import numpy as np

    with open(file, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        entry = header["logits"]
        f.seek(entry["data_offsets"][0], 1)
        return np.fromfile(f, "<f4", math.prod(entry["shape"])).reshape(entry["shape"])


def some_ids(count, vocab_size):
    """Ids over the whole vocabulary, the same at every call."""
    return [(7919 + i * 104729) % vocab_size for i in range(count)]
