"""What a run trains: the mix-scale diffusion model or its autoregressive judge.

An objective owns the model, the losses of one step and the held-out table; the loop in train.py
knows neither noise nor layout. Each has: `model`, `describe()`, `forms` (every answer `choose` can
give), `losses(choose, sampler, sequences, length)` yielding (name, share, loss) one micro-batch after
the other, `columns`, `heldout(batch, generator)` -> one loss per column, `layout` (a name in
export.py). `choose(shares)` picks a key of a dictionary with the probability that stands there; all
else is drawn from the sampler's generator, on its device. Losses stay on the device of the model.
"""
import torch

from causal import Decoder, next_token_losses
from model import Backbone, mask_blocks, mask_full, mask_range, masked_loss


def parse_mix(text):
    """`full:0.55,4:0.37,16:0.08` (braces allowed) -> {None: 0.55, 4: 0.37, 16: 0.08}, shares summing to 1."""
    mix = {}
    for item in text.strip("{} ").split(","):
        block, weight = item.split(":")
        mix[None if block.strip() == "full" else int(block)] = float(weight)
    total = sum(mix.values())
    return {b: w / total for b, w in mix.items()}


def parse_ranges(text):
    """`0.05-0.6:0.75,0.6-1:0.25` -> ((0.05, 0.6, 0.75), (0.6, 1.0, 0.25))."""
    ranges = []
    for item in text.split(","):
        span, _, prob = item.partition(":")
        low, high = span.split("-")
        ranges.append((float(low), float(high), float(prob or 1)))
    return tuple(ranges)


class Diffusion:
    """Masked diffusion at several block sizes: full attention and small blocks, in the token shares of `--mix`."""

    layout = "bd3lm"
    # name, block (None = full), mask count per block or mask rate
    table = [
        ("f.05", None, 0.05), ("f.15", None, 0.15), ("f.35", None, 0.35), ("f.60", None, 0.60), ("f.90", None, 0.90),
        ("b4m1", 4, 1), ("b4m2", 4, 2), ("b4m3", 4, 3), ("b4m4", 4, 4), ("b16m8", 16, 8),
    ]
    columns = [name for name, _, _ in table]

    def __init__(self, args, vocab):
        self.model = Backbone(vocab, args.dim, args.blocks, args.dim // 64, args.length)
        self.bf16, self.mix, self.full_ranges = args.bf16, parse_mix(args.mix), parse_ranges(args.full_range)
        self.small_low, self.small_high, _ = parse_ranges(args.small_range)[0]
        self.small = {b: w for b, w in self.mix.items() if b is not None}
        self.forms = list(self.small) or [None]
        for block in self.small:
            mask_range(self.small_low, self.small_high, block)
            for length in (args.length, *([args.short_length] if args.short_share else [])):
                if length % block:
                    raise SystemExit(f"--mix: block size {block}: expected a divisor of the length {length}")

    def describe(self):
        return f"mix {self.mix}"

    def losses(self, choose, sampler, sequences, length):
        full_count = round(sequences * self.mix.get(None, 0.0)) if self.small else sequences
        small_count = sequences - full_count
        if full_count:
            batch = sampler.batch(full_count, length)
            noise = mask_full(sampler.generator, full_count, length, self.full_ranges)
            yield "full", full_count / sequences, masked_loss(self.model, batch, *noise, None, self.bf16)
        if small_count:
            block = choose(self.small)
            batch = sampler.batch(small_count, length)
            noise = mask_blocks(sampler.generator, small_count, length, block, self.small_low, self.small_high)
            yield f"b{block}", small_count / sequences, masked_loss(self.model, batch, *noise, block, self.bf16)

    def heldout(self, batch, generator):
        values = []
        for _, block, level in self.table:
            if block is None:
                noise = mask_full(generator, *batch.shape, None, rate=level)
            else:
                noise = mask_blocks(generator, *batch.shape, block, count=level)
            values.append(masked_loss(self.model, batch, *noise, block, self.bf16))
        return torch.stack(values)


class Causal:
    """Next-token prediction; `first` and `second` are the halves of the sequence."""

    layout = "qwen2"
    columns = ["nll", "first", "second"]
    forms = [None]  # nothing to choose

    def __init__(self, args, vocab):
        self.model = Decoder(vocab, args.dim, args.blocks, args.dim // 64, args.length, args.dropout)
        self.bf16 = args.bf16
        # A CPU keeps 8 sequences in its cache; a GPU wants long products: 64 sequences of 512 have
        # 0.5 GB of f32 logits over 4,096 ids.
        self.micro = 8 if args.device == "cpu" else 64

    def describe(self):
        return "causal"

    def losses(self, choose, sampler, sequences, length):
        for part in sampler.batch(sequences, length).split(self.micro):
            loss = next_token_losses(self.model, self.to_device(part), self.bf16).mean()
            yield "nll", len(part) / sequences, loss

    def heldout(self, batch, generator):
        losses = next_token_losses(self.model, self.to_device(batch), self.bf16)
        half = losses.shape[1] // 2
        return torch.stack([part.mean() for part in (losses, losses[:, :half], losses[:, half:])])

    def to_device(self, batch):
        return batch.to(self.model.embed_tokens.weight.device)


OBJECTIVES = {"diffusion": Diffusion, "causal": Causal}
