"""A pretended GPU: the numbers stay on the CPU, and everything else is as with one.

A storage that was made on "cuda" is marked, and its tensors say cuda:0. Every operation passes a
dispatch mode, which raises where devices are mixed as CUDA does, and notes each wait of the host
for the device by file and line: `item`, `nonzero`, a boolean mask, a blocking copy, a list. It
counts operations by phase of a run, and holds collectives to NCCL's rules (gloo carries them out).
It shows no speed, no rounding of CUDA, and runs neither cuDNN nor NCCL. It uses private parts of
torch, so it is for tests only. `python -m tests.pretended_run METHOD` shows a run's waits.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")
PACKAGE = str(Path(__file__).parents[1] / "deepclust")
MEMORY = 1 << 36  # bytes of the card
COPIES = {"_to_copy", "copy_"}
SHAPED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
                    "_local_scalar_dense", "bincount", "equal", "is_nonzero"}  # fmt: skip
OF_TORCH = ("nn/parallel/distributed.py", "torch/distributed/utils.py", "autograd/graph.py")
NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach"}
NCCL = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8,
        torch.int32, torch.int64}  # fmt: skip

_of = {name: getattr(torch.Tensor, name) for name in ("device", "to", "tolist", "numpy")}


class Mixed(RuntimeError):
    """Tensors of the CPU and of the card in one operation."""


class Marks:
    """Storages with a mark, as long as they live."""

    def __init__(self) -> None:
        self.of: dict[int, StorageWeakRef] = {}
        self.bytes: dict[int, int] = {}
        self.limit = 4096

    def add(self, tensor: Tensor) -> None:
        """Mark a tensor's storage, and forget those that are gone now and then."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self.of[reference.cdata] = reference  # no other storage has this address while it lives
        self.bytes[reference.cdata] = tensor.untyped_storage().nbytes()
        if len(self.of) > self.limit:
            self.of = {key: one for key, one in self.of.items() if not one.expired()}
            self.bytes = {key: self.bytes[key] for key in self.of}
            self.limit = max(4096, 2 * len(self.of))

    def count_bytes(self) -> int:
        """The bytes of those that live."""
        return sum(self.bytes[key] for key, one in self.of.items() if not one.expired())

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.of


CARDS, PINNED = Marks(), Marks()


