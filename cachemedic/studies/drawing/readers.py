"""Readers of a cache as people see them: one name, one colour and one marker in all figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cachemedic.core.errors import nearest_valid
from cachemedic.studies.drawing.style import COLOURS, LINES

BLACK, VERMILION, SKY, GREEN, PINK, BLUE, YELLOW, GREY = COLOURS


class ReaderStyle(NamedTuple):
    """Name, colour, marker, and dashes by their place in `LINES`."""

    label: str
    colour: str
    marker: str
    line: int


STYLES = {
    "none": ReaderStyle("no defence", GREY, "x", 3),
    "clip_renormalise": ReaderStyle("clip and renormalise", BLACK, "P", 1),
    "range_restriction": ReaderStyle("restrict to clean ranges", GREY, "X", 2),
    "reset": ReaderStyle("reset", YELLOW, "<", 4),
    "smoothing": ReaderStyle("smoothing", SKY, ">", 5),
    "dropout": ReaderStyle("dropout of tokens", PINK, "8", 6),
    "masking": ReaderStyle("masking", GREEN, "h", 7),
    "clip_renormalise_oracle": ReaderStyle("clip and renormalise damaged tokens", BLACK, "p", 4),
    "range_restriction_oracle": ReaderStyle("restrict damaged tokens", GREY, "p", 5),
    "smoothing_oracle": ReaderStyle("smooth damaged tokens", SKY, "p", 6),
    "erase_damaged": ReaderStyle("erase damaged tokens", GREY, "d", 7),
    "guard": ReaderStyle("non-finite to zero", BLACK, "h", 3),
    "recompute": ReaderStyle("recompute", BLACK, "*", 0),
    "prefill": ReaderStyle("prefill again", BLACK, "d", 7),
    "erased": ReaderStyle("all erased", BLACK, "v", 7),
    "checksum_erase": ReaderStyle("checksum, erase", GREY, "v", 6),
    "checksum_recompute_2": ReaderStyle("recompute two layers", GREY, "*", 4),
    "shadow_1bit": ReaderStyle("1-bit copy", BLUE, "<", 5),
    "shadow_2bit": ReaderStyle("2-bit copy", BLUE, ">", 5),
    "shadow_4bit": ReaderStyle("4-bit copy", BLUE, "8", 5),
    "low_rank_shadow": ReaderStyle("low-rank shadow", PINK, "p", 2),
    "low_rank_shadow_3pct": ReaderStyle("low-rank shadow, 3%", PINK, "D", 2),
    "low_rank_shadow_6pct": ReaderStyle("low-rank shadow, 6%", PINK, "H", 2),
    "secded_ecc": ReaderStyle("SECDED code", BLUE, "p", 6),
    "secded_ecc_in_page": ReaderStyle("SECDED code in the page", BLUE, "X", 6),
    "secded_ecc_restricted": ReaderStyle("SECDED code, then clean ranges", BLUE, "d", 6),
    "golay_ecc": ReaderStyle("Golay code", SKY, "P", 6),
    "golay_ecc_in_page": ReaderStyle("Golay code in the page", SKY, "X", 6),
    "hidden_states": ReaderStyle("state of one layer, 16 bits", BLACK, "D", 1),
    "hidden_states_8bit": ReaderStyle("state of one layer, 8 bits", BLACK, "s", 2),
    "hidden_states_all": ReaderStyle("states of all layers", BLACK, "o", 3),
    "A": ReaderStyle("A, linear", BLUE, "^", 2),
    "A, no contraction": ReaderStyle("A, no contraction term", SKY, "v", 5),
    "B": ReaderStyle("B, learned basis", PINK, "v", 3),
    "B, no contraction": ReaderStyle("B, no contraction term", PINK, "^", 3),
    "C": ReaderStyle("C, global", YELLOW, "d", 4),
    "C, no contraction": ReaderStyle("C, no contraction term", YELLOW, "v", 4),
    "D": ReaderStyle("D, nothing stored", GREEN, "s", 1),
    "D, no ids": ReaderStyle("D, no ids", SKY, "D", 6),
    "D, hashes": ReaderStyle("D, with hashes", GREEN, "P", 4),
    "D, untrained": ReaderStyle("D, calibrated only", GREEN, "d", 3),
    "D, token by token": ReaderStyle("D, token by token", GREEN, "X", 5),
    "E": ReaderStyle("E, code and hashes", VERMILION, "o", 0),
    "E, code alone": ReaderStyle("E, code alone", YELLOW, "X", 7),
    "E, token by token": ReaderStyle("E, token by token", VERMILION, "X", 5),
    "code, no ids": ReaderStyle("joint code, no ids", YELLOW, "P", 3),
    "auto, 15% of a prefill": ReaderStyle("E, within 15% of a prefill", PINK, "P", 2),
    "E, untrained": ReaderStyle("E, calibrated only", VERMILION, "d", 3),
}
SYNONYMS = {
    "no defence": "none",
    "clip renormalise": "clip_renormalise",
    "range restriction": "range_restriction",
    "A, no contraction term": "A, no contraction",
    "E, restore": "E, code alone",
    "E, estimate": "E",
}  # of some studies


def _common(reader: str) -> str:
    """The name that all studies have in common."""
    name = reader.removeprefix("operator ")
    return SYNONYMS.get(name, name)


def reader_label(reader: str) -> str:
    """What a reader is called in figures and tables; conditions of a sweep are called what they are."""
    look = STYLES.get(_common(reader))
    return reader.replace("_", " ") if look is None else look.label


def head_of(reader: str) -> str:
    """The reader of which one differs in a number alone: the code of another length, the copy in other groups."""
    heads = [name for name in STYLES if reader == name or reader.startswith((f"{name}, 1/", f"{name}, group "))]
    return max(heads, key=len, default=reader)


def numbered_label(reader: str) -> str:
    """What a reader is called, with the number in which it differs from its `head_of`."""
    head = head_of(reader)
    return reader_label(head) + reader.removeprefix(head)


def reader_styles(readers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Keyword arguments of `plot` and `errorbar` for each reader, its label among them.

    Raises `ValueError` for a reader that has no look.
    """
    styles = {}
    for reader in readers:
        if _common(reader) not in STYLES:
            raise nearest_valid("reader in a figure", reader, STYLES)
        look = STYLES[_common(reader)]
        styles[reader] = {
            "color": look.colour,
            "marker": look.marker,
            "linestyle": LINES[look.line],
            "label": look.label,
        }
    return styles
