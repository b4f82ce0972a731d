"""A moving average of a head's weights, which is often better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WARM_UP_STEPS = 10
"""Until it has seen some times as many steps, the average is of what it has seen."""


class MovingAverage:
    """Averages a head's weights over its steps, the latest counting most.

    average ← d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at step n, as in
    TensorFlow's ``ExponentialMovingAverage``: so that the first weights are soon forgotten. Other
    state of the head, such as the running means of a batch norm, is taken as it is.

    Args:
        head: whose weights.
        decay: d, below 1.

    Attributes:
        num_steps: n, steps seen.
        weights: the average, by parameter.
    """

    def __init__(self, head: nn.Module, decay: float) -> None:
        self._head, self._decay = head, decay
        self.num_steps = 0
        self.weights = {name: p.detach().clone() for name, p in head.named_parameters()}

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Take in the weights after each step that an optimizer takes from now on.

        Not after one that a gradient scaler leaves out, as its gradients were not finite.
        """
        optimizer.register_step_post_hook(lambda *step: self._update())

    @torch.no_grad()
    def _update(self) -> None:
        self.num_steps += 1
        decay = min(self._decay, (1 + self.num_steps) / (WARM_UP_STEPS + self.num_steps))
        for name, parameter in self._head.named_parameters():
            self.weights[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the head have the average for its weights meanwhile."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def restore(self, weights: dict[str, Tensor], num_steps: int) -> None:
        """Take a saved average back."""
        for name, weight in weights.items():
            self.weights[name].copy_(weight)
        self.num_steps = num_steps

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._head.named_parameters():
            # By value: whatever has hold of the parameter's memory, as a compiled head, sees it.
            kept = parameter.clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(kept)
