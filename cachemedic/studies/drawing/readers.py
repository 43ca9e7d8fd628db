"""Readers of a cache as people see them: one name, one colour and one marker in all figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cachemedic.core.errors import nearest_valid
from cachemedic.studies.drawing.style import COLOURS, LINES

BLACK, VERMILION, SKY, GREEN, PINK, BLUE, YELLOW, GREY = COLOURS


class Look(NamedTuple):
    """Name, colour, marker, and dashes by their place in `LINES`."""

    label: str
    colour: str
    marker: str
    line: int


LOOKS = {
    "none": Look("no defence", GREY, "x", 3),
    "clip_renormalise": Look("clip and renormalise", BLACK, "P", 1),
    "range_restriction": Look("restrict to clean ranges", GREY, "X", 2),
    "reset": Look("reset", YELLOW, "<", 4),
    "smoothing": Look("smoothing", SKY, ">", 5),
    "dropout": Look("dropout of tokens", PINK, "8", 6),
    "masking": Look("masking", GREEN, "h", 7),
    "clip_renormalise_oracle": Look("clip and renormalise damaged tokens", BLACK, "p", 4),
    "range_restriction_oracle": Look("restrict damaged tokens", GREY, "p", 5),
    "smoothing_oracle": Look("smooth damaged tokens", SKY, "p", 6),
    "erase_damaged": Look("erase damaged tokens", GREY, "d", 7),
    "guard": Look("non-finite to zero", BLACK, "h", 3),
    "recompute": Look("recompute", BLACK, "*", 0),
    "prefill": Look("prefill again", BLACK, "d", 7),
    "erased": Look("all erased", BLACK, "v", 7),
    "checksum_erase": Look("checksum, erase", GREY, "v", 6),
    "checksum_recompute_2": Look("recompute two layers", GREY, "*", 4),
    "shadow_1bit": Look("1-bit copy", BLUE, "<", 5),
    "shadow_2bit": Look("2-bit copy", BLUE, ">", 5),
    "shadow_4bit": Look("4-bit copy", BLUE, "8", 5),
    "low_rank_shadow": Look("low-rank shadow", PINK, "p", 2),
    "low_rank_shadow_3pct": Look("low-rank shadow, 3%", PINK, "D", 2),
    "low_rank_shadow_6pct": Look("low-rank shadow, 6%", PINK, "H", 2),
    "secded_ecc": Look("SECDED code", BLUE, "p", 6),
    "secded_ecc_in_page": Look("SECDED code in the page", BLUE, "X", 6),
    "secded_ecc_restricted": Look("SECDED code, then clean ranges", BLUE, "d", 6),
    "golay_ecc": Look("Golay code", SKY, "P", 6),
    "golay_ecc_in_page": Look("Golay code in the page", SKY, "X", 6),
    "hidden_states": Look("state of one layer, 16 bits", BLACK, "D", 1),
    "hidden_states_8bit": Look("state of one layer, 8 bits", BLACK, "s", 2),
    "hidden_states_all": Look("states of all layers", BLACK, "o", 3),
    "A": Look("A, linear", BLUE, "^", 2),
    "A, no contraction": Look("A, no contraction term", SKY, "v", 5),
    "B": Look("B, learned basis", PINK, "v", 3),
    "B, no contraction": Look("B, no contraction term", PINK, "^", 3),
    "C": Look("C, global", YELLOW, "d", 4),
    "C, no contraction": Look("C, no contraction term", YELLOW, "v", 4),
    "D": Look("D, nothing stored", GREEN, "s", 1),
    "D, no ids": Look("D, no ids", SKY, "D", 6),
    "D, hashes": Look("D, with hashes", GREEN, "P", 4),
    "D, untrained": Look("D, calibrated only", GREEN, "d", 3),
    "E": Look("E, code and hashes", VERMILION, "o", 0),
    "E, code alone": Look("E, code alone", YELLOW, "X", 7),
    "code, no ids": Look("joint code, no ids", YELLOW, "P", 3),
    "auto, 15% of a prefill": Look("E, within 15% of a prefill", PINK, "P", 2),
    "E, untrained": Look("E, calibrated only", VERMILION, "d", 3),
}
SYNONYMS = {
    "no defence": "none",
    "clip renormalise": "clip_renormalise",
    "range restriction": "range_restriction",
    "A, no contraction term": "A, no contraction",
    "D, nothing stored": "D",
    "E, sketch": "E",
    "E, restore": "E, code alone",
    "E, estimate": "E",
}  # of some studies


def _common(reader: str) -> str:
    """The name that all studies have in common."""
    name = reader.removeprefix("operator ")
    return SYNONYMS.get(name, name)


def reader_label(reader: str) -> str:
    """What a reader is called in figures and tables; conditions of a sweep are called what they are."""
    look = LOOKS.get(_common(reader))
    return reader.replace("_", " ") if look is None else look.label


def reader_styles(readers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Keyword arguments of `plot` and `errorbar` for each reader, its label among them.

    Raises `ValueError` for a reader that has no look.
    """
    styles = {}
    for reader in readers:
        if _common(reader) not in LOOKS:
            raise nearest_valid("reader in a figure", reader, LOOKS)
        look = LOOKS[_common(reader)]
        styles[reader] = {
            "color": look.colour,
            "marker": look.marker,
            "linestyle": LINES[look.line],
            "label": look.label,
        }
    return styles
