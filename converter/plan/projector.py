"""The projector between encoder and language model, in a checkpoint of any of the models that have one."""

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
# Such tensors in DeepSeek-OCR, in GOT-OCR2 and Vary, and in llama.cpp's DeepSeek-OCR:
# their own names (misspelling included) -> transformers' or llama.cpp's names.
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
# Those of them that models lack, by the family of the last encoder.
_ABSENT = {"qwen2": "image_newline"}
# Vectors, which llama.cpp stores as a matrix of one row.
_VECTORS = ("image_newline", "view_seperator")


def find_projector(sam: ResolvedPlan) -> dict[str, TensorInfo | None]:
    """Return the projector's tensors next to an encoder by their own names; None for those that are missing."""
    return projector_tensors(sam.detected.tensors, sam.detected.match.prefix)


def projector_tensors(tensors: Mapping[str, TensorInfo], encoder_prefix: str) -> dict[str, TensorInfo | None]:
    """Return the projector's tensors by their own names, weight and bias first; None for those that are missing.

    The projector has the prefix of the model, which is that of the encoder without its last modules.
    """
    modules = encoder_prefix.split(".")[:-1]
    bases = ["".join(f"{module}." for module in modules[:count]) for count in range(len(modules), -1, -1)]
    candidates = [
        {name: tensors.get(base + name) or tensors.get(base + other) for name, other in names.items()}
        for base in bases
        for names in _PROJECTORS
    ]
    # Of an mmproj, `v.image_newline` alone is also DeepSeek-OCR's name under `v.`.
    return max(candidates, key=lambda found: sum(tensor is not None for tensor in found.values()))


def read_projector(source: Checkpoint, plans: Mapping[str, ResolvedPlan]) -> dict[str, LazyTensor]:
    """Return the tensors of the projector; LayoutError names those that are missing."""
    found = find_projector(next(iter(plans.values())))
    absent = _ABSENT.get(list(plans)[-1])
    missing = [name for name, tensor in found.items() if tensor is None and name != absent]
    if missing:
        raise LayoutError(
            f"{source.name}: --with-projector: holds no {', '.join(missing)}",
            f"leave the option out; {WITHOUT_PROJECTOR}",
        )
    for tensor in found.values():
        if tensor is not None and not tensor.dtype.is_float:
            raise LayoutError(
                f"{source.name}: --with-projector: {tensor.key!r} is quantised ({tensor.dtype.name})",
                "leave the option out, or take the projector from a checkpoint of 16 or 32 bits",
            )
    read = {name: lazy_read(tensor) for name, tensor in found.items() if tensor}
    return {name: as_vector(value) if name in _VECTORS else value for name, value in read.items()}


def as_vector(value: LazyTensor) -> LazyTensor:
    """Return a matrix of one row as a vector, and other tensors as they are."""
    return reshaped(value, value.shape[1:]) if len(value.shape) == 2 and value.shape[0] == 1 else value
