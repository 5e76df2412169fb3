"""What the server answers with: JSON that is always valid, and the HTTP status of an error."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import JSONResponse

from deepclust.errors import (
    DataError,
    DeepclustError,
    DiskError,
    MissingError,
    RecipeError,
    ResourceError,
    RunDiffersError,
    RunHeldError,
)

HTTP = (  # the first that fits counts
    (RunHeldError, 409),
    (RunDiffersError, 409),
    (ResourceError, 409),
    (DiskError, 409),
    (MissingError, 404),
    (RecipeError, 400),
    (DataError, 422),
    (DeepclustError, 422),
)


class NotThereError(MissingError):
    """There is no such run, cluster or image under this address."""


def http_status(error: Exception) -> int:
    """Return the HTTP status of an error; what is odd in a run is 422 too."""
    return next((code for kind, code in HTTP if isinstance(error, kind)), 422)


def http_text(error: Exception) -> str:
    """Return what is said of an error: its own text where it is one of ours."""
    if isinstance(error, DeepclustError):
        return str(error)
    return f"it cannot be read: {type(error).__name__}: {str(error)[:300]}"


def clean(value: Any) -> Any:
    """Return a value without numbers that JSON lacks: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): clean(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [clean(one) for one in value]
    return value


class Answer(JSONResponse):
    """A JSON answer, of any value that a run may hold."""

    def render(self, content: Any) -> bytes:
        """Return the bytes; text that is not Unicode is escaped."""
        return json.dumps(clean(content), allow_nan=False, default=str).encode()
