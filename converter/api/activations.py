"""Saves a DeepEncoder's activations, and compares those of another implementation with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch

from converter import __version__
from converter.api.verify import default_sizes, device_name, find_device, tool_versions
from converter.checkpoint.open import Checkpoint, open_checkpoints
from converter.errors import LayoutError, UsageError, first_names
from converter.formats.safetensors import write_safetensors
from converter.options import HubOptions
from converter.output.target import check_not_source, check_target
from converter.storage.atomic_output import atomic_file, output_errors
from converter.storage.progress import OnProgress
from converter.tensors.dtypes import FLOAT32
from converter.tensors.evaluate import as_bytes, read_tensor
from converter.tensors.lazy_tensor import Generated, LazyTensor
from converter.tensors.tensor_info import TensorInfo
from converter.verification.activation_check import check_weights, compare_stages
from converter.verification.activations import CHANNELS_FIRST, StagedEncoder, image_pixels, load_staged_encoder
from converter.verification.inputs import open_converted
from converter.verification.outputs import Features
from converter.verification.pictures import load_image
from converter.verification.record_check import header_metadata
from converter.verification.result import ACTIVATIONS, FAILED, Check, Trace, Verification

_MASK = "image tokens attend to all image tokens; query i attends to all image tokens and to queries up to i"


def save_activations(
    converted: str | Path,
    out: str | Path,
    *,
    sizes: Sequence[int] | None = None,
    stages: Sequence[str] = (),
    image: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    **hub_options: Any,
) -> Path:
    """Write the activations of a whole DeepEncoder at named stages, in float32, to a safetensors file.

    Args:
        converted: A file with a whole DeepEncoder, under any names that `encoder` writes or reads.
        out: The output.
        sizes: Pixels along a side of the image; by default those of the model on a GPU, and the first of them on a CPU.
        stages: Patterns such as `sam_model.blocks.*` of the stages to write; all by default.
        image: An image file; a drawn page by default.
        device: auto, cpu, cuda or cuda:N.
        force: Replace an existing output.
        on_progress: Called with the stage, the work done and all work.
        **hub_options: The fields of HubOptions.

    Returns:
        The path of the output.

    Raises:
        UsageError: A pattern matches no stage.
        LayoutError: The file holds no whole DeepEncoder.
        OutputError: The output exists, or cannot be written.
    """
    path, torch_device = Path(out), find_device(device)
    picture = load_image(Path(image)) if image is not None else None
    check_target(path, force, 0, "save-activations")
    with open_checkpoints([converted], HubOptions(**hub_options)) as [opened]:
        check_not_source(path, [opened], image, option="save-activations")
        target = open_converted(opened, on_progress)
        encoder = load_staged_encoder(target, torch_device)
        chosen = list(sizes or default_sizes(target, torch_device))
        outputs: dict[str, LazyTensor] = {}
        for done, size in enumerate(chosen, 1):
            features = encoder.activations(image_pixels(picture, size).to(torch_device), torch.float32)
            names = _select_stages(features, stages)
            outputs |= {f"{size}.{name}": _as_lazy(features[name].float().cpu()) for name in names}
            on_progress("activations", done, len(chosen))
        metadata = _metadata(encoder, chosen, str(Path(image).name) if image is not None else "")
        with output_errors(path), atomic_file(path, force) as fd:
            write_safetensors(fd, outputs, metadata, lambda count: None)
    return path


def compare_activations(
    converted: str | Path,
    activations: str | Path,
    *,
    image: str | Path | None = None,
    device: str = "auto",
    on_progress: OnProgress = lambda what, done, total: None,
    **hub_options: Any,
) -> Verification:
    """Compare another implementation's activations with those of a whole DeepEncoder.

    Args:
        converted: A file with the whole DeepEncoder that the other implementation ran.
        activations: A safetensors file with any of the stages that `save_activations` writes, under the same names.
        image: The image file that it ran on; the drawn page by default.
        device: auto, cpu, cuda or cuda:N.
        on_progress: Called with the stage, the work done and all work.
        **hub_options: The fields of HubOptions.

    Returns:
        A verification with a check for each size. One that fails names the first stage that departs.

    Raises:
        LayoutError: The file holds no whole DeepEncoder, or the activations are in no safetensors file.
    """
    torch_device = find_device(device)
    picture = load_image(Path(image)) if image is not None else None
    with open_checkpoints([converted, activations], HubOptions(**hub_options)) as [opened, stored]:
        target = open_converted(opened, on_progress)
        if set(stored.containers) != {"safetensors"}:
            raise LayoutError(f"{stored.name}: expected activations in a safetensors file", "see docs/activations.md")
        encoder, metadata = load_staged_encoder(target, torch_device), header_metadata(stored)
        checks, traces = [check_weights(encoder, metadata)], list[Trace]()
        stages_by_size = _stages_by_size(stored, encoder)
        for done, (size, stages) in enumerate(stages_by_size.items(), 1):
            tensors = _channels_first({name: read_tensor(info) for name, info in stages.items()}, metadata)
            check, trace = compare_stages(encoder, image_pixels(picture, size).to(torch_device), tensors)
            checks.append(check)
            traces += [trace] if trace is not None else []
            on_progress("activations", done, len(stages_by_size))
    if not stages_by_size:
        names = first_names([*stored.contents])
        detail = f"no stage in common: {stored.name} has {names}; a stage is 640.sam_model.neck"
        checks.append(Check(ACTIVATIONS, "stages", FAILED, detail))
    known = {f"{size}.{stage}" for size, stages in stages_by_size.items() for stage in stages}
    unknown = [name for name in stored.contents if name not in known]
    return Verification(
        converted=str(converted),
        source=str(activations),
        family=target.family,
        checks=checks,
        reference=f"{type(encoder.model).__name__} of dsocr-convert {__version__}",
        device=device_name(torch_device),
        dtype="float64",
        environment=tool_versions(),
        traces=traces,
        notes=[f"{first_names(unknown)}: no stages, not compared"] if unknown and stages_by_size else [],
    )


def _stages_by_size(stored: Checkpoint, encoder: StagedEncoder) -> dict[int, dict[str, TensorInfo]]:
    """Return the tensors of known stages by image size, smallest first, and by stage."""
    known, by_size = set(encoder.stages), dict[int, dict[str, TensorInfo]]()
    for name, tensor in stored.contents.items():
        size, _, stage = name.partition(".")
        if re.fullmatch("[1-9][0-9]{1,3}", size) and int(size) % 64 == 0 and stage in known:
            by_size.setdefault(int(size), {})[stage] = cast(TensorInfo, tensor)
    return dict(sorted(by_size.items()))


def _channels_first(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Permute tensors that the metadata lists under `channels_last`, by name or as `all`, to channels first."""
    channels_last = metadata.get("channels_last", "").split(",")
    result = dict(tensors)
    for name in CHANNELS_FIRST:
        if name in tensors and tensors[name].ndim == 4 and ("all" in channels_last or name in channels_last):
            result[name] = tensors[name].permute(0, 3, 1, 2)
    return result


def _select_stages(features: Features, patterns: Sequence[str]) -> list[str]:
    """Return the stages that match a pattern, or all without patterns; UsageError for a pattern without a match."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in features):
            raise UsageError(f"--stages {pattern}: matches no stage", f"stages: {', '.join(features)}")
    return [name for name in features if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]


def _as_lazy(tensor: torch.Tensor) -> LazyTensor:
    return Generated(FLOAT32, tuple(tensor.shape), lambda: bytes(as_bytes(tensor)))


def _metadata(encoder: StagedEncoder, sizes: Sequence[int], image: str) -> dict[str, str]:
    return {
        "format": "pt",
        "tool": f"dsocr-convert {__version__}",
        "torch": str(torch.__version__),
        "encoder": type(encoder.model).__name__,
        "sizes": ",".join(map(str, sizes)),
        "image": image or "a drawn page with seeded noise",
        "normalisation": "mean 0.5, std 0.5",
        **({"mask": _MASK} if hasattr(encoder.model, "qwen2_model") else {}),
        **encoder.digests,
    }
