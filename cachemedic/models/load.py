"""Base models: the embedded ones, or any Hugging Face causal LM."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = Path(__file__).parent / "weights"
EMBEDDED = ("embedded-gpt2", "embedded-llama", "embedded-wikipedia")


@dataclass(frozen=True)
class Base:
    """A frozen causal LM in evaluation mode, its tokenizer, and the name it was loaded by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def context(self) -> int:
        """The longest sequence in tokens that the model was built for."""
        return self.model.config.max_position_embeddings


def load_base(name: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Base:
    """Load one of the `EMBEDDED` bases, or a Hugging Face causal LM by name or local path.

    The weights of an embedded base are checked against the sha256 of its card. All parameters are frozen.
    Raises `ValueError` for a name that is none of these, `OSError` for damaged embedded weights.
    """
    name = source = str(name)
    near = difflib.get_close_matches(name, EMBEDDED, n=1, cutoff=0.8)
    if name in EMBEDDED:
        folder = WEIGHTS / name
        check_weights(folder)
        source = str(folder)
    elif not Path(name).exists() and (near or name.startswith("embedded-") or "\\" in name or name.count("/") > 1):
        raise ValueError(
            f"unknown base {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; allowed: "
            f"{', '.join(EMBEDDED)}, the name of a Hugging Face causal LM, or an existing local folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base {name!r} is not embedded ({', '.join(EMBEDDED)}) and could not be loaded as a local folder or "
            f"from the Hugging Face hub: {error}"
        ) from error
    model = model.to(device)  # type: ignore[arg-type]  # mypy sees `to` unbound
    return Base(model.eval().requires_grad_(False), tokenizer, name)


def check_weights(folder: Path) -> None:
    """Raise `OSError` unless the weights in `folder` have the sha256 that `card.json` states."""
    expected = json.loads((folder / "card.json").read_text())["weights_sha256"]
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != expected:
        raise OSError(
            f"the weights in {folder} are damaged: sha256 {found[:16]}… instead of {expected[:16]}…; "
            "restore the file with `git checkout`, or train it again with `make base-models`"
        )


def decoder_layers(model: PreTrainedModel) -> tuple[torch.nn.Module, str]:
    """The module that holds the list of decoder layers, and the name of that list (`layers`, `h`, ...)."""
    depth = model.config.num_hidden_layers
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == depth:
                return module, name
    raise ValueError(f"{type(model).__name__} has no list of {depth} decoder layers")
