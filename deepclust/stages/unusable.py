"""Samples without a usable row in an extraction: counted over all ranks, judged when it is certain.

More than `data.max_bad` of them end the run. Images that cannot be read are an error of the data.
Features that are not finite are an error of the network: repairing shards would not help.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from deepclust.data.shards.index import Index
from deepclust.data.shards.left_out import EXAMPLES
from deepclust.errors import DataError, NumericalError

if TYPE_CHECKING:
    from deepclust.stages.extract import ExtractContext

NOT_FINITE = "its feature is not finite, or too large for fp16"


def not_finite(sample: int) -> str:
    """Return the reason of a sample whose image was read and whose feature is of no use."""
    return f"sample {sample}: {NOT_FINITE}"


def count_bad(context: ExtractContext, bad: dict[int, str]) -> None:
    """Add to what all ranks have seen; no later image can make it better once it is too much."""
    known = context.index.excluded
    new = {sample: reason for sample, reason in bad.items() if sample not in known}
    if new:
        seen = context.world.total(f"bad-{context.round}", len(new))
        odd = sum(reason.endswith(NOT_FINITE) for reason in new.values())
        odd = context.world.total(f"not-finite-{context.round}", odd)
        check_bad(context, len(known) + seen, new, odd)


def check_bad(
    context: ExtractContext, count: int, excluded: dict[int, str], odd: int | None = None
) -> None:
    """Raise when `count`, more than allowed, are excluded, of which `excluded` are some.

    `odd` of them have a feature that is not finite, by default those of `excluded`. It is a
    `NumericalError` where the others alone would be few enough, else a `DataError`.
    """
    config, n = context.config, len(context.index)
    allowed = config.max_bad * n
    if count <= allowed:
        return
    broken = {s: reason for s, reason in excluded.items() if reason.endswith(NOT_FINITE)}
    odd = len(broken) if odd is None else odd
    if odd and count - odd <= allowed:
        raise NumericalError(
            f"{odd} of {n} features are not finite, or too large for fp16. With them more than "
            f"data.max_bad={config.max_bad} allows cannot be used. The first: "
            f"{next(iter(broken.values()), 'of another rank')}. The network has diverged: lower "
            "train.lr in a new run that starts from an earlier checkpoint (init.weights)."
        )
    listed = "\n".join(
        f"  {reason}"
        for reason in list({**_excluded_by_index(context.index), **excluded}.values())[:EXAMPLES]
    )
    raise DataError(
        f"{count} of {n} samples cannot be used, more than data.max_bad={config.max_bad} allows. "
        f"The first of them:\n{listed}\nRepair the shards, or raise data.max_bad."
    )


def _excluded_by_index(index: Index) -> dict[int, str]:
    """Return what the index knows to be without a usable image; where they are, of the first."""
    first = itertools.islice(index.excluded.items(), EXAMPLES)
    placed = {sample: f"{index.where(sample)}: {reason}" for sample, reason in first}
    return {**index.excluded, **placed}
