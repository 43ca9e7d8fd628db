"""Trains the embedded base models (`make base-models`): tokenizer, data stream, loop with resume, model card.

python -m cachemedic.studies.pretraining.train gpt2 --threads 1
python -m cachemedic.studies.pretraining.train wikipedia --text FOLDER

The folder of the third base holds wikipedia/train.txt.xz and sst2/train.tsv.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cachemedic.core.files import naming, seal, write_atomically
from cachemedic.core.progress import tqdm
from cachemedic.core.tensors import flattened, read_tensors, tensor_bytes, unflattened
from cachemedic.data import text
from cachemedic.models.base_files import CARD as CARD_FILE
from cachemedic.models.base_files import defining_digests
from cachemedic.models.load import WEIGHTS
from cachemedic.studies.pretraining.corpus import FINISHING, RowSampler, Stage
from cachemedic.studies.pretraining.initialisation import add_induction_circuit
from cachemedic.studies.pretraining.recipes import RECIPES, Recipe, TrainingText, recipe, training_text

CONTEXT = 576
TOKENS_PER_STEP = 6144
WARMUP = 60
DECAY = 0.5  # share of the steps over which the learning rate falls linearly to zero, at the end
PEAK_LR = 4e-3
CHECKPOINT_EVERY = 100
FINISHING_ROUND = 200
FINISHING_LR = 0.4  # share of the peak at the start of each round, then linear decay


def new_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The untrained model of a recipe. Raises `ValueError` for an unknown one."""
    torch.manual_seed(seed)  # transformers initialises from the global generator
    plan = recipe(name)
    model: PreTrainedModel
    shared: dict[str, Any] = {"vocab_size": plan.vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if plan.architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(
            n_positions=CONTEXT, n_embd=plan.width, n_layer=plan.layers, n_head=plan.heads, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh", **shared,
        ))  # fmt: skip
    else:
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=plan.width, intermediate_size=plan.width * 11 // 4, num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads, num_key_value_heads=plan.key_value_heads, max_position_embeddings=CONTEXT,
            tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5}, **shared,
        ))  # fmt: skip
    add_induction_circuit(model, torch.Generator().manual_seed(seed))
    return model


