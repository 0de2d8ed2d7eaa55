"""Every error lowbit raises on purpose; each message says what was given, what was needed and what to do."""

from __future__ import annotations


class LowbitError(Exception):
    """Root of all errors that lowbit raises for its user."""


class FormatError(LowbitError, ValueError):
    """A format string, a shape or a scale does not fit the format it is used with."""


class RecipeError(LowbitError, ValueError):
    """A recipe cannot be applied as written: a rule matches nothing, a shape does not fit, too little is covered."""


class CheckpointError(LowbitError, ValueError):
    """A checkpoint is damaged, hostile, incomplete, of a newer schema, or cannot be written."""


class RowError(LowbitError, IndexError):
    """A row is picked that the table does not have."""


class BackendError(LowbitError, RuntimeError):
    """Two backends claim one name, or a backend breaks its contract."""


class NoKernelError(LowbitError, RuntimeError):
    """No kernel of the wanted backends accepts a call; the message lists every refusal."""


class UnsupportedOpError(LowbitError, NotImplementedError):
    """An operator has no rule for quantized tensors; nothing is dequantized behind the user's back."""


class NotPortableError(LowbitError, RuntimeError):
    """A packed tensor, laid out for one kernel, was used where the portable layout is needed."""
