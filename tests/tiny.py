"""Tiny tokenizer, texts and random models for tests."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cachemedic.data import text

VOCABULARY = 400
CONTEXT = 320
SENTENCES = "the old bridge over the river is closed today; boats wait below, and nobody knows when it opens again. "
DOCUMENTS = [f"Note {i}: {SENTENCES * (1 + i % 4)}" for i in range(24)]


def tiny_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE; id 0 begins every text. Small vocabularies split the labels into several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[text.END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([" positive negative\nSentiment: " * 50, *DOCUMENTS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=text.END_OF_TEXT, eos_token=text.END_OF_TEXT)


def tiny_model(architecture: str = "gpt2", seed: int = 0) -> torch.nn.Module:
    """Random weights, 3 layers of 2 or 4 heads of 8; large enough weights for logits that depend on the context."""
    torch.manual_seed(seed)
    shared = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_positions=CONTEXT, n_embd=32, n_layer=3, n_head=4, **shared))
    else:
        config = LlamaConfig(
            max_position_embeddings=CONTEXT, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, **shared,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    return model.eval().requires_grad_(False)
