"""Kernels of lowbit for NVIDIA GPUs, in Triton; `backend` lists them."""
