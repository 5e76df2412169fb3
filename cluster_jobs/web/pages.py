"""The pages for a browser: HTML that the server writes, with a small script for what is live."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(include_in_schema=False)
