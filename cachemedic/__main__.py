"""The library from the command line; `python -m cachemedic COMMAND --help` says what a command takes.

    python -m cachemedic demo
    python -m cachemedic check my-cache --base embedded-gpt2 --operator E/embedded-gpt2

Exit status: 0, or 1 if `check` finds damage, or 2 after an error, which is one line.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import cachemedic  # its names load torch when they are used, so that --help and a wrong option answer at once

if TYPE_CHECKING:
    import torch

    from cachemedic import SketchCache

DAMAGED, WRONG, INTERRUPTED = 1, 2, 130
CONTEXT = (
    "Merge two tables by the values of a column.{}\n\n"
    "The rows of the result are those whose values are in both tables. Rows that have no partner in the other table "
    "are left out unless the argument says that they should be kept."
)
NAME, VALUE = "falcon", "copper lantern"  # what the context of the demonstration pairs

app = typer.Typer(
    help="Check and repair saved key-value caches, and make what repairs them.",
    add_completion=False,
    rich_markup_mode=None,
)


class Family(StrEnum):
    """Families of operators that are calibrated."""

    D = "D"
    E = "E"


class Format(StrEnum):
    """Number formats of a model."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


SavedCache = Annotated[
    Path, typer.Argument(metavar="FOLDER", exists=True, file_okay=False, help="a cache that SketchCache.save wrote")
]
MODELS = "embedded-gpt2, embedded-llama, embedded-wikipedia, smollm2-135m, a model of the Hugging Face hub, or a folder"
BaseName = Annotated[str, typer.Option(help=f"model that wrote the cache: {MODELS}")]
OperatorName = Annotated[str | None, typer.Option(help="operator it was written with, if any: a name or a folder")]
ModelFormat = Annotated[Format, typer.Option(help="number format of the model")]


@app.command(short_help="Check a saved cache.")
def check(
    folder: SavedCache, base: BaseName, operator: OperatorName = None, dtype: ModelFormat = Format.float32
) -> None:
    """Say which tokens of a saved cache are not what was written; exit status 1 if there are any."""
    report = _load(folder, base, operator, dtype).report
    print(report)
    if report:
        raise typer.Exit(DAMAGED)


@app.command(short_help="Repair a saved cache.")
def repair(
    folder: SavedCache,
    base: BaseName,
    operator: OperatorName = None,
    dtype: ModelFormat = Format.float32,
    method: Annotated[
        str, typer.Option(help="recompute, restore, estimate, erase, or auto: what leaves least error in the time")
    ] = "auto",
    budget: Annotated[float | None, typer.Option(help="time that may be taken, as a share of a prefill")] = None,
    to: Annotated[
        Path | None, typer.Option(file_okay=False, help="folder for the result; the same if not given")
    ] = None,
) -> None:
    """Repair a saved cache and say what was done with each token."""
    cache = _load(folder, base, operator, dtype)
    (to or folder).mkdir(parents=True, exist_ok=True)  # a folder that cannot be is refused before anything is repaired
    report = cache.repair(method, budget)
    cache.save(to or folder)
    print(report)


@app.command(short_help="Make an operator of family D or E.")
def calibrate(
    base: Annotated[str, typer.Argument(help=f"model: {MODELS}")],
    to: Annotated[Path, typer.Option(file_okay=False, help="folder for the operator")],
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="text of one kind, in UTF-8, with <|endoftext|> between documents; may be given several times. "
            "Default: documentation and code of installed packages, generated reviews and, for chat models, dialogue",
        ),
    ] = None,
    family: Annotated[
        Family, typer.Option(help="D, which stores nothing, or E, which keeps a code of each token")
    ] = Family.E,
    share: Annotated[
        str | None, typer.Option(help="bytes of E's code over those of the cache  [default: 1/128]")
    ] = None,
    dtype: ModelFormat = Format.float32,
) -> None:
    """Make an operator of family D or E for a model, from text of the kinds that it is going to read."""
    options: dict[str, Any] = {} if share is None else {"share": _share(share)}
    kinds = _kinds(texts) if texts else None
    lm = cachemedic.load_base(base, dtype=_dtype(dtype))
    operator = cachemedic.RepairOperator.create(family.value, lm.config, layers="all", **options)
    to.mkdir(parents=True, exist_ok=True)  # a folder that cannot be is refused before the long work
    cachemedic.calibrate(operator, lm, kinds).save_pretrained(to)
    print(f"saved: RepairOperator.from_pretrained({str(to)!r})")


