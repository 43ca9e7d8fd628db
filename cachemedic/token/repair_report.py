"""What a repair did, token by token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from torch import Tensor

from cachemedic.token.check import CheckReport, ranges
from cachemedic.token.policy import WAYS

SAID = {
    "recompute": "computed again from the ids",
    "estimate": "estimated from what code and ids tell, and from what was left",
    "restore": "restored from what code and ids tell",
    "erase": "erased: attention does not read them any more",
    "leave": "left as they are: little is damaged, or too many to be erased",
}


@dataclass(frozen=True, eq=False)
class RepairReport:
    """found: the damage; way_numbers [B, T]: of `WAYS`, what was done with each token; verified: recomputed tokens that
    are bit for bit what was written; not_covered: tokens with damage where the operator does not reach, which a check
    goes on to name; expected_kl: in nats, in proportion to the tokens repaired each way and to all that are erased,
    None where a way was not measured in calibration or damage is not covered; seconds: that the repair took; budget and
    expected_share: of a prefill, None without a budget; not_recomputed: why no token of this cache can be computed
    again, None if it can.
    """

    found: CheckReport
    way_numbers: Tensor
    verified: int
    not_covered: int
    expected_kl: float | None
    seconds: float
    budget: float | None
    expected_share: float | None
    not_recomputed: str | None

    @property
    def ways(self) -> dict[str, int]:
        """How many tokens were repaired each way."""
        counts = {way: int((self.way_numbers == number).sum()) for number, way in enumerate(WAYS) if number}
        return {way: count for way, count in counts.items() if count}

    def way(self, row: int, slot: int) -> str:
        """What was done with one token, one of `WAYS`."""
        return WAYS[int(self.way_numbers[row, slot])]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {text}" if name else text for name, text in self._lines())

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in self._lines())
        return f"<table>{rows}</table>"

    def _lines(self) -> Iterable[tuple[str, str]]:
        if not self.found:
            yield "", str(self.found)
            if not self.ways:
                return
        else:
            yield from self.found.lines()
        for way in self.ways:
            tokens = self.way_numbers == WAYS.index(way)
            exact = f", {self.verified} of them bit for bit as written" if way == "recompute" else ""
            yield way, f"{self.ways[way]} tokens {SAID[way]}{exact}"
            for row in tokens.any(1).nonzero().squeeze(1).tolist():
                yield f"{way}, row {row}", ranges(tokens[row].nonzero().squeeze(1).tolist())
        if self.not_covered:
            yield "left", f"{self.not_covered} tokens have damage in layers or numbers that the operator does not cover"
        if self.not_recomputed is not None:
            yield "recompute", f"not possible: {self.not_recomputed}"
        if self.budget == 0:
            yield "budget", "0: there was no time to repair anything"
        elif self.expected_share is not None:
            yield "budget", f"{self.budget:.3g} of a prefill, {self.expected_share:.3g} expected"
        yield "time", f"{self.seconds:.3g} s"
        yield "expected KL", "not measured" if self.expected_kl is None else f"{self.expected_kl:.3g} nats"
