"""The subcommands that `lowbit-hf` adds to the `lowbit` command."""
