"""Every error that a user can cause or meet, each with the exit code of the command line.

A message names what is wrong, where, and the fix. Mistakes of our own are `assert`s, not these.
"""

from __future__ import annotations


class DeepclustError(Exception):
    """Base of all; `exit_code` is what the `deepclust` command returns."""

    exit_code = 1


class RecipeError(DeepclustError, ValueError):
    """Usage or recipe: unknown key, wrong type, bad choice."""

    exit_code = 2


class DataError(DeepclustError, ValueError):
    """Shards, images, labels, features: broken, missing, or too few for what the recipe asks."""

    exit_code = 3


class ResourceError(DeepclustError, RuntimeError):
    """A device, node, process or library that the job needs is not there."""

    exit_code = 4


class FollowedError(ResourceError):
    """Another rank failed, so this one stops; that one's error is the one to tell."""


class DiskError(DeepclustError, OSError):
    """The disk is full, or a folder cannot be written."""

    exit_code = 5


class NumericalError(DeepclustError, ValueError):
    """NaN or infinity, or a clustering that collapsed."""

    exit_code = 6


class RunHeldError(DeepclustError, RuntimeError):
    """Another controller holds the run."""

    exit_code = 7


class RunDiffersError(DeepclustError, ValueError):
    """The recipe or the data are not those that the run was started with."""

    exit_code = 8


class RequeueWanted(DeepclustError):
    """The run stopped at a step boundary because it was asked to; `resume` continues it."""

    exit_code = 75


def error_of(exit_code: int, text: str) -> DeepclustError:
    """The error that another process ended with, by its exit code."""
    kinds = {kind.exit_code: kind for kind in DeepclustError.__subclasses__()}
    return kinds.get(exit_code, DeepclustError)(text)


def exit_code_of(name: str) -> int:
    """The exit code of an error that an event names; 1 for one that is none of ours."""
    kinds = [*DeepclustError.__subclasses__()]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind.exit_code for kind in kinds if kind.__name__ == name), 1)
