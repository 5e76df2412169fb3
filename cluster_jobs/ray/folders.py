"""Where the folders of a Ray on this machine are.

Importing `ray` reads the environment once and for all, so what a Slurm task needs before it has
chosen its token is here.
"""

from __future__ import annotations

from pathlib import Path

TEMPORARY = Path("/tmp")  # short: a socket's path has 107 letters at most
INSIDE = "r"  # Ray's own folder, which everybody may write to, in one that is ours alone