def train_tokenizer(source: TrainingText, vocabulary: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary` entries; id 0 is end-of-text, which also begins every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[text.END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(source.sample(np.random.default_rng([seed, 1])), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=text.END_OF_TEXT, eos_token=text.END_OF_TEXT,
                                   pad_token=text.END_OF_TEXT, model_max_length=CONTEXT)  # fmt: skip


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: tuple[str, ...], seed: int = 0) -> np.ndarray:
    """All documents in a random order, [N] uint16, end-of-text between them."""
    order = np.random.default_rng([seed, 2]).permutation(len(documents))
    encoded = tokenizer.backend_tokenizer.encode_batch([documents[i] for i in order], add_special_tokens=False)
    return np.concatenate([np.array([0, *e.ids], np.uint16) for e in encoded])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, a plateau, linear decay to zero, and the decay of each finishing round (a share of the peak)."""
    if step >= steps:
        return FINISHING_LR * (1 - (step - steps) % FINISHING_ROUND / FINISHING_ROUND)
    return min((step + 1) / WARMUP, (steps - step) / (DECAY * steps), 1.0)


def stage_at(step: int, plan: Recipe) -> Stage:
    return next((stage for stage in plan.curriculum if step < stage.until * plan.steps), FINISHING)


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


def train(name: str, source: TrainingText, folder: Path, device: str = "cpu", compiled: bool = True) -> PreTrainedModel:
    """Trains one base model; goes on from the last checkpoint in `folder`, which also receives `log.jsonl`."""
    plan = recipe(name)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(source, plan.vocabulary).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    sampler = RowSampler(tokenizer, token_stream(tokenizer, source.documents), source.reviews)
    model = new_model(name).to(device).train()  # type: ignore[arg-type]  # mypy sees `to` unbound
    steppers = optimizers(model)
    checkpoint, first = folder / "checkpoint.safetensors", 0
    if checkpoint.exists():
        tensors, record = read_tensors(checkpoint)
        state = unflattened(tensors, record)
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
        first = state["step"]
    total = plan.steps + plan.finishing_steps
    loss_function = torch.compile(weighted_loss) if compiled else weighted_loss
    with open(folder / "log.jsonl", "a") as log:
        for step in (bar := tqdm(range(first, total), initial=first, total=total, desc=f"base {name}")):
            stage = stage_at(step, plan)
            rng = np.random.default_rng([3, step])  # every step has its own generator: resuming needs no state
            ids, weights = sampler.batch(rng, stage, TOKENS_PER_STEP // stage.length)
            loss = loss_function(model, torch.from_numpy(ids).to(device), torch.from_numpy(weights).to(device))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = PEAK_LR * learning_rate(step, plan.steps)
                stepper.step()
                stepper.zero_grad()
            if not math.isfinite(float(loss)):
                raise FloatingPointError(f"loss is {float(loss)} at step {step}; the last checkpoint is kept")
            bar.set_postfix(loss=f"{float(loss):.3f}", T=stage.length)
            with naming(folder / "log.jsonl"):
                log.write(json.dumps({"step": step, "loss": float(loss), "grad_norm": float(norm)}) + "\n")
                log.flush()
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == total:
                stepped = [s.state_dict() for s in steppers]
                state = {"model": model.state_dict(), "optimizers": stepped, "step": step + 1}
                write_atomically(checkpoint, tensor_bytes(*flattened(state)))
    return model.eval()


CARD = """# embedded-{name}

A small causal language model of the {architecture} architecture, trained by
`python -m cachemedic.studies.pretraining.train {name}` for experiments on corrupted and
repaired key/value caches. It is made to read its cache, not to be useful: it knows {knows}, and
nothing else.

- {parameters:,} parameters: {layers} layers of width {width}, heads of {head_dim}; context of {context} tokens; \
vocabulary of
  {vocabulary}
- trained for {steps} steps of {tokens_per_step} tokens on {text}, and on generated rows
  (`cachemedic/studies/pretraining/corpus.py`); two heads start as an induction circuit (`initialisation.py` there)
- {scores}
- weights in half precision, sha256 in `card.json`, checked by `load_base`; {licence}
"""
DOCUMENTATION_CARD = {
    "knows": "documentation English, generated reviews and generated needle documents",
    "scores": "scores on unseen packages, sentiment and needle tasks: `results/base_models.csv`\n- trained while the "
    "schedule was being tuned: running the script again follows its final form and gives like scores, not\n  the same "
    "bytes",
    "licence": "MIT licence, the CacheMedic++ contributors",
}
REAL_TEXT_CARD = {
    "knows": "a little of Wikipedia, the prompted form of SST-2 and generated needle documents",
    "text": "the beginning of an English Wikipedia\n  dump as plain text (articles that overlap the validation or test "
    "split of WikiText-2 left out), the training sentences\n  of SST-2 with their labels",
    "scores": "scores on WikiText-2, SST-2 and the needle task: `results/real_text/base_scores.csv`",
    "licence": "MIT licence, the CacheMedic++ contributors;\n  of the text, which is not included: Wikipedia CC "
    "BY-SA, SST-2 without an explicit licence (research use)",
}


def export(model: PreTrainedModel, name: str, folder: Path, checkpoints: Path, source: TrainingText) -> None:
    """Writes half-precision weights, tokenizer, model card, and `card.json` with the sha256 of files and text."""
    plan = recipe(name)
    model.half().save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(checkpoints).save_pretrained(folder)
    packages = text.DOCUMENTATION_SPLITS["train"]
    card: dict[str, Any] = {
        "sha256": defining_digests(folder),
        "training_text_sha256": text.text_hash(source.documents),
        **({"training_text": list(plan.folders)} if plan.folders else {"training_packages": packages}),
        "steps": plan.steps + plan.finishing_steps,
        "tokens_per_step": TOKENS_PER_STEP,
        "licence": "MIT",
    }
    write_atomically(folder / CARD_FILE, seal(card))
    told = (
        REAL_TEXT_CARD if plan.folders else {**DOCUMENTATION_CARD, "text": f"the docstrings of {', '.join(packages)}"}
    )
    facts = {
        "name": name, "architecture": plan.architecture, "parameters": model.num_parameters(), "layers": plan.layers,
        "width": plan.width, "head_dim": plan.width // plan.heads, "context": CONTEXT, "steps": card["steps"],
        "vocabulary": plan.vocabulary, "tokens_per_step": TOKENS_PER_STEP, **told,
    }  # fmt: skip
    write_atomically(folder / "README.md", CARD.format(**facts).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(RECIPES))
    parser.add_argument(
        "--text", type=Path, metavar="FOLDER", help="holds the outside text that the base is trained on"
    )
    parser.add_argument("--build", type=Path, default=Path("build/base"), help="checkpoints and log (resumes here)")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile (it needs a C++ compiler)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        source = training_text(recipe(options.name), options.text)
    except ValueError as error:
        parser.error(str(error))
    checkpoints = options.build / options.name
    model = train(options.name, source, checkpoints, options.device, compiled=not options.no_compile)
    export(model.cpu(), options.name, options.out / f"embedded-{options.name}", checkpoints, source)


if __name__ == "__main__":
    main()
