"""Random generators that are seeded by a name."""

from __future__ import annotations

import hashlib
import json

import torch


def generator(*name: int | str) -> torch.Generator:
    """A generator seeded by its name: equal names give equal draws, different names independent ones."""
    digest = hashlib.sha256(json.dumps(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
