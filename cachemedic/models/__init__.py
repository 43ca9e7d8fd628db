"""Base models and their caches as tensors.

From the bottom up:

cache    between a Hugging Face cache and two stacked tensors
shape    the facts about a model that an operator depends on
load     the embedded bases, or any Hugging Face causal LM
weights/ the embedded bases themselves
"""
