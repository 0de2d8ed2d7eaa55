"""Hugging Face checkpoints in lowbit: quantize, evaluate, compare and load them."""
