"""What fuzzing found, and reading with its eyes: inputs that once raised an error of Python's own, or took hours."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from inventories import inventories
from memory_file import Memory

from converter.api import inspect
from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import unwrapped_names, without_common_prefixes
from converter.errors import LayoutError, MappingError
from converter.layouts import registry
from converter.layouts.detect import detect_layout
from converter.layouts.shapes import match_shape, parse_dim
from converter.options import ConvertOptions
from converter.output import pretrained_config
from converter.plan.planner import resolve_to_canonical
from converter.storage.byte_range import Storage
from converter.tensors.dtypes import BY_NAME
from converter.tensors.tensor_info import Contents, TensorInfo, contiguous_strides

# Far more than any takes now, and far less than all took.
SECONDS = 5.0


def tensor(key: str, *shape: int) -> TensorInfo:
    storage = Storage(Memory(b""), (0, 0), 0, 0, key)
    return TensorInfo(key, BY_NAME["float32"], shape, storage, 0, contiguous_strides(shape))


def described(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: tensor(name, *shape) for name, shape in shapes.items()}


def source(tensors: dict[str, TensorInfo]) -> Checkpoint:
    contents: Contents = dict(tensors)
    return Checkpoint(name="x.safetensors", files=(Memory(b""),), containers=("safetensors",), contents=contents)


def inventory(name: str) -> dict[str, tuple[int, ...]]:
    # Made anew where they lack, and of another type than what is described here.
    return {key: shape for key, (_, shape) in inventories()[name].items() if not key.endswith("position_ids")}


MANY = 100_000
QUICK: dict[str, Callable[[], object]] = {
    "a name of a million segments": lambda: list(without_common_prefixes({"a." * 10**6 + "b": tensor("x")}, "x")),
    "a million wrappers": lambda: unwrapped_names({"module." * 10**6 + "b": tensor("x")}, "x"),
    "a hundred thousand shapes": lambda: inspect.group_layers({f"x.{i}.y": tensor("x", i) for i in range(MANY)}, {}),
}


@pytest.mark.parametrize("name", QUICK)
def test_time_does_not_grow_with_the_square_of_the_input(name: str) -> None:
    began = time.process_time()
    QUICK[name]()
    assert time.process_time() - began < SECONDS


def test_shapes_of_a_group_come_with_the_most_frequent_first() -> None:
    (group,) = inspect.group_layers(described({f"x.{i}.y": (shape,) for i, shape in enumerate((7, 2, 9, 2, 9))}), {})
    assert group.shapes == [[2], [9], [7]]


def test_no_size_of_a_model_is_zero() -> None:
    """Else tensors without elements could make up a table of positions of any length."""
    assert not match_shape((parse_dim("positions"), parse_dim("width")), (10**12, 0), {})
    assert match_shape((parse_dim("positions"), parse_dim("_")), (10, 0), {})


CONFIGS = {
    "clip-hf": (
        pretrained_config.clip_documents,
        ("visual_projection.weight", "text_model.embeddings.position_embedding.weight"),
    ),
    "sam-meta": (
        pretrained_config.sam_documents,
        ("mask_decoder.mask_tokens.weight", "prompt_encoder.mask_downscaling.3.weight"),
    ),
}


@pytest.mark.parametrize("shape", [(), (0, 2), (1,) * 5])
@pytest.mark.parametrize("layout", CONFIGS)
def test_configs_of_tensors_of_odd_shapes(layout: str, shape: tuple[int, ...]) -> None:
    plan = resolve_to_canonical(source(described(inventory(layout))), ConvertOptions(layout.partition("-")[0])).plan
    shapes = {name: value.shape for name, value in {**plan.outputs, **plan.extra_tensors}.items()}
    make, names = CONFIGS[layout]
    assert make(shapes, plan.assumptions, True)
    for name in names:
        with pytest.raises(LayoutError, match=name):
            make({**shapes, name: shape}, plan.assumptions, True)


def test_an_unknown_checkpoint_is_told_in_a_dozen_lines() -> None:
    (mapping,) = (mapping for mapping in registry.mappings("sam") if mapping.name == "sam-meta")
    telling = described({mapping.prefixes[0] + key: () for key in mapping.detect})
    others = [*(f"unheard.of.{i}.y" for i in range(9)), "blocks.0.attn.rel_pos_h"]
    tensors = telling | described({f"image_encoder.{name}": (1,) for name in others})
    with pytest.raises(LayoutError) as caught:
        detect_layout(source(tensors), registry.layouts("sam"), ConvertOptions("sam"))
    message = str(caught.value)
    for words in ("sam-meta has no rule for 'unheard.of.0.y'", "the checkpoint has no tensor for"):
        assert words in message
    assert len(message.splitlines()) <= 12


def test_indices_whose_number_nothing_tells() -> None:
    """They are generated where they are missing: as many as there are positions."""
    shapes = inventory("clip-hf")
    tensors = described({**shapes, "vision_model.embeddings.position_embedding.weight": (2, 2, 2)})
    with pytest.raises(MappingError, match=r"position_ids' cannot be generated: unknown size positions"):
        resolve_to_canonical(source(tensors), ConvertOptions("clip"))


def test_numbers_of_a_group_lie_as_far_apart_as_they_like() -> None:
    """Once every number between the first and the last was made."""
    (group,) = inspect.group_layers(described({"x.0.y": (1,), "x.999999999.y": (1,)}), {})
    assert group.layers == "0 999999999"
    # Longer ones are no indices, and Python refuses to read the longest as numbers.
    assert len(inspect.group_layers(described({"x.0.y": (1,), f"x.{'9' * 5000}.y": (1,)}), {})) == 2


def test_names_with_literal_braces_are_not_layers() -> None:
    groups = inspect.group_layers(described(dict.fromkeys(("x.0.y", "x.1.y", "x.{}.y"), (1,))), {})
    assert [(group.name, group.layers) for group in groups] == [("x.{}.y", "0..1"), ("x.{}.y", "")]


def test_positions_are_numbered_up_to_a_bound() -> None:
    """A sparse file may claim a table of any length, and the numbers are in memory."""
    shapes = inventory("clip-hf")
    width = shapes["vision_model.embeddings.class_embedding"][0]
    table = {"vision_model.embeddings.position_embedding.weight": (10**9, width)}
    with pytest.raises(MappingError, match=r"cannot be generated: \[1, 1000000000\] has more positions than any image"):
        resolve_to_canonical(source(described({**shapes, **table})), ConvertOptions("clip"))
