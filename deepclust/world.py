"""The World of a rank: its number, its device and its collectives; and all random seeds.

Every collective is a no-op at size 1, so no other file asks whether it is distributed. All
randomness is `derive(seed, purpose, ...)`: the same for every rank, worker and restart.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

from deepclust.errors import FollowedError

T = TypeVar("T")


def derive(seed: int, *purpose: str | int) -> int:
    """Return a number in [0, 2^63) that depends on the seed and every part of the purpose alone."""
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a counter-based NumPy generator (Philox) for one purpose."""
    return np.random.Generator(np.random.Philox(derive(seed, *purpose)))


@dataclass(frozen=True)
class World:
    """A rank of a worker group.

    Names, shapes and meanings are those of torch.distributed.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _totals: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes checkpoints and reports progress for all."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Add a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Return the elementwise maximum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors, which have one shape, as [size, ...] on every rank.

        Every rank holds the whole result, so it is meant for small tensors.
        """
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def all_gather_rows(self, tensor: Float[Tensor, "b d"]) -> Float[Tensor, "g d"]:
        """Return all ranks' rows (b of each), one rank after the other, differentiable.

        The backward adds the gradients over the ranks and returns this rank's rows of the sum.
        """
        if self.size == 1:
            return tensor
        gathered: Tensor = _Rows.apply(tensor, self)
        return gathered

    def reduce_scatter_rows(self, tensor: Float[Tensor, "g d"]) -> Float[Tensor, "b d"]:
        """Return this rank's b = g / size rows of the sum over the ranks."""
        if self.size == 1:
            return tensor
        share = len(tensor) // self.size
        if dist.get_backend() == "nccl":
            own = tensor.new_empty(share, tensor.shape[1])
            dist.reduce_scatter_tensor(own, tensor.contiguous())
            return own
        # gloo cannot scatter a sum in every version
        return self.all_reduce(tensor.clone())[self.rank * share : (self.rank + 1) * share]

    def raise_all(self, error: Exception | None, where: str) -> None:
        """Raise on every rank when one has an error, so that no rank waits for one that ended."""
        failed = self.max_int(0 if error is None else self.rank + 1) - 1
        if error is not None:
            raise error
        if failed >= 0:
            raise FollowedError(
                f"{where}: rank {failed} failed, so this rank stops too; the cause and the fix "
                f"are in its log, logs/rank-{failed:05d}.log"
            )

    def max_float(self, value: float) -> float:
        """Return the largest of the ranks' numbers."""
        return float(
            self.all_reduce_max(torch.tensor(value, dtype=torch.float64, device=self.device))
        )

    def max_int(self, value: int) -> int:
        """Return the largest of the ranks' numbers.

        A flag of one rank is one of all.
        """
        return int(self.max_float(value))

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value on every rank: of JSON, where tuples become lists.

        Nothing is unpickled, since the network of a cluster belongs to others too.
        """
        if self.size == 1:
            return value
        data = json.dumps(value).encode() if self.is_first else b""
        length = torch.tensor(len(data), dtype=torch.int64, device=self.device)
        dist.broadcast(length, src=0)
        text = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        if self.is_first:
            text.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(text, src=0)
        same: T = json.loads(text.cpu().numpy().tobytes())
        return same

    def broadcast_array(
        self, array: Float32[np.ndarray, "k d"] | None
    ) -> Float32[np.ndarray, "k d"] | None:
        """Return rank 0's float32 array on every rank, or None where it has none."""
        if self.size == 1:
            return array
        shape = self.broadcast_object(None if array is None else list(array.shape))
        if shape is None:
            return None
        if array is None or not self.is_first:
            array = np.empty(shape, np.float32)
        rows = torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(self.device)
        self.broadcast([rows])
        return np.asarray(rows.cpu().numpy())

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Overwrite every rank's tensors with rank 0's, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Wait until every rank has called this; the cluster worker does not take part.

        It is counted in the store and has no time limit, as a collective has. So call it before a
        collective that one rank may reach an hour before another. Waiting is not a sign of life.
        """
        if self.size == 1:
            return
        self._totals["barriers"] = self._totals.get("barriers", 0) + 1
        here, left = (f"{kind}/{self._totals['barriers']}" for kind in ("barrier", "left"))
        self.total(here, 1)
        self._await(here, self.size)
        self.total(left, 1)
        if self.is_first:  # it keeps the store, and must not end while others still look there
            self._await(left, self.size)

    def _await(self, name: str, count: int) -> None:
        """Look at a number of all ranks until it is `count`, in the end ten times a second."""
        pause = 0.001
        while self.total(name, 0) < count:
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)

    def ticket(self, queue: str) -> int:
        """Return the next number (0, 1, 2, ...) of a queue of all ranks, each number once."""
        return self.total(f"ticket/{queue}", 1) - 1

    def total(self, name: str, more: int) -> int:
        """Add to a number of all ranks, and return it as it is now, without waiting for others."""
        if self.size > 1:
            return int(dist.distributed_c10d._get_default_store().add(name, more))
        self._totals[name] = self._totals.get(name, 0) + more
        return self._totals[name]


ALONE = World()  # one rank on the CPU


class _Rows(torch.autograd.Function):
    """The differentiable gather of `World.all_gather_rows`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        ctx.world = world
        gathered = tensor.new_empty(world.size * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, tensor.contiguous())
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.world.reduce_scatter_rows(gradient), None


