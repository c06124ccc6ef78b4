"""Muon: momentum and an orthogonalised update, for the matrices inside the blocks."""
import torch


def orthogonalize(g, steps=5):
    """Newton-Schulz: pushes the singular values of each matrix of the stack [N, r, c] (r <= c) towards 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.float()


class Muon:
    """`params`: matrices [out, in]; one of 3 x in rows is a fused QKV, taken as three squares."""

    def __init__(self, params, momentum=0.95, weight_decay=0.01):
        self.momentum, self.weight_decay = momentum, weight_decay
        self.params = params
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr):
        torch._foreach_mul_(self.buffers, self.momentum)
        torch._foreach_add_(self.buffers, [p.grad for p in self.params])
        by_shape = {}  # pieces of one shape are orthogonalised together, to save calls
        for p, buffer in zip(self.params, self.buffers):
            g = p.grad + self.momentum * buffer  # Nesterov
            p.mul_(1 - lr * self.weight_decay)
            rows, cols = p.shape
            pieces = zip(g.chunk(3), p.chunk(3)) if rows == 3 * cols else [(g, p)]
            for piece, target in pieces:
                rows, cols = piece.shape
                # A tall one lies on its side, and its step is larger by sqrt(rows / cols).
                tall = rows > cols
                gradient, goal = (piece.T, target.T) if tall else (piece, target)
                by_shape.setdefault(gradient.shape, []).append((gradient, goal, (rows / cols) ** 0.5 if tall else 1.0))
        for group in by_shape.values():
            updates = orthogonalize(torch.stack([gradient for gradient, _, _ in group]))
            for (_, goal, factor), update in zip(group, updates):
                goal.add_(update, alpha=-lr * factor)
