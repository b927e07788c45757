"""Other people's files: Hugging Face folders in and out."""

from sparsejax.interop import huggingface

__all__ = ["huggingface"]
