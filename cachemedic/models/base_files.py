"""The files that define a base model, and the hashes by which its folder is checked when it is read."""

from __future__ import annotations

from pathlib import Path

from cachemedic.core.files import file_digest, read_sealed

CARD = "card.json"
DEFINING = (  # what transformers reads from the folder of a base, where it is there
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "model.safetensors.index.json",
    "adapter_config.json",
)


def defining_digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file in `folder` that defines the base, by name: what `card.json` keeps as `sha256`."""
    return {name: file_digest(folder / name) for name in DEFINING if (folder / name).is_file()}


def check_base_files(folder: Path, remedy: str) -> None:
    """Raise `OSError`, which ends with the `remedy`, unless the files in `folder` are those that its card lists."""
    try:
        expected = dict[str, str](read_sealed(folder / CARD)["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OSError(f"{folder / CARD} is missing or damaged ({error!r}); {remedy}") from error
    found = defining_digests(folder)
    for name in sorted({*expected, *DEFINING}):
        if found.get(name) != expected.get(name):
            shown = [f"sha256 {digests[name][:16]}…" if name in digests else "no file" for digests in (found, expected)]
            raise OSError(f"{folder / name} is damaged: {shown[0]} instead of {shown[1]}; {remedy}")
