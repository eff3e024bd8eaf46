"""Finds and reads the projector between encoder and language model, under the names of any model that has one."""

from __future__ import annotations

from collections.abc import Mapping

from converter.checkpoint.open import Checkpoint
from converter.errors import LayoutError
from converter.plan.planner import ResolvedPlan
from converter.tensors.lazy_tensor import LazyTensor, lazy_read, reshaped
from converter.tensors.tensor_info import TensorInfo

WITHOUT_PROJECTOR = (
    "where an encoder has no projector, as llama.cpp needs: put it into a checkpoint that has one, such as "
    "deepseek-ai/DeepSeek-OCR, with --into, and take both from that"
)
# The tensors between encoder and language model in DeepSeek-OCR, and their names in llama.cpp's mmproj.
LLAMA_CPP = {
    "projector.layers.weight": "mm.model.fc.weight",
    "projector.layers.bias": "mm.model.fc.bias",
    "image_newline": "v.image_newline",
    "view_seperator": "v.view_seperator",
}
# The projector's tensors in DeepSeek-OCR, in GOT-OCR2 and Vary, and in llama.cpp: the original names (DeepSeek-OCR
# misspells one), and the names in transformers or llama.cpp.
_PROJECTORS = (
    {
        "projector.layers.weight": "multi_modal_projector.weight",
        "projector.layers.bias": "multi_modal_projector.bias",
        "image_newline": "image_newline",
        "view_seperator": "view_separator",
    },
    {
        "mm_projector_vary.weight": "multi_modal_projector.multimodal_projector.weight",
        "mm_projector_vary.bias": "multi_modal_projector.multimodal_projector.bias",
    },
    LLAMA_CPP,
)
# The tensor that a model's projector lacks, by the family of the last encoder.
_NOT_IN_MODEL = {"qwen2": "image_newline"}
# Vectors that llama.cpp stores as a matrix of one row.
_VECTORS = ("image_newline", "view_seperator")


def find_projector(sam: ResolvedPlan) -> dict[str, TensorInfo | None]:
    """Return the projector's tensors next to an encoder by original names; None for missing ones."""
    return projector_tensors(sam.detected.tensors, sam.detected.match.prefix)


def projector_tensors(tensors: Mapping[str, TensorInfo], encoder_prefix: str) -> dict[str, TensorInfo | None]:
    """Return the projector's tensors by original names, weight and bias first; None for missing ones.

    The prefix of the projector is that of the model: the first modules of the encoder's prefix.
    """
    modules = encoder_prefix.split(".")[:-1]
    prefixes = ["".join(f"{module}." for module in modules[:count]) for count in range(len(modules), -1, -1)]
    candidates = [
        {name: tensors.get(prefix + name) or tensors.get(prefix + new_name) for name, new_name in names.items()}
        for prefix in prefixes
        for names in _PROJECTORS
    ]
    # The most complete one: `v.image_newline` of an mmproj is also DeepSeek-OCR's name under the prefix `v.`.
    return max(candidates, key=lambda candidate: sum(tensor is not None for tensor in candidate.values()))


def read_projector(source: Checkpoint, plans: Mapping[str, ResolvedPlan]) -> dict[str, LazyTensor]:
    """Return the tensors of the projector; LayoutError if one is missing or quantised."""
    tensors = find_projector(next(iter(plans.values())))
    expected_absent = _NOT_IN_MODEL.get(list(plans)[-1])
    missing = [name for name, tensor in tensors.items() if tensor is None and name != expected_absent]
    if missing:
        raise LayoutError(
            f"{source.name}: --with-projector: holds no {', '.join(missing)}",
            f"leave the option out; {WITHOUT_PROJECTOR}",
        )
    for tensor in tensors.values():
        if tensor is not None and not tensor.dtype.is_float:
            raise LayoutError(
                f"{source.name}: --with-projector: {tensor.key!r} is quantised ({tensor.dtype.name})",
                "leave the option out, or take the projector from a checkpoint of 16 or 32 bits",
            )
    values = {name: lazy_read(tensor) for name, tensor in tensors.items() if tensor}
    return {name: as_vector(value) if name in _VECTORS else value for name, value in values.items()}


def as_vector(value: LazyTensor) -> LazyTensor:
    """Return a matrix of one row as a vector, and other tensors unchanged."""
    return reshaped(value, value.shape[1:]) if len(value.shape) == 2 and value.shape[0] == 1 else value
