"""Folders in and out: other people's from Hugging Face, our own, and their tokenizers."""

from sparsejax.interop import huggingface, native, tokenization

__all__ = ["huggingface", "native", "tokenization"]
