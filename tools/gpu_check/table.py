"""The eighteen checks, in the order in which a first day needs them."""

from __future__ import annotations

import agreement
import cards
import decoder
import jobs
import machine
import peaks
import small_run
import speed
import two_ranks
import waits
from outcome import Check

QUICK = 9  # the first ones, which take minutes
CHECKS = (
    Check(1, "environment", "driver, kernels for the card, bf16, /dev/shm", machine.environment),
    Check(2, "tests", "all tests that need a GPU, none skipped", jobs.gpu_tests),
    Check(3, "waits", "a step, batch, pass waits no more than pretended", waits.waits),
    Check(4, "search", "labels are the exact ones of the CPU", agreement.search),
    Check(5, "k-means", "twice the same bits, wherever the rows are", agreement.clusters),
    Check(6, "whitening", "angle < 1e-4, covariance 1 within 1e-3", agreement.whitening),
    Check(7, "autocast", "float32 parts have float32 gradients", agreement.gradients),
    Check(8, "views", "turns and crops equal, colours within a level", agreement.views),
    Check(9, "small run", "as good as on the CPU, stopped, resumed", small_run.small_run),
    Check(10, "feeding", "readers keep up: waiting < 5 % of a step", speed.feeding),
    Check(11, "step speed", ">= 90 % of a bare loop of the same network", speed.step_speed),
    Check(12, "k-means speed", "20 iterations < 1 s, >= 25 % of the peak", jobs.kmeans_speed),
    Check(13, "refresh", "seconds by stage", jobs.refresh),
    Check(14, "memory", "peaks as estimated, and given back", peaks.memory),
    Check(15, "two ranks", "labels, sub-heads, norms, a killed rank", two_ranks.two_ranks),
    Check(16, "devices", "masks lead to their card, locally and by Ray", cards.devices),
    Check(17, "decoder", "JPEG decoded on the GPU, always the same", decoder.decoder),
    Check(18, "long waits", "a stage of an hour is not a hang", jobs.long_waits),
)
