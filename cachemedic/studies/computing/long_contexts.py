"""Long contexts (notebook 23): facts hidden in thousands of tokens, and language modelling behind as many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import pandas as pd
import torch
from torch import Tensor

from cachemedic.core.progress import tqdm
from cachemedic.core.seeds import generator
from cachemedic.corruption.apply import corrupt
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.corruption.storage_faults import KIVI_GROUPS
from cachemedic.corruption.types import NONE, ROTATION_SEED_TEST
from cachemedic.data.task_data import Row, TaskData, assemble, score
from cachemedic.data.tasks import perplexity_task
from cachemedic.data.text_source import TextSource
from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.defenses.heuristics import NoDefense, Reset, blind_defenses
from cachemedic.defenses.shadows import GroupQuantisedShadow
from cachemedic.evaluation.decoding import CleanBank, clean_pass, decode_logits, tokens_of
from cachemedic.evaluation.evaluate import divergence, evaluate
from cachemedic.evaluation.experiments import SPLIT_OFFSET, TYPES, calibration_of, kept_frame
from cachemedic.evaluation.statistics import ratio_interval
from cachemedic.models.cache import unstack_cache
from cachemedic.models.load import Base
from cachemedic.studies import pretrained
from cachemedic.studies.base_report import proportion
from cachemedic.studies.computing.frontier import InCache
from cachemedic.studies.computing.hidden_facts import HiddenFacts, hidden_facts
from cachemedic.studies.family_evaluation import bytes_per_token
from cachemedic.studies.run import Run
from cachemedic.studies.summaries import advantage, in_order, means_over_seeds

# Cached tokens: of texts with hidden facts, one a seed, each asked for four; and of texts to be continued.
FACT_LENGTHS, LENGTHS = (1024, 2048, 4096), (128, 1024, 4096)
SMOKE_FACT_LENGTHS, SMOKE_LENGTHS = (512,), (128, 256)
TEXTS = 2  # to be continued, a seed
CHECKED = 2  # texts with hidden facts of the validation split, a length; the first one overwrites those of the test
CHOICE_LENGTH, CHOICE_TEXTS = 1024, 4  # the validation texts by which the heuristic is chosen
CALIBRATION = 16  # windows whose ranges clip
SCORED = 32  # tokens of a continuation
SHARE = 0.25  # of the tokens, or of the pages, that a fault hits
SEVERITY = 1.0  # of the noise, at 128 tokens if it hits all
TRANSFERRED = 0.5  # the severity whose parameters are tried at other lengths
BITS = 2
REFERENCE = "E"  # of paired differences
KEY = ["length", "type", "reader"]
MEASURES = ["nll_clean", "nll", "kl"]


def noise(base: Base) -> CorruptionSpec:
    """Noise on a quarter of the tokens."""
    return CorruptionSpec("gaussian", SEVERITY, share=SHARE, base=base.name, severity_map=base.severity_map)


def faults(base: Base) -> dict[str, CorruptionSpec]:
    """By name: what is left of a token under noise helps to repair it, pages of another text do not."""
    return {"noise": noise(base), "another text": CorruptionSpec("page_swap", parameter=SHARE)}


def readers_of(run: Run, base: Base, source: TextSource) -> dict[str, Defense]:
    """Every reader by name: no defence, the heuristic of the least KL on the validation split, copies, and repairs that
    know by hashes what is damaged.
    """
    calibration = calibration_of(base, 4 if run.smoke else CALIBRATION, source)
    blind = blind_defenses(calibration)

    def tried() -> pd.DataFrame:
        length, count = (128, 1) if run.smoke else (CHOICE_LENGTH, CHOICE_TEXTS)
        documents = source.documents_of("validation")
        task = pretrained.language_task(base, documents, "validation", [0], count, length)
        return evaluate(base.model, task, clean_pass(base.model, task), noise(base), blind)

    kl = kept_frame(run.partial / "heuristics.csv", tried).groupby("reader")["kl"].mean()
    best = str(kl.drop("none").idxmin())
    usual, *wider = KIVI_GROUPS
    copies = {f"shadow_{BITS}bit": usual} | {f"shadow_{BITS}bit, group {group}": group for group in wider}
    found = pretrained.operators(base, source)
    return {
        "none": blind["none"],
        best: blind[best],
        **{name: GroupQuantisedShadow(calibration.shape, BITS, group) for name, group in copies.items()},
        "D, hashes": InCache(base.model, found["D"], "estimate"),
        "E, code alone": InCache(base.model, found["E"], "restore"),
        "E": InCache(base.model, found["E"], "estimate"),
        "recompute": InCache(base.model, None, "recompute"),
    }


# --- hidden facts -----------------------------------------------------------------------------------------------------


def ask(base: Base, cache: CachedTokens, task: TaskData, defense: Defense) -> Tensor:
    """The logits [Q, M, V] of all questions of a task behind the one cached text [1, L, G, T, d], read by a defense.

    They are decoded in one row, in which no question attends to another.
    """
    (questions, decoded), length = task.continuation_ids.shape, cache.k.shape[3]
    question = torch.arange(questions).repeat_interleave(decoded)
    place = torch.arange(decoded).repeat(questions)
    own = (question[:, None] == question) & (place[:, None] >= place)
    readable = cache.valid if cache.readable is None else cache.readable
    read = torch.cat([readable.cpu().expand(len(own), -1), own], 1)
    model, mask = base.model, torch.zeros(read.shape, dtype=base.model.dtype)
    with defense.attach(model):
        output = model(
            input_ids=task.continuation_ids.reshape(1, -1).to(model.device),
            position_ids=(length + place)[None].to(model.device),
            attention_mask=mask.masked_fill(~read, torch.finfo(mask.dtype).min)[None, None].to(model.device),
            past_key_values=unstack_cache(cache.k.to(model.device), cache.v.to(model.device)),
        )
    return output.logits.view(questions, decoded, -1).cpu()


@torch.inference_mode()
def answers(
    base: Base, hidden: HiddenFacts, written: CachedTokens, donor: CachedTokens, readers: Mapping[str, Defense]
) -> pd.DataFrame:
    """What is answered behind the cached text as it was written, and behind each fault through each reader.

    Columns type, reader, damaged (share of the tokens that are hit), question, depth, named (1 if the likeliest
    continuation of the answer is the fact), nll and kl of the fact's tokens. donor: the cache of another text.
    """
    task, (_, layers, heads, length, _) = hidden.task, written.k.shape
    clean = ask(base, written, task, NoDefense())
    frames = [_graded(task, clean, clean).assign(type=NONE, reader="clean", damaged=0.0)]
    for fault, spec in faults(base).items():
        event = hidden.event(spec, layers, heads)
        drawn = generator("hidden facts, damage", fault, length, int(task.seeds[0]))
        k, v = corrupt(written.k, written.v, [event], drawn, donor.k, donor.v, ROTATION_SEED_TEST)
        damaged = replace(written, k=k, v=v)
        for name, defense in readers.items():
            logits = ask(base, defense.read(damaged, defense.write(written)), task, defense)
            share = event.n_positions / length
            frames.append(_graded(task, clean, logits).assign(type=fault, reader=name, damaged=share))
    return pd.concat(frames, ignore_index=True)


def _graded(task: TaskData, clean: Tensor, logits: Tensor) -> pd.DataFrame:
    scores = score(task, logits)
    found = {"question": range(len(task)), "depth": task.depth.numpy().round(2), "named": scores["correct"]}
    return pd.DataFrame(found | {"nll": scores["nll"], "kl": divergence(task, clean, logits)})


def read_text(base: Base, source: TextSource, split: str, length: int, number: int) -> tuple[HiddenFacts, CachedTokens]:
    """Text `number` of a split with hidden facts, and its clean cache."""
    documents, seed = source.documents_of(split), number + SPLIT_OFFSET[split]
    hidden = hidden_facts(base.tokenizer, documents, length, seed, turn=number)
    first = hidden.task.select(slice(0, 1))  # all questions follow the same text
    return hidden, clean_pass(base.model, first).tokens(first)


def fact_answers(run: Run, base: Base, source: TextSource, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """A row for each split, length, seed, fault, reader and question.

    Of the validation split there are the sound caches and those without a defence; the first of its texts is what
    overwrites those of the test. Of the copies one is asked.
    """
    readers = {name: reader for name, reader in readers.items() if ", group " not in name}
    frames = []
    for length in SMOKE_FACT_LENGTHS if run.smoke else FACT_LENGTHS:

        @cache
        def checked(length: int = length) -> list[tuple[HiddenFacts, CachedTokens]]:
            return [read_text(base, source, "validation", length, number) for number in range(CHECKED)]

        plan = [("validation", number) for number in range(CHECKED)]
        plan += [("test", seed) for seed in run.parameters["seeds"]]
        for split, number in tqdm(plan, desc=f"facts hidden in {length} tokens"):

            def of_text(split: str = split, length: int = length, number: int = number) -> pd.DataFrame:
                if split == "validation":
                    donor = checked()[(number + 1) % CHECKED][1]
                    return answers(base, *checked()[number], donor, {"none": NoDefense()})
                return answers(base, *read_text(base, source, split, length, number), checked()[0][1], readers)

            rows = kept_frame(run.partial / f"facts-{split}-{length}-{number}.csv", of_text)
            frames.append(rows.assign(split=split, length=length, seed=number))
    return pd.concat(frames, ignore_index=True)


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """How many answers name the fact, by split, length, fault and reader, the share with Wilson's bounds; mean NLL and
    KL of the facts.
    """
    found = []
    for key, group in rows.groupby(["split", *KEY], sort=False):
        share = proportion(int(group["named"].sum()), len(group))
        row = dict(zip(["split", *KEY], key, strict=True)) | share.columns("named")
        row |= {"n_named": int(group["named"].sum()), "n_examples": len(group), "n_seeds": group["seed"].nunique()}
        found.append(row | group[["damaged", "nll", "kl"]].mean().to_dict())
    return pd.DataFrame(found)


# --- language modelling -----------------------------------------------------------------------------------------------


def continued(task: TaskData, length: int) -> TaskData:
    """The same texts of one seed, of which the first `length` tokens are cached and as many scored as in `task`."""
    whole = torch.cat([task.prefix_ids, task.continuation_ids, task.target_ids[:, -1:]], 1)
    needed = length + 1 + int(task.target_mask[0].sum())
    rows = [Row(ids, cached=length, answer=length + 1) for ids in whole[:, :needed].tolist()]
    return assemble(task.name, rows, task.seeds.unique().tolist())


def continuations(run: Run, base: Base, source: TextSource, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """Rows of `evaluate` with a column length: texts behind noise on a quarter of their tokens, through all readers;
    with nothing read of them; and behind each type on all tokens, at the parameters of one severity at 128 tokens.
    The cache of the first tokens of a text is a part of that of more of them, so that one prefill serves all lengths.
    """
    specs = [CorruptionSpec(kind, TRANSFERRED, base=base.name, severity_map=base.severity_map) for kind in TYPES]
    conditions: list[tuple[CorruptionSpec, Mapping[str, Defense]]] = [
        (noise(base), readers),
        (CorruptionSpec(NONE), {"erased": Reset()}),
        *[(spec, {"none": NoDefense()}) for spec in specs],
    ]
    lengths, seeds = SMOKE_LENGTHS if run.smoke else LENGTHS, run.parameters["seeds"]
    whole = perplexity_task(base.tokenizer, source.documents_of("test"), seeds, TEXTS, max(lengths), SCORED)
    frames = []
    for seed in tqdm(seeds, desc=f"continuations of up to {max(lengths)} tokens"):

        def of_seed(seed: int = seed) -> pd.DataFrame:
            longest = whole.select(whole.seeds == seed)
            cached, found = clean_pass(base.model, longest), []
            for length in lengths:
                task = continued(longest, length)
                k, v = cached.k[..., :length, :], cached.v[..., :length, :]
                clean = CleanBank(k, v, decode_logits(base.model, tokens_of(task, k, v), task))
                rows = [evaluate(base.model, task, clean, *condition) for condition in conditions]
                found.append(pd.concat(rows).assign(length=length))
            return pd.concat(found)

        frames.append(kept_frame(run.partial / f"texts-{seed}.csv", of_seed))
    columns = ["length", "type", "severity", "parameter", "share", "reader", "seed", "example", *MEASURES]
    return pd.concat(frames, ignore_index=True)[columns].sort_values("length", kind="stable", ignore_index=True)


def repaired(rows: pd.DataFrame, readers: Sequence[str]) -> pd.DataFrame:
    """KL and NLL of each length and reader behind noise on a quarter of the tokens, over seeds, and what each reader
    undoes more than E.
    """
    own = rows[rows["severity"] == SEVERITY]
    means = means_over_seeds(own, ["length", "reader"], MEASURES)
    paired = advantage(own.assign(task=own["length"]), REFERENCE).rename(columns={"task": "length"})
    return in_order(means.merge(paired.drop(columns="n_seeds"), on=["length", "reader"]), "reader", readers)


def transferred(rows: pd.DataFrame) -> pd.DataFrame:
    """The damage of each type, at the parameters of one severity at 128 tokens, as a share of the context's value."""
    found = []
    for length, of_length in rows.groupby("length", sort=False):
        erased = of_length[of_length["reader"] == "erased"].groupby("seed")[["nll", "nll_clean"]].mean()
        hit = of_length[of_length["severity"] == TRANSFERRED]
        for kind, group in hit.groupby("type", sort=False):
            means = group.groupby("seed")[["nll", "nll_clean"]].mean()
            damage = ratio_interval(means["nll"] - means["nll_clean"], erased["nll"] - erased["nll_clean"])
            row = {"length": length, "type": kind, "severity": TRANSFERRED} | damage.columns("damage")
            value = float((erased["nll"] - erased["nll_clean"]).mean())
            found.append(row | {"value": value, "n_seeds": len(means), "n_examples": len(group)})
    return pd.DataFrame(found)


def results(run: Run, source: TextSource) -> dict[str, pd.DataFrame]:
    """`source`: the text; what the parameters record of it are names and a digest."""
    base = pretrained.base_of(run)
    readers = readers_of(run, base, source)
    texts = continuations(run, base, source, readers)
    facts = fact_answers(run, base, source, readers)
    kept = bytes_per_token(base, readers)
    return {
        "long_contexts_facts": facts,
        "long_contexts_named": in_order(named(facts).merge(kept, "left", on="reader"), "reader", ["clean", *readers]),
        "long_contexts_texts": texts,
        "long_contexts_kl": repaired(texts, list(readers)).merge(kept, on="reader"),
        "long_contexts_severity": transferred(texts),
    }