@app.command(short_help="Run benchmarks.")
def bench(
    parts: Annotated[
        list[str] | None, typer.Argument(help="which benchmarks: decode, repair, training; all if none is named")
    ] = None,
) -> None:
    """Run benchmarks on the CPU, all of them by default, into results/bench_*.csv (three quarters of an hour)."""
    from cachemedic.studies.bench.measure import measure

    measure(parts or [])


@app.command(short_help="Damage and repair a cache, as a demonstration.")
def demo(
    corruption: Annotated[
        str, typer.Option(help="type of damage that has severities; an unknown one lists them")
    ] = "gaussian",
    severity: Annotated[
        float, typer.Option(help="from 0, no damage, to 1, as harmful as the loss of the whole context")
    ] = 0.5,
    method: Annotated[
        str, typer.Option(help="way of repair: recompute, restore, estimate, erase or auto")
    ] = "estimate",
) -> None:
    """Damage the cache of an embedded model, check it, repair it, and show what the model answers each time."""
    from cachemedic.core.errors import nearest_valid
    from cachemedic.corruption.types import CORRUPTIONS
    from cachemedic.data.text import needle_fact, needle_question

    if corruption not in (damages := [name for name, known in CORRUPTIONS.items() if known.calibration]):
        raise nearest_valid("type of damage with severities", corruption, damages)
    name = "embedded-gpt2"
    spec = cachemedic.CorruptionSpec(corruption, severity=severity, base=name)
    lm: Any = cachemedic.load_base(name)
    text, question = CONTEXT.format(needle_fact(NAME, VALUE)), needle_question(NAME)

    def encode(text: str) -> Any:
        return lm.tokenizer(lm.tokenizer.bos_token + text, return_tensors="pt")

    def answer(cache: SketchCache) -> str:
        ids = encode(text + question)
        how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": lm.tokenizer.eos_token_id}
        written = lm.model.generate(**ids, past_key_values=copy.deepcopy(cache), **how)
        return lm.tokenizer.decode(written[0, ids["input_ids"].shape[1] :]).strip().partition("\n")[0]

    prompt = encode(text)
    operator: Any = cachemedic.RepairOperator.from_pretrained(f"E/{name}")
    cache = cachemedic.SketchCache(lm.model, operator)
    lm.model(**prompt, past_key_values=cache)
    other = {key: x[:, : prompt["input_ids"].shape[1]] for key, x in encode(CONTEXT.format("") * 2).items()}
    donor = lm.model(**other, use_cache=True).past_key_values
    damaged: Any = cachemedic.corrupt_cache(cache, spec, seed=0, donor=donor)
    clean, wrong, report = answer(cache), answer(damaged), damaged.repair(method)
    print(f"{text}\n{question}\n\nclean:    {clean}\ndamaged:  {wrong}\nrepaired: {answer(damaged)}\n")
    print(f"check() of the damaged cache says\n{report.found}\n")
    print("\n".join(f"repair: {count} tokens, {way}" for way, count in report.ways.items()))


def _load(folder: Path, base: str, operator: str | None, dtype: Format) -> SketchCache:
    found: Any = None if operator is None else cachemedic.RepairOperator.from_pretrained(operator)
    return cachemedic.SketchCache.load(folder, cachemedic.load_base(base, dtype=_dtype(dtype)).model, found)


def _dtype(name: Format) -> torch.dtype:
    import torch

    return getattr(torch, name.value)


def _share(given: str) -> float:
    """A number from a text like 1/128 or 0.01."""
    try:
        share = float(Fraction(given))
    except (ValueError, ZeroDivisionError):
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"share {given!r} is out of range: a number above 0, up to 1, like 1/128 or 0.01")
    return share


def _kinds(paths: Sequence[Path]) -> dict[str, list[str]]:
    """The documents of each file, by its name."""
    from cachemedic.data.text import END_OF_TEXT

    kinds = {}
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error}") from error
        kinds[str(path)] = [document for document in text.split(END_OF_TEXT) if document.strip()]
    return kinds


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    try:
        status = app(list(arguments) or ["--help"], prog_name="python -m cachemedic", standalone_mode=False) or 0
    except (typer.TyperException, ValueError, TypeError, OSError, ImportError) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print("error:", " ".join(message.split()), file=sys.stderr)
        return WRONG
    if status == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
