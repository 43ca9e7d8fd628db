"""What the notebook `playground` shows: how a model goes on from a clean, a damaged and a repaired cache.

play = Playground(load_base("embedded-gpt2"), text, question, other)
play.result(Settings("gaussian", severity=0.4, method="estimate"))  # a page of HTML in a notebook
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from cachemedic.core.divergence import kd_per_token
from cachemedic.core.errors import nearest_valid
from cachemedic.corruption.apply import corrupt_cache
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.corruption.types import CORRUPTIONS
from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.token import policy
from cachemedic.token.cache import SketchCache
from cachemedic.token.plausible import check_cache
from cachemedic.token.repair_report import RepairReport

LEAVE = "leave"
METHODS = (LEAVE, *policy.METHODS)
ORANGE = "213, 94, 0"  # how a coloured token is shaded, in red, green and blue


def damage_types() -> list[str]:
    """The types of damage that have a severity."""
    return [name for name, corruption in CORRUPTIONS.items() if corruption.calibration]


@dataclass(frozen=True)
class Settings:
    """What is done to the cache and against it. `share`: of the tokens that can be hit; `method`: one of `METHODS`.

    Raises `ValueError` for values out of their range, as `CorruptionSpec`, and for an unknown method.
    """

    damage: str = "dropout_zero"
    severity: float = 0.5
    share: float = 1.0
    method: str = "auto"

    def __post_init__(self) -> None:
        CorruptionSpec(self.damage, severity=self.severity, share=self.share)  # refuses what it does not know
        if self.method not in METHODS:
            raise nearest_valid("method of repair", self.method, METHODS)


@dataclass(frozen=True)
class Continuation:
    """Tokens that a model wrote, and for each the KL of its prediction, in nats, to that of the clean cache there."""

    tokens: tuple[str, ...]
    kl: tuple[float, ...]

    @property
    def text(self) -> str:
        """The tokens as one text."""
        return "".join(self.tokens)

    def html(self) -> str:
        """The text; a token is the darker, the larger the KL."""
        shades = [1.0 if math.isnan(kl) else 1 - math.exp(-kl) for kl in self.kl]
        return coloured(self.tokens, shades, [f"KL {kl:.3g} nats" for kl in self.kl])


@dataclass(frozen=True, eq=False)
class Result:
    """What `Playground.result` found.

    prompt: its tokens; suspicion: the score of `check_cache` for each; kinds: what `SketchCache.check` says of each,
    "" where it is as it was written; report: of the repair, None if there was none; facts: times and bytes, by name.
    """

    prompt: tuple[str, ...]
    suspicion: tuple[float, ...]
    kinds: tuple[str, ...]
    clean: Continuation
    damaged: Continuation
    repaired: Continuation
    report: RepairReport | None
    facts: dict[str, str]

    def _repr_html_(self) -> str:
        shades = [1 - 1 / score if score > 1 else 0.0 for score in self.suspicion]
        titles = [
            f"score {score:.3g}; {kind or 'as it was written'}"
            for score, kind in zip(self.suspicion, self.kinds, strict=True)
        ]
        prompt = coloured(self.prompt, shades, titles, map(bool, self.kinds))
        texts = {"clean": self.clean, "damaged": self.damaged, "repaired": self.repaired}
        rows = [(name, continuation.html()) for name, continuation in texts.items()]
        rows += [(name, escape(fact)) for name, fact in self.facts.items()]
        return f"<p>{prompt}</p>{table(rows)}{'' if self.report is None else self.report._repr_html_()}"


def coloured(
    tokens: Sequence[str], shades: Sequence[float], titles: Sequence[str], marked: Iterable[bool] | None = None
) -> str:
    """HTML of tokens, each with a background from white (shade 0) to orange (1) and its title; marked: underlined."""
    marks = [False] * len(tokens) if marked is None else marked
    spans = []
    for token, shade, title, mark in zip(tokens, shades, titles, marks, strict=True):
        style = f"background: rgba({ORANGE}, {shade:.2f})" + ("; text-decoration: underline" if mark else "")
        spans.append(f'<span style="{style}" title="{escape(title)}">{escape(token)}</span>')
    return f'<span style="white-space: pre-wrap">{"".join(spans)}</span>'


def table(rows: Iterable[tuple[str, str]]) -> str:
    """HTML of two columns: names in plain text, and HTML beside them."""
    cells = (f'<tr><th>{escape(name)}</th><td style="text-align: left">{html}</td></tr>' for name, html in rows)
    return f"<table>{''.join(cells)}</table>"


class Playground:
    """A text in the cache of a model, what is asked after it, and a longer text whose cache may be written over it.

    Needs the operator of family E that comes with the package for this base; raises `ValueError` if there is none.
    """

    def __init__(self, base: Base, text: str, question: str, other: str, written: int = 16) -> None:
        self.base, self.written = base, written
        self.operator: Any = RepairOperator.from_pretrained(f"E/{base.name}")
        self.ids = self._encode(text)
        length = self.ids.shape[1]
        self.question = self._encode(text + question)[:, length:]
        self.donor = self._prefill(self._encode(other, truncation=True, max_length=length))
        start = time.perf_counter()
        self.cache = self._prefill(self.ids)
        self.prefill_seconds = time.perf_counter() - start
        self.clean = self._go_on(self.cache)

    @torch.inference_mode()
    def result(self, settings: Settings) -> Result:
        """Damages a copy of the cache, checks it, repairs it, and lets the model write from each.

        The damage is the same whenever the settings are. Raises `ValueError` for a severity that the damage does not
        reach.
        """
        spec = CorruptionSpec(settings.damage, settings.severity, share=settings.share, base=self.base.name)
        cache: Any = corrupt_cache(self.cache, spec, seed=0, donor=self.donor)
        start = time.perf_counter()
        found = cache.check()
        seconds = time.perf_counter() - start
        suspicion = check_cache(self.base.model, self.operator, cache, self.ids).score[0].tolist()
        kinds = tuple(found.kind(0, slot) if changed else "" for slot, changed in enumerate(found.changed[0].tolist()))
        damaged = self._go_on(cache)
        report = None if settings.method == LEAVE else cache.repair(settings.method)
        stored = sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))
        kept = self.cache.bytes_per_token * self.ids.shape[1]
        facts = {
            "time": f"prefill {1e3 * self.prefill_seconds:.0f} ms, check {1e3 * seconds:.0f} ms, repair "
            + ("none" if report is None else f"{1e3 * report.seconds:.0f} ms"),
            "bytes": f"cache {stored:,}, kept beside it {kept:,.0f} ({kept / stored:.1%})",
        }
        return Result(
            self._tokens(self.ids), tuple(suspicion), kinds, self.clean, damaged, self._go_on(cache), report, facts
        )

    def _encode(self, text: str, **options: Any) -> torch.Tensor:
        tokenizer: Any = self.base.tokenizer
        ids = tokenizer(tokenizer.bos_token + text, return_tensors="pt", **options)["input_ids"]
        return ids.to(self.base.model.device)

    def _tokens(self, ids: torch.Tensor) -> tuple[str, ...]:
        tokenizer: Any = self.base.tokenizer
        return tuple(tokenizer.decode(i) for i in ids.flatten().tolist())

    def _prefill(self, ids: torch.Tensor) -> Any:
        cache = SketchCache(self.base.model, self.operator)
        with torch.inference_mode():
            self.base.model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
        return cache

    @torch.inference_mode()
    def _go_on(self, cache: SketchCache) -> Continuation:
        """What the model writes after the question, by the likeliest token; the cache stays as it is."""
        model: Any = self.base.model
        ids = torch.cat([self.ids, self.question], 1)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(cache),
            max_new_tokens=self.written,
            do_sample=False,
            pad_token_id=self.base.tokenizer.eos_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(out.logits)
        new = out.sequences[:, ids.shape[1] :]
        read = torch.cat([self.question, new[:, :-1]], 1)
        expected = model(read, past_key_values=copy.deepcopy(self.cache)).logits[0, -len(logits) :]
        kl = kd_per_token(expected, logits, temperature=1).clamp_min(0)  # rounding may leave it just below
        return Continuation(self._tokens(new), tuple(kl.tolist()))
