"""Schedules of the learning rate and of weight decay, as functions of the epochs done.

Epochs are counted in samples, as a fraction. So neither the batch size nor a restart moves them.
"""

from __future__ import annotations

import math

from deepclust.recipe.sections import TrainSection


def learning_rate(config: TrainSection, epochs: float) -> float:
    """Return the body's rate after that many epochs: warm-up times constant, step or cosine."""
    warmup = min(1.0, (epochs + 1e-3) / config.warmup) if config.warmup else 1.0
    return warmup * _shape(config, epochs) * config.lr


def weight_decay(config: TrainSection, epochs: float) -> float:
    """Return the weight decay: constant, or a cosine from `weight_decay` to `weight_decay_end`."""
    end = config.weight_decay_end
    if end is None:
        return config.weight_decay
    return end + (config.weight_decay - end) * _cosine(config, epochs)


def _shape(config: TrainSection, epochs: float) -> float:
    if config.schedule == "cosine":
        end = config.lr_end / config.lr
        return end + (1 - end) * _cosine(config, epochs)
    if config.schedule == "step":
        return config.step_factor ** sum(epochs >= at for at in config.steps_at)
    return 1.0


def _cosine(config: TrainSection, epochs: float) -> float:
    """Return the half cosine from 1 at the beginning of the run to 0 at its end."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, epochs / config.epochs)))
