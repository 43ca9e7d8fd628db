"""Where this machine keeps what takes long to make: texts, banks of clean caches, converted models, operators."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`CACHEMEDIC_CACHE`, which make sets to build/cache; without it a folder in the user's own cache."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cachemedic"
    return Path(os.environ.get("CACHEMEDIC_CACHE") or user)
