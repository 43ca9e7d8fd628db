"""Windows of tokens from the documents of a text."""

from __future__ import annotations

import numpy as np
import torch

from cachemedic.models.load import Base


def sample_windows(base: Base, documents: tuple[str, ...], count: int, length: int, seed: int) -> torch.Tensor:
    """`count` windows of `length` tokens from different places of a text, begun by end-of-text each: [count, length].

    Raises `ValueError` if the window passes the model's context, or if the text is too short for `count` windows.
    """
    if length > base.context:
        raise ValueError(f"prefix and continuation take {length} tokens; the context of {base.name} is {base.context}")
    enough = sum(len(text.encode()) + 2 for text in documents)  # a token is a byte at least
    if count * (length - 1) > enough:
        raise ValueError(
            f"the text has at most {enough} tokens; {count} windows of {length} take {count * (length - 1)}"
        )
    order = np.random.default_rng([seed, 11]).permutation(len(documents))
    needed = count * (length - 1)
    stream: list[int] = []
    for i in order:
        stream += [*base.tokenizer(documents[i], add_special_tokens=False)["input_ids"], base.tokenizer.eos_token_id]
        if len(stream) >= needed:
            break
    if len(stream) < needed:
        raise ValueError(f"the text has {len(stream)} tokens; {count} windows of {length} take {needed}")
    windows = torch.tensor(stream[:needed]).view(count, length - 1)
    start = base.tokenizer.bos_token_id
    return torch.cat([torch.full((count, 1), base.tokenizer.eos_token_id if start is None else start), windows], 1)
