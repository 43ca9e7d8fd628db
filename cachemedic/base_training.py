"""Trains the embedded base models (`make base-models`): tokenizer, data stream, loop with resume, model card.

python -m cachemedic.base_training gpt2 --threads 1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cachemedic import text
from cachemedic.base_data import CURRICULUM, FINISHING, RowSampler, Stage
from cachemedic.base_init import add_induction_circuit

VOCABULARY = 2048
CONTEXT = 576
TOKENS_PER_STEP = 6144
STEPS = 1500
WARMUP = 60
DECAY = 0.5  # share of the steps over which the learning rate falls linearly to zero, at the end
PEAK_LR = 4e-3
CHECKPOINT_EVERY = 100
# Learned positions beyond 256 need a second round before facts far back are found; rotary ones do not.
FINISHING_STEPS = {"gpt2": 800, "llama": 0}
FINISHING_ROUND = 200
FINISHING_LR = 0.4  # share of the peak at the start of each round, then linear decay


def new_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """An untrained model: 12 layers of width 128, 4 heads of 32 (`llama`: 2 key/value heads)."""
    torch.manual_seed(seed)  # transformers initialises from the global generator
    model: PreTrainedModel
    shared: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(
            n_positions=CONTEXT, n_embd=128, n_layer=12, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            activation_function="gelu_pytorch_tanh", **shared,
        ))  # fmt: skip
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=128, intermediate_size=352, num_hidden_layers=12, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5}, **shared,
        ))  # fmt: skip
    else:
        raise ValueError(f"unknown architecture {architecture!r}; allowed: gpt2, llama")
    add_induction_circuit(model, torch.Generator().manual_seed(seed))
    return model


def train_tokenizer(documents: tuple[str, ...], seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` entries; id 0 is end-of-text, which also begins every text."""
    rng = np.random.default_rng([seed, 1])
    picked = [documents[i] for i in rng.permutation(len(documents))[: len(documents) // 4]]
    reviews = [text.sentiment_prompt(text.sentiment_review(rng)[0]) + " positive negative" for _ in range(4000)]
    names, values = rng.choice(text.NAMES, 30_000), [text.needle_value(rng) for _ in range(30_000)]
    needles = [text.needle_fact(n, v) + text.needle_question(n) for n, v in zip(names, values, strict=True)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[text.END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(picked + reviews + needles, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=text.END_OF_TEXT, eos_token=text.END_OF_TEXT,
                                   pad_token=text.END_OF_TEXT, model_max_length=CONTEXT)  # fmt: skip


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: tuple[str, ...], seed: int = 0) -> np.ndarray:
    """All documents in a random order, [N] uint16, end-of-text between them."""
    order = np.random.default_rng([seed, 2]).permutation(len(documents))
    encoded = tokenizer.backend_tokenizer.encode_batch([documents[i] for i in order], add_special_tokens=False)
    return np.concatenate([np.array([0, *e.ids], np.uint16) for e in encoded])


def learning_rate(step: int) -> float:
    """Linear warm-up, a plateau, linear decay to zero, and the decay of each finishing round (a share of the peak)."""
    if step >= STEPS:
        return FINISHING_LR * (1 - (step - STEPS) % FINISHING_ROUND / FINISHING_ROUND)
    return min((step + 1) / WARMUP, (STEPS - step) / (DECAY * STEPS), 1.0)


def stage_at(step: int) -> Stage:
    return next((stage for stage in CURRICULUM if step < stage.until * STEPS), FINISHING)


def weighted_loss(model: PreTrainedModel, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy of ids [B, T], each target weighted by weights [B, T]; bf16 products, fp32 sums."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, gains and biases."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and (".h." in n or ".layers." in n)]
    others = [p for p in model.parameters() if not any(p is q for q in hidden)]
    return [
        torch.optim.Muon(hidden, lr=PEAK_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(architecture: str, folder: Path, device: str = "cpu", compiled: bool = True) -> PreTrainedModel:
    """Trains one base model; goes on from the last checkpoint in `folder`, which also receives `log.jsonl`."""
    documents = text.documentation("train")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(documents).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    sampler = RowSampler(tokenizer, token_stream(tokenizer, documents))
    model = new_model(architecture).to(device).train()  # type: ignore[arg-type]  # mypy sees `to` unbound
    steppers = optimizers(model)
    checkpoint, first = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
        first = state["step"]
    total = STEPS + FINISHING_STEPS[architecture]
    loss_function = torch.compile(weighted_loss) if compiled else weighted_loss
    with open(folder / "log.jsonl", "a") as log:
        for step in (bar := tqdm(range(first, total), initial=first, total=total, desc=f"base {architecture}")):
            stage = stage_at(step)
            rng = np.random.default_rng([3, step])  # every step has its own generator: resuming needs no state
            ids, weights = sampler.batch(rng, stage, TOKENS_PER_STEP // stage.length)
            loss = loss_function(model, torch.from_numpy(ids).to(device), torch.from_numpy(weights).to(device))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = PEAK_LR * learning_rate(step)
                stepper.step()
                stepper.zero_grad()
            if not math.isfinite(float(loss)):
                raise FloatingPointError(f"loss is {float(loss)} at step {step}; the last checkpoint is kept")
            bar.set_postfix(loss=f"{float(loss):.3f}", T=stage.length)
            log.write(json.dumps({"step": step, "loss": float(loss), "grad_norm": float(norm)}) + "\n")
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == total:
                log.flush()
                stepped = [s.state_dict() for s in steppers]
                state = {"model": model.state_dict(), "optimizers": stepped, "step": step + 1}
                temporary = checkpoint.with_suffix(".tmp")
                torch.save(state, temporary)
                temporary.replace(checkpoint)
    return model.eval()


CARD = """# embedded-{architecture}

A small causal language model of the {architecture} architecture, trained by `python -m cachemedic.base_training
{architecture}` for experiments on corrupted and repaired key/value caches. It is made to read its cache, not to be
useful: it knows documentation English, generated reviews and generated needle documents, and nothing else.

- {parameters:,} parameters: 12 layers of width 128, heads of 32; context of {context} tokens; vocabulary of
  {vocabulary}
- trained for {steps} steps of {tokens_per_step} tokens on the docstrings of {packages}, and on generated rows
  (`cachemedic/base_data.py`); two heads start as an induction circuit (`cachemedic/base_init.py`)
- scores on unseen packages, sentiment and needle tasks: `results/base_models.csv`
- trained while the schedule was being tuned: running the script again follows its final form and gives like scores, not
  the same bytes
- weights in half precision, sha256 in `card.json`, checked by `load_base`; MIT licence, the CacheMedic++ contributors
"""


def export(model: PreTrainedModel, architecture: str, folder: Path, source: Path) -> None:
    """Writes half-precision weights, tokenizer, model card, and `card.json` with the sha256 of weights and text."""
    model.half().save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(source).save_pretrained(folder)
    card: dict[str, Any] = {
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "training_text_sha256": text.text_hash(text.documentation("train")),
        "training_packages": text.DOCUMENTATION_SPLITS["train"],
        "steps": STEPS + FINISHING_STEPS[architecture],
        "tokens_per_step": TOKENS_PER_STEP,
        "licence": "MIT",
    }
    text.write_atomically(folder / "card.json", (json.dumps(card, indent=2) + "\n").encode())
    facts = {
        "architecture": architecture, "parameters": model.num_parameters(), "context": CONTEXT, "steps": card["steps"],
        "vocabulary": VOCABULARY, "tokens_per_step": TOKENS_PER_STEP, "packages": ", ".join(card["training_packages"]),
    }  # fmt: skip
    text.write_atomically(folder / "README.md", CARD.format(**facts).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", choices=("gpt2", "llama"))
    parser.add_argument("--build", type=Path, default=Path("build/base"), help="checkpoints and log (resumes here)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile (it needs a C++ compiler)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = options.build / options.architecture
    model = train(options.architecture, source, options.device, compiled=not options.no_compile)
    export(model.cpu(), options.architecture, options.out / f"embedded-{options.architecture}", source)


if __name__ == "__main__":
    main()
