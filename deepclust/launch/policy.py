"""What is forgiven, and how long others are waited for: the same for every way to run a gang."""

from __future__ import annotations

from deepclust.errors import ResourceError

AFTERMATH_S = 2.0  # for the others to say why they end, when one has
FRUITLESS = 3  # starts in a row that bring nothing, and then no more
UNEXPECTED = 1  # exit code of an error that is none of ours
# what another try may mend: a process group that broke, a reader that died; not bad data or NaN
MAY_PASS = (UNEXPECTED, ResourceError.exit_code)
