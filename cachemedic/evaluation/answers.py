"""What a model answers from a damaged cache, and from what each defense makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.data.chats import KINDS, fact_in, question_of
from cachemedic.data.task_data import TaskData
from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.evaluation.decoding import CleanBank, tokens_of
from cachemedic.evaluation.evaluate import corrupt_examples
from cachemedic.models.cache import unstack_cache

CLEAN = "clean"
LENGTH = 20  # tokens of an answer, at most


@torch.inference_mode()
def measure_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskData,
    clean: CleanBank,
    spec: CorruptionSpec,
    defenses: Mapping[str, Defense],
) -> pd.DataFrame:
    """The greedy answers to the conversations of `chats.chat_task`: a row per defense and example, first those of the
    clean cache, reader "clean".

    Columns reader, seed, example, question, fact, answer (text), named (whether the answer names the fact), same: the
    share of the tokens of the clean answer that are the same in the same place. The damage is that of `evaluate`.
    """
    seeds = pd.Series(task.seeds.numpy())
    examples = seeds.groupby(seeds).cumcount().to_numpy()
    frames = []
    for kind in range(min(len(KINDS), int(examples.max()) + 1)):  # questions of one kind are as long as each other
        index = np.flatnonzero(examples % len(KINDS) == kind)
        part, written = task.select(torch.from_numpy(index)), clean.tokens(task, torch.from_numpy(index))
        k, v, _ = corrupt_examples(clean, task, spec, index)
        damaged = tokens_of(part, k, v)
        asked = torch.tensor(question_of(tokenizer, kind)).expand(len(index), -1)
        facts = [str(tokenizer.decode(ids[mask])).strip(" .") for ids, mask in _targets(part)]
        reference = answer(model, part, written, asked)
        found = {CLEAN: reference}
        for name, defense in defenses.items():
            with defense.attach(model):
                found[name] = answer(model, part, defense.read(damaged, defense.write(written)), asked)
        for name, ids in found.items():
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            counted = reference != _padding(model)
            same = ((ids == reference) & counted).sum(1) / counted.sum(1)
            rows = {"reader": name, "seed": seeds[index].to_numpy(), "example": examples[index]}
            rows |= {"question": KINDS[kind].question, "fact": facts, "answer": [" ".join(t.split()) for t in texts]}
            named = [float(fact_in(text, fact)) for text, fact in zip(texts, facts, strict=True)]
            frames.append(pd.DataFrame(rows | {"named": named, "same": same.tolist()}))
    return pd.concat(frames).sort_values(["seed", "example"], kind="stable", ignore_index=True)


def answer(model: PreTrainedModel, task: TaskData, cache: CachedTokens, asked: Tensor, length: int = LENGTH) -> Tensor:
    """The greedy answers [N, length] to questions `asked` [N, M] behind a cache; padding follows their end."""
    ids = torch.cat([task.prefix_ids, asked], 1).to(model.device)
    mask = torch.cat([task.prefix_mask, torch.ones_like(asked, dtype=torch.bool)], 1).to(model.device)
    generate: Any = model.generate
    found = generate(
        ids,
        attention_mask=mask.long(),
        past_key_values=unstack_cache(cache.k.to(model.device), cache.v.to(model.device)),
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=_padding(model),
    )[:, ids.shape[1] :].cpu()
    return torch.nn.functional.pad(found, (0, length - found.shape[1]), value=_padding(model))


def _padding(model: PreTrainedModel) -> int:
    config = model.generation_config
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return int(end if config.pad_token_id is None else config.pad_token_id)


def _targets(task: TaskData) -> list[tuple[Tensor, Tensor]]:
    return list(zip(task.target_ids, task.target_mask, strict=True))
