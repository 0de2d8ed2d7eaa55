"""A transformers model on its way into lowbit's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lowbit.tensor import QuantizedTensor
from lowbit_hf.layouts.layout import Outline
from lowbit_hf.layouts.lowbit import LowbitWriter


def outgoing(model: PreTrainedModel, conversions: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the model as files name them, stacks of experts taken apart; and the `quantization_config` of them.

    `conversions` are those that made the model of plain tensors.

    Raises:
        CheckpointError: a weight's inputs are to be rounded by a scale that it does not have.
    """
    writer, tensors, outlines, seen = LowbitWriter(), dict[str, Tensor](), dict[str, Outline](), set[int]()
    for name, tensor in _reverted(model, conversions).items():
        if not isinstance(tensor, QuantizedTensor):
            tensors[name] = tensor
            continue
        outlines[name] = outline_of_tensor(tensor)
        for local, part in writer.tensors(tensor).items():
            tensors[writer.join(name, local)] = _alone(part, seen)
    return tensors, writer.config(outlines, ())


def outline_of_tensor(weight: QuantizedTensor) -> Outline:
    """What is known of a weight before its codes are read."""
    shape = None if weight.tensor_scale is None else tuple(weight.tensor_scale.shape)
    return Outline(
        weight.canonical_shape, weight.format, weight.activation, weight.dtype, weight.pre_scale is not None, shape
    )


def _reverted(model: PreTrainedModel, conversions: Sequence[Any]) -> dict[str, Tensor]:
    """The model's state by the names that its checkpoints have, each tensor once."""
    state, parameters = model.state_dict(), dict(model.named_parameters(remove_duplicate=False))
    for name, source in model.all_tied_weights_keys.items():
        if name in state and parameters.get(name) is parameters.get(source):
            del state[name]
    # Where transformers looks for them.
    fields = vars(model)
    kept, fields["_weight_conversions"] = fields["_weight_conversions"], list(conversions)
    try:
        return revert_weight_conversion(model, state)
    finally:
        fields["_weight_conversions"] = kept


def _alone(part: Tensor, seen: set[int]) -> Tensor:
    """A tensor in memory of its own: transformers takes tensors that share some for tied, and drops all but one."""
    storage = part.untyped_storage()
    own = storage.nbytes() == part.nbytes and storage.data_ptr() not in seen
    alone = part.contiguous() if own else part.contiguous().clone()
    seen.add(alone.untyped_storage().data_ptr())
    return alone
