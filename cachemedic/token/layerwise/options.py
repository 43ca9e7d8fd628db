"""What the options of families D and E may be, and what follows from them."""

from __future__ import annotations

from cachemedic.repair.config import OperatorConfig
from cachemedic.token.scalar_codes import MAX_BITS


def coordinates(config: OperatorConfig) -> int:
    """How many coordinates of the innovation a layer has: no more than its vectors have numbers."""
    per_head = min(config.options["coordinates"], config.model.head_dim)
    return per_head * 2 * config.model.num_kv_heads


def check_options(config: OperatorConfig) -> None:
    """Raises `ValueError` for an option out of its range."""
    options = config.options
    for name, least in (("known_layers", 0), ("coordinates", 1), ("hidden", 1), ("window", 0), ("rounds", 0)):
        if not options[name] >= least:
            raise ValueError(f"{name} must be {least} or more, not {options[name]}")
    if config.apply_to != "KV":
        raise ValueError(
            f"families D and E repair keys and values together: apply_to must be 'KV', not {config.apply_to!r}"
        )
    if not 0 <= options.get("share", 0) <= 1:
        raise ValueError(f"share {options['share']} is out of range: allowed are 0 to 1 of a bf16 cache")
    if options.get("projection", "principal") not in ("principal", "random", "learned"):
        raise ValueError(f"projection must be 'principal', 'random' or 'learned', not {options['projection']!r}")
    bits = options.get("bits")
    if bits is not None and not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits {bits} is out of range: allowed are 1 to {MAX_BITS}, or None")
