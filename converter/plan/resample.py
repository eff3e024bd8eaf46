"""Resamples position embeddings for images of another size (--image-size)."""

from __future__ import annotations

from collections.abc import Iterator

from converter.errors import MappingError, UsageError
from converter.layouts.shapes import Sizes, match_shape
from converter.layouts.spec import CanonicalLayout
from converter.plan.apply import Applied
from converter.tensors.lazy_tensor import grid_size_of, resampled, source_tensors

# The kind of relative position embeddings, of window attention and of global attention.
_RELATIVE = "relative"


def resample_positions(target: CanonicalLayout, applied: Applied, depth: int, image_size: int) -> dict[str, str]:
    """Resample all position embeddings, and remove position indices, which are generated for the new number.

    Relative positions of window attention do not change.

    Args:
        target: The canonical layout.
        applied: The tensors by canonical names; modified in place.
        depth: The number of layers.
        image_size: The new height and width of images in pixels.

    Returns:
        The reason for each source tensor that is removed.

    Raises:
        UsageError: The image size is not a multiple of the patch size, or there is nothing to resample.
        MappingError: Positions are not a square grid, or layers with window attention cannot be identified.
    """
    kinds = {spec.positions for spec in target.tensors if spec.positions}
    if not kinds:
        raise UsageError(f"--image-size: {target.name} takes images of any size: nothing to resample")
    patch = _patch_size(target, applied)
    if image_size < patch or image_size % patch:
        raise UsageError(f"--image-size {image_size}: not a multiple of the patch size, {patch}")
    absolute = next(_position_embeddings(target, applied, kinds - {_RELATIVE}), None)
    # Canonical layouts require absolute positions: `make_plan` reports them as missing.
    if absolute is None:
        return {}
    name, kind = absolute
    old_size, new_size = grid_size_of(kind, applied.values[name].shape), image_size // patch
    if old_size == new_size:
        return {}
    relative = [relative_name for relative_name, _ in _position_embeddings(target, applied, {_RELATIVE})]
    for global_name in _of_global_attention(applied, relative, old_size, depth, target.global_layers):
        _resample(applied, global_name, _RELATIVE, new_size)
    _resample(applied, name, kind, new_size)
    return _remove_indices(target, applied)


def _position_embeddings(target: CanonicalLayout, applied: Applied, kinds: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the kind of each tensor of position embeddings of the kinds."""
    specs = [spec for spec in target.tensors if spec.positions in kinds]
    for name in applied.values:
        for spec in specs:
            if spec.name.match(name) is not None:
                yield name, spec.positions


def _of_global_attention(
    applied: Applied, names: list[str], grid_size: int | None, depth: int, num_global: int
) -> list[str]:
    """Return the names of the relative positions of global attention, whose grid has the size of the image."""
    candidates = [name for name in names if grid_size_of(_RELATIVE, applied.values[name].shape) == grid_size]
    if len(candidates) < len(names) or not names:
        return candidates
    # Windows are as large as the image.
    if not num_global or depth % num_global:
        raise MappingError(
            f"--image-size: the {depth} layers cannot be told apart: windows and image are both {grid_size} x "
            f"{grid_size} patches",
            "convert without --image-size: the DeepEncoder resamples at run time",
        )
    global_layers = {str(layer) for layer in range(depth // num_global - 1, depth, depth // num_global)}
    return [name for name in candidates if global_layers & set(name.split("."))]


def _resample(applied: Applied, name: str, kind: str, grid_size: int) -> None:
    try:
        applied.values[name] = resampled(applied.values[name], kind, grid_size)
    except ValueError as error:
        raise MappingError(f"{name}: {error}") from error


def _remove_indices(target: CanonicalLayout, applied: Applied) -> dict[str, str]:
    names = [spec.name.text for spec in target.tensors if spec.generate and spec.name.text in applied.values]
    removed = [tensor for name in names for tensor in source_tensors(applied.values.pop(name))]
    return {tensor.key: "generated for the new number of positions" for tensor in removed}


def _patch_size(target: CanonicalLayout, applied: Applied) -> int:
    """Return the patch size in pixels: the checkpoint's, or DeepSeek-OCR's if it has no patch embedding."""
    sizes: Sizes = {}
    for spec in target.tensors:
        if any(dim.name == "patch" for dim in spec.shape) and spec.name.text in applied.values:
            match_shape(spec.shape, applied.values[spec.name.text].shape, sizes)
    return sizes.get("patch", target.sizes["patch"])