@dataclass
class Log:
    """What the pretended device has seen."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)  # (phase, what and where)
    kernels: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    most: dict[str, int] = field(default_factory=dict)  # waits of a call, the first two left out
    types: set[tuple[str, torch.dtype]] = field(default_factory=set)  # operation and its dtype
    phase: str = "other"
    mode: Any = None
    peak: int | None = None  # bytes of the card's tensors, once somebody has asked for it

    def look_at_memory(self, again: bool = False) -> int:
        """Note the bytes of the card's tensors, and return the most since it was asked `again`."""
        self.peak = max(0 if again else self.peak or 0, CARDS.count_bytes())
        return self.peak

    def wait(self, what: str) -> None:
        """Note a wait at the line of the package that asked for it."""
        self.waits[self.phase, f"{what} {_where()}"] += 1

    def count(self, phase: str) -> int:
        """The waits of a phase."""
        return sum(count for (name, _), count in self.waits.items() if name == phase)

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Count what is in the block as one call of a phase."""
        outer, self.phase, before = self.phase, phase, self.count(phase)
        try:
            yield
        finally:
            self.phase = outer
            self.calls[phase] += 1
            if self.calls[phase] > 2:  # constants are cached, buckets are built
                self.most[phase] = max(self.most.get(phase, 0), self.count(phase) - before)


def on_card(tensor: Tensor) -> bool:
    """Whether a tensor pretends to be on the card."""
    return tensor in CARDS


class Pretended(TorchDispatchMode):
    """Every operation of this thread."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log
        self.to_host = False  # a copy to the CPU that was asked for

    @contextlib.contextmanager
    def host(self) -> Iterator[None]:
        """Let a copy in the block be one to the CPU."""
        self.to_host = True
        try:
            yield
        finally:
            self.to_host = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name, given = func._schema.name, kwargs.get("device")
        short = name.split("::")[-1]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        cards = [t for t in tensors if on_card(t)]
        if name.startswith("c10d::"):
            _check_collective(short, tensors)
            return func(*args, **kwargs)
        if short in COPIES:
            return self._copy(func, short, args, kwargs)
        self._check(short, args, tensors, cards)
        to_card = bool(cards) if given is None else torch.device(given).type == "cuda"
        to_card = to_card or _asked_by_torch()
        if given is not None:
            kwargs["device"] = HOST
        pinned = kwargs.pop("pin_memory", None)
        if func is torch.ops.aten.mm.dtype:  # the CPU has none
            result = torch.mm(args[0].to(args[2]), args[1].to(args[2]))
        else:
            result = func(*args, **kwargs)
        if to_card:
            self._mark(func, short, result, tensors)
        elif pinned:
            PINNED.add(result)
        return result

    def _mark(self, func: Any, short: str, result: Any, tensors: list[Tensor]) -> None:
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in outputs:
            if tensor not in CARDS:
                CARDS.add(tensor)
        if self.log.peak is not None:
            self.log.look_at_memory()
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and short not in NO_KERNEL:
            self.log.kernels[self.log.phase] += 1
            self.log.types.update((short, tensor.dtype) for tensor in tensors[:1])

    def _check(
        self, short: str, args: tuple[Any, ...], tensors: list[Tensor], cards: list[Tensor]
    ) -> None:
        if not cards:
            return
        if short in SHAPED_BY_VALUES or (short == "repeat_interleave" and len(args) == 1):
            self.log.wait(short)
        if short in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            return self._check_index(short, args)
        others = [t for t in tensors if not on_card(t) and t.ndim > 0]
        # the count of steps of an optimizer lies on the CPU, and is given as a list of its own
        if others and not short.startswith("_foreach"):
            raise Mixed(f"{short}: tensors on cuda:0 and on the cpu, at {_where()}")

    def _check_index(self, short: str, args: tuple[Any, ...]) -> None:
        rows, indices = args[0], [t for t in args[1] if t is not None]
        if not on_card(rows):
            raise Mixed(f"{short}: rows on the cpu, indices on cuda:0, at {_where()}")
        filled = short.startswith("index_put") and args[2].numel() == 1  # masked_fill does it
        for index in indices:
            if index.dtype in (torch.bool, torch.uint8) and not filled:
                self.log.wait(f"{short} by a mask")
            if not on_card(index):
                self.log.wait(f"{short} by an index of the CPU")
        if short.startswith("index_put") and not on_card(args[2]) and args[2].ndim > 0:
            raise Mixed(f"{short}: values on the cpu, at {_where()}")

    def _copy(self, func: Any, short: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source = args[0] if short == "_to_copy" else args[1]
        given = kwargs.get("device")
        if short == "copy_":
            to_card, late = on_card(args[0]), len(args) > 2 and args[2]
        else:
            to_card = given is not None and torch.device(given).type == "cuda"
            # torch's own code asks for the device where the numbers are, and means that of its rows
            to_card |= on_card(source) and not self.to_host
            late = kwargs.get("non_blocking", False)
            kwargs |= {} if given is None else {"device": HOST}
        pinned_end = source if to_card else args[0]
        kwargs.pop("pin_memory", None)
        result = func(*args, **kwargs)
        if to_card != on_card(source):
            pinned = pinned_end in PINNED if short == "copy_" or to_card else late
            if not (late and pinned):
                self.log.wait("copy to the card" if to_card else "copy from the card")
        if to_card:
            self._mark(func, short, result, [source])
        return result


def _check_collective(short: str, tensors: list[Tensor]) -> None:
    """NCCL takes contiguous tensors of the card, of its dtypes."""
    for tensor in tensors:
        if short not in ("barrier", "monitored_barrier_"):
            assert on_card(tensor), f"{short}: a tensor of the CPU, at {_where()}"
            assert tensor.dtype in NCCL, f"{short}: {tensor.dtype}, at {_where()}"
            assert tensor.is_contiguous() or short == "allreduce_", f"{short}, at {_where()}"


def _asked_by_torch() -> bool:
    """Whether torch's own C++ makes a tensor for a backward pass, or the buckets of DDP."""
    frame: Any = sys._getframe(2)
    for _ in range(3):
        if frame is not None and frame.f_code.co_filename.endswith(OF_TORCH):
            return True
        frame = frame and frame.f_back
    return False


def _where() -> str:
    """The innermost line of the package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            return f"{file[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _to(log: Log, self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, where a device of the same name gives the same tensor."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    elif isinstance(other := kwargs.pop("other", None), Tensor):
        args = (other.device, other.dtype, *args)
    copied = kwargs.get("copy", False)
    words = {key: value for key, value in kwargs.items() if key != "copy"}
    device, dtype, late, layout = torch._C._nn._parse_to(*args, **words)
    here = on_card(self)
    if device is not None and (device.type == "cuda") != here:
        return _moved(log, self, device.type == "cuda", dtype, late, layout)
    layout = {} if layout is None else {"memory_format": layout}
    return _of["to"](self, dtype or self.dtype, late, copied, **layout)


def _moved(log: Log, self: Tensor, to_card: bool, dtype: Any, late: bool, layout: Any) -> Tensor:
    """The same tensor on the other side; a number needs no page-locked memory."""
    given = {} if layout is None else {"memory_format": layout}
    if to_card:
        moved: Tensor = torch.ops.aten._to_copy(
            self, dtype=dtype, device=CARD, non_blocking=late, **given
        )
        return moved
    with log.mode.host():
        return torch.ops.aten._to_copy(self, dtype=dtype, device=HOST, non_blocking=late, **given)


def _made(inner: Callable[..., Tensor], *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """`torch.tensor` and the like: the numbers are Python's, or the CPU's."""
    if device is not None and torch.device(device).type == "cuda":
        return inner(*args, **kwargs).to(CARD)
    return inner(*args, **({} if device is None else {"device": device}), **kwargs)


def _listed(log: Log, self: Tensor) -> Any:
    if on_card(self):
        log.wait("tolist")
    return _of["tolist"](self)


def _as_numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    if on_card(self):
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy, at {_where()}")
    return _of["numpy"](self, *args, **kwargs)


def _locked(self: Tensor, *_: Any) -> Tensor:
    PINNED.add(copied := self.clone())
    return copied


def _one_hot(ids: Tensor, classes: int) -> Tensor:
    """`one_hot`, which looks at no value on a card."""
    return (ids[..., None] == torch.arange(classes, device=ids.device)).long()


class _Autocast(torch.autocast):
    """`torch.autocast` of the device where the numbers are."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


def _tensor_patches(log: Log) -> dict[str, Any]:
    where = property(lambda self: CARD if on_card(self) else _of["device"].__get__(self))
    return {
        "device": where,
        "is_cuda": property(on_card),
        "is_cpu": property(lambda self: not on_card(self)),
        "to": lambda self, *args, **kwargs: _to(log, self, *args, **kwargs),
        "cuda": lambda self, *_, non_blocking=False: _to(
            log, self, CARD, non_blocking=non_blocking
        ),
        "cpu": lambda self, *_: _to(log, self, HOST),
        "record_stream": lambda self, stream: None,
        "tolist": lambda self: _listed(log, self),
        "numpy": _as_numpy,
        "pin_memory": _locked,
        "new_tensor": lambda self, *args, **kwargs: _made(
            torch.tensor, *args, **{"device": self.device, **kwargs}
        ),
        "is_pinned": lambda self, *_: self in PINNED,
    }


def _cuda_patches(log: Log) -> dict[str, Callable[..., Any]]:
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "pretended",
        "get_arch_list": lambda: ["sm_90"],
        "Stream": lambda *_: SimpleNamespace(),
        "Event": lambda *_, **__: SimpleNamespace(
            record=lambda *_: None, synchronize=lambda: log.calls.update(["earlier work"])
        ),
        "stream": lambda side: contextlib.nullcontext(),
        "current_stream": lambda device=None: SimpleNamespace(
            wait_event=lambda event: None, synchronize=lambda: log.wait("synchronize a stream")
        ),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_allocated": lambda device=None: CARDS.count_bytes(),
        "memory_reserved": lambda device=None: CARDS.count_bytes(),
        "max_memory_allocated": lambda device=None: log.look_at_memory(),
        "reset_peak_memory_stats": lambda device=None: log.look_at_memory(again=True),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed_all": lambda seed: None,
    }


