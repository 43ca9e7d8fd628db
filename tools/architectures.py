"""Writes docs/architectures.md: which architectures of transformers work with the operators and with SketchCache.

python tools/architectures.py [MODEL_TYPE ...]     with names: prints their lines, and writes nothing
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cachemedic import RepairOperator, SketchCache, protect
from cachemedic.models.attention import attention_modules
from cachemedic.repair.attention import Attention, Gates
from cachemedic.repair.folded import FoldedOperator
from cachemedic.token.vectors import TokenVectors
from small_configurations import VOCABULARY, small_configuration

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
WORKS = "works"
LARGEST = 3_000_000  # parameters of what counts as small
LENGTH, PREFILL = 9, 6
TOLERANCE = 1e-4  # of the largest logit, between two ways to compute it
EXACT = 2e-5  # of the largest stored number, between a recomputed and a written cache
DRAFTS = "it drafts for a larger model, whose cache it reads, and works with that alone"
DECODER = "the class for it takes the configuration of its decoder, to which transformers does not lead"
# Why no small model of an architecture can be made or asked alone, where the error of transformers does not say it.
ALONE = {
    "blt": "transformers makes a cache by num_hidden_layers, which its configuration does not have",
    "dots3_note": "its configuration gives layers 25 to 41 sizes of their own, however few there are",
    "gemma3n": "its vision part needs the package timm",
    "gemma4_assistant": DRAFTS,
    "gemma4_unified_assistant": DRAFTS,
    "musicgen": DECODER,
    "musicgen_melody": DECODER,
}
HEADER = f"""# Architectures

Each causal language model of transformers {transformers.__version__}, built small with random weights, in float32 on a
CPU. `python tools/architectures.py` makes this page; a test checks some of its lines.

- **A to C**: `protect` with a new operator changes no bit of the logits of a prefill and of decoding steps over the
  cache of the model; with another operator the logits change, stay finite, and are those of an attention that reads the
  repaired keys and values themselves. Where some layers attend and others do not, the operator is for those that do.
- **recompute**: tokens of a `SketchCache` that are set to other numbers are found, and computed again to within
  {EXACT:g} of the largest number. Checks, hashes and erasing need the same.
- **D and E**: the keys of all layers are unrotated and rotated again to within {EXACT:g}; D and E need that.

What does not work is refused before any work with the reason that stands here.
"""


@dataclass(frozen=True)
class Line:
    """What is known of one architecture; each column is `WORKS`, what works in words, or a reason."""

    model_type: str
    built: str
    operators: str = ""
    recompute: str = ""
    token_aware: str = ""

    def __str__(self) -> str:
        if self.built != WORKS:
            return f"| {self.model_type} | not built: {self.built} | | |"
        return f"| {self.model_type} | {self.operators} | {self.recompute} | {self.token_aware} |"


class WrongResultError(Exception):
    """A result that is wrong without an error."""


class _Materialised:
    """Attention over the repaired keys and values themselves: what an operator of families A to C must agree with."""

    def __init__(self, operator: FoldedOperator) -> None:
        self.operator, self.layers, self.device = operator, operator.layers, operator.device
        self.check_model = operator.check_model

    def attend(
        self, layer: int, attention: Attention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None, Gates]:
        """One query and one of the heads of a group after the other."""
        keys, values = self.operator.materialise(layer, query, key, value)
        repeats = query.shape[1] // key.shape[1]
        output = torch.empty_like(query).transpose(1, 2)
        for i in range(query.shape[2]):
            for head in range(repeats):
                own = slice(head, None, repeats)
                output[:, i, own] = attention(query, keys[:, own, i], values[:, own, i])[0][:, i, own]
        return output, None, (None, None)


def small_model(model_type: str) -> PreTrainedModel:
    """A small model in evaluation mode. Raises `ValueError` for one of more than three million parameters."""
    config = small_configuration(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters however small its known sizes")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def some_ids() -> Tensor:
    """Token ids [2, 9]."""
    return torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def logits_of(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> Tensor:
    """Logits of all tokens: most of them at once, then one by one, on one cache; all at once if the model has none."""
    logits = []
    for start, end in [(0, PREFILL), *((i, i + 1) for i in range(PREFILL, LENGTH))]:
        out: Any = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            return model(ids).logits
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def operators(model: PreTrainedModel) -> str:
    """Whether `protect` is right on all layers that attend. Raises `WrongResultError`, and what `protect` raises."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    RepairOperator.create("A", model.config, [0])  # refuses what no operator fits
    attending = [layer for layer in range(depth) if _attends(model, layer)]
    new = RepairOperator.create("A", model.config, attending or "all", rank=3)
    ids = some_ids()
    plain = logits_of(model, ids)
    if not plain.isfinite().all():
        raise WrongResultError("the model itself is not finite")
    with protect(model, new):
        if not torch.equal(logits_of(model, ids), plain):
            raise WrongResultError("a new operator is not the identity")
    moved = _shaken(new)
    with protect(model, moved):
        found = logits_of(model, ids)
    with protect(model, _Materialised(moved)):
        expected = logits_of(model, ids)
    if not found.isfinite().all() or torch.equal(found, plain):
        raise WrongResultError("an operator is not seen, or logits are not finite")
    _check_close(found, expected, TOLERANCE, "logits")
    return WORKS if len(attending) == depth else f"works on the layers that attend ({len(attending)} of {depth} here)"


