"""llama.cpp's GGUF files: read as any other checkpoint, and written.

Reading needs nothing but lowbit-hf; writing takes the header from the `gguf` package, the extra `lowbit-hf[gguf]`.
"""
