"""lowbit's kernels for x86-64 processors; lowbit finds them by their entry point."""