def _attends(model: PreTrainedModel, layer: int) -> bool:
    try:
        return bool(attention_modules(model, [layer]))
    except ValueError:
        return False


def _shaken(operator: RepairOperator) -> Any:
    generator = torch.Generator().manual_seed(11)
    for p in operator.parameters():
        p.data.add_(0.3 * torch.randn(p.shape, generator=generator))
    return operator


def _check_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off <= tolerance:
        raise WrongResultError(f"{what} off by {off:.1e}")


def recompute(model: PreTrainedModel) -> str:
    """Whether damaged tokens are found and computed again. Raises `WrongResultError`, and what `SketchCache` raises."""
    ids = some_ids()
    cache = SketchCache(model)
    plain = logits_of(model, ids)
    _check_close(logits_of(model, ids, cache), plain, TOLERANCE, "logits over a SketchCache")
    before = [[x.clone() for x in side] for side in cache.numbers()]
    layers: list[Any] = cache.layers
    places = [(0, 0), (0, 4), (1, 7)]
    for row, slot in places:
        for layer in layers:
            layer.keys[row, :, slot] = 7
            layer.values[row, :, slot] = -5
    report = cache.repair("recompute")
    if report.ways != {"recompute": len(places)}:
        raise WrongResultError(f"repaired {report.ways}")
    for side, clean in zip(cache.numbers(), before, strict=True):
        for x, y in zip(side, clean, strict=True):
            _check_close(x, y, EXACT, "recomputed tokens")
    return WORKS


def token_aware(model: PreTrainedModel) -> str:
    """Whether vectors of tokens turn back into what was stored. Raises `WrongResultError`, and what D and E raise."""
    cache = SketchCache(model)
    RepairOperator.create("E", model.config, "all")
    vectors = TokenVectors(model)
    logits_of(model, some_ids(), cache)
    keys, values = cache.numbers()
    positions = torch.arange(LENGTH).expand(2, -1)
    again = vectors.back(vectors.of(keys, values, positions), positions)
    for found, stored in zip(again, (keys, values), strict=True):
        _check_close(found, torch.stack(stored, 1), EXACT, "rotated keys and values")
    return WORKS


def _first_line(error: Exception) -> str:
    return " ".join(str(error).strip().splitlines()[0].split()) if str(error).strip() else type(error).__name__


def _asked(use: Callable[[PreTrainedModel], str], model: PreTrainedModel) -> str:
    """What works, what is refused, or, in bold, what is neither."""
    try:
        return use(model)
    except (ValueError, TypeError) as error:
        return f"refused: {_first_line(error)}".replace("|", "\\|")
    except Exception as error:
        return f"**{type(error).__name__}: {_first_line(error)}**".replace("|", "\\|")


@torch.no_grad()
def line_of(model_type: str) -> Line:
    """What works with one architecture."""
    with warnings.catch_warnings(action="ignore"):
        try:
            model = small_model(model_type)
            logits_of(model, some_ids())
        except Exception as error:  # of any kind, from code that is not ours
            return Line(model_type, ALONE.get(model_type, _first_line(error).replace("|", "\\|")))
        return Line(model_type, WORKS, *(_asked(use, model) for use in (operators, recompute, token_aware)))


def page(lines: list[Line]) -> str:
    """The page of these lines."""
    built = [line for line in lines if line.built == WORKS]
    rows = []
    for title, column in (("A to C", "operators"), ("recompute", "recompute"), ("D and E", "token_aware")):
        kinds = Counter(getattr(line, column).split()[0].rstrip(":") for line in built)
        other = len(built) - kinds[WORKS] - kinds["refused"]
        rows.append(f"| {title} | {kinds[WORKS]} | {kinds['refused']} | {other} |")
    counts = ["| | works | refused | wrong |", "|---|---|---|---|", *rows]
    table = ["| architecture | A to C | recompute | D and E |", "|---|---|---|---|", *map(str, lines)]
    said = f"{len(lines)} architectures, {len(built)} of them built here:"
    return "\n".join([HEADER, said, "", *counts, "", *table, ""])


def main(names: list[str]) -> None:
    """Writes the page, or prints lines."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    if names:
        print(*map(line_of, names), sep="\n")
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page([line_of(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