@contextlib.contextmanager
def pretended() -> Iterator[Log]:
    """Let "cuda" be the pretended device in the block, in this thread."""
    log, group = Log(), dist.init_process_group
    with contextlib.ExitStack() as stack:
        for name, new in _tensor_patches(log).items():
            stack.enter_context(patch.object(torch.Tensor, name, new))
        for name, new in _cuda_patches(log).items():
            stack.enter_context(patch.object(torch.cuda, name, new, create=True))
        stack.enter_context(patch.object(torch, "autocast", _Autocast))
        captured = "_accelerator_graph_capture_health_check"
        stack.enter_context(patch.object(torch.optim.Optimizer, captured, lambda self: None))
        for name, value in (("is_available", True), ("current_device_index", 0)):
            function = functools.partial(_constant, value)
            stack.enter_context(patch.object(torch.accelerator, name, function))
        # asked for by the thread of a DataLoader that locks pages
        stack.enter_context(patch.object(torch.accelerator, "set_device_index", lambda index: None))
        stack.enter_context(patch.object(torch.nn.functional, "one_hot", _one_hot))
        for name in ("tensor", "as_tensor"):
            made = functools.partial(_made, getattr(torch, name))
            stack.enter_context(patch.object(torch, name, made))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            kept = getattr(torch, name)
            stack.enter_context(patch.object(torch, name, functools.partial(_of_host, kept)))
        by_gloo = functools.partial(_by_gloo, group)
        stack.enter_context(patch.object(dist, "init_process_group", by_gloo))
        log.mode = stack.enter_context(Pretended(log))
        yield log


def _constant(value: Any) -> Any:
    return value


def _of_host(function: Callable[[str], Any], device: str = "cuda") -> Any:
    return function("cpu")


def _by_gloo(join: Callable[..., None], backend: str, **options: Any) -> None:
    options.pop("device_id", None)
    join(backend="gloo", **options)
