"""Whether other programs read the same numbers from a checkpoint: `lowbit verify`."""
