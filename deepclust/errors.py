"""The errors that a user can cause or see, each with an exit code of the command line.

A message names what is wrong, where, and the fix. Errors in our own code are `assert`s.
"""

from __future__ import annotations


class DeepclustError(Exception):
    """The base class.

    `exit_code` is what the `deepclust` command returns.
    """

    exit_code = 1


class RecipeError(DeepclustError, ValueError):
    """Usage or recipe: unknown key, wrong type, bad choice."""

    exit_code = 2


class DataError(DeepclustError, ValueError):
    """Shards, images, labels or features are broken, missing, or too few for the recipe."""

    exit_code = 3


class ResourceError(DeepclustError, RuntimeError):
    """A device, node, process or library that the job needs is missing."""

    exit_code = 4


class FollowedError(ResourceError):
    """This rank stops because another rank failed.

    The other rank's error is the cause.
    """


class DiskError(DeepclustError, OSError):
    """The disk is full, or a folder is not writable."""

    exit_code = 5


class NumericalError(DeepclustError, ValueError):
    """A value is NaN or infinite, or a clustering collapsed."""

    exit_code = 6


class RunHeldError(DeepclustError, RuntimeError):
    """Another controller holds the run."""

    exit_code = 7


class RunDiffersError(DeepclustError, ValueError):
    """The recipe or the data differ from those that the run was started with."""

    exit_code = 8


class RequeueWanted(DeepclustError):
    """The run stopped at a step boundary because it was asked to.

    `resume` continues it.
    """

    exit_code = 75


def error_of(exit_code: int, text: str) -> DeepclustError:
    """Return the error that another process ended with, by its exit code."""
    kinds = {kind.exit_code: kind for kind in DeepclustError.__subclasses__()}
    return kinds.get(exit_code, DeepclustError)(text)


def exit_code_of(name: str) -> int:
    """Return the exit code of an error that an event names, or 1 for other errors."""
    kinds = [*DeepclustError.__subclasses__()]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind.exit_code for kind in kinds if kind.__name__ == name), 1)


_NO_MEMORY = (
    "allocate memory", "failed to map segment", "Cannot allocate", "bad_alloc", "not enough memory",
    "start new thread", "unable to mmap", "temporarily unavailable",
)  # fmt: skip


def lack_of_memory(error: BaseException) -> ResourceError | None:
    """Return in words that there was no memory, which every library says in its own way.

    Return None for an error of something else. An import fails like this under `ulimit -v`, too.
    """
    text = (str(error).splitlines() or [""])[0]
    kinds = (ImportError, OSError, RuntimeError, SystemError)
    says_so = isinstance(error, kinds) and any(sign in str(error) for sign in _NO_MEMORY)
    if isinstance(error, DeepclustError) or not (says_so or isinstance(error, MemoryError)):
        return None
    return ResourceError(
        f"there is too little memory, or room for processes ({type(error).__name__}: {text}). "
        "Raise the limit (ulimit -v, ulimit -u, the memory of the job or container), or set "
        "train.batch, data.extract_batch or data.workers lower. Finished work is kept."
    )