@dataclass(frozen=True)
class Owned:
    """This rank's rows of a parameter that is sharded over the ranks: [start, stop) of `total`.

    The rows lie along dimension `dim`. No other rank has them: DDP must ignore the parameter, and
    every rank saves its slice.
    """

    dim: int
    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, total: int, world: World, *, dim: int) -> Owned:
        """Return this rank's range: lengths differ by one at most, and may be zero."""
        least, more = divmod(total, world.size)
        start = world.rank * least + min(world.rank, more)
        return cls(dim, start, start + least + (world.rank < more), total)

    @property
    def count(self) -> int:
        """The number of rows of this rank."""
        return self.stop - self.start


def join(
    rank: int, size: int, rendezvous: str | Path, device: torch.device, timeout_s: float
) -> World:
    """Join the process group and return this rank's World (gloo on a CPU, nccl on a GPU).

    `rendezvous` is a file that all ranks see, on one machine, or tcp://HOST:PORT, on which rank 0
    listens. It must run on that host. env:// is the store of `torchrun`.
    """
    if size > 1:
        wait, is_gpu = timedelta(seconds=timeout_s), device.type == "cuda"
        dist.init_process_group(
            backend="nccl" if is_gpu else "gloo",
            store=_store(str(rendezvous), rank, size, wait),
            rank=rank,
            world_size=size,
            timeout=wait,
            device_id=device if is_gpu else None,  # NCCL connects now, and guesses no device
        )
    return World(rank, size, device)


def _store(rendezvous: str, rank: int, size: int, wait: timedelta) -> Store:
    """Return the key-value store through which ranks find each other and draw tickets."""
    if rendezvous == "env://":
        return store_of_environment(wait)
    if not rendezvous.startswith("tcp://"):
        return FileStore(rendezvous, size)
    host, _, port = rendezvous.removeprefix("tcp://").rpartition(":")
    if rank > 0:
        return TCPStore(host, int(port), size, is_master=False, timeout=wait)
    listening = socket.create_server((host, int(port)))
    return TCPStore(
        host, int(port), size, is_master=True, timeout=wait, wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )  # fmt: skip


def store_of_environment(wait: timedelta) -> Store:
    """Return the store of `torchrun`, by the variables that it sets: its agent's, or rank 0's."""
    from torch.distributed.rendezvous import rendezvous  # untyped

    store: Store = next(rendezvous("env://", timeout=wait))[0]
    return store


def close_process_group() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
