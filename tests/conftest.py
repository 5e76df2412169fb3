"""What all tests share: one thread, so that they are repeatable and kind to each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
