"""Limits of uploads, for the server, the page and what reads them."""

from __future__ import annotations

MOST_BYTES = 20 * 2**20  # of an upload
MOST_OF_BODY = MOST_BYTES * 7 // 5  # of a request, which may hold an upload as base64
TOO_LARGE = "an upload may have 20 MB; scale the image down"
