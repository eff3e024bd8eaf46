#!/usr/bin/env python3
"""Benchmark of the encoder on one NVIDIA GPU, beside other code that computes the same.

    python scripts/bench_encoder.py --deepseek DeepSeek-OCR/DeepSeek-OCR-master/DeepSeek-OCR-vllm

SAM-base of `converter.encoders`, transformers, segment-anything and DeepSeek (`--deepseek`, the folder that holds
the package `deepencoder`) get the same seeded weights, and the same images of 1024 pixels in bfloat16. So do the whole
encoders of `converter.encoders` and of DeepSeek. Prints a table: milliseconds (the median of the repetitions), peak
memory without the weights, milliseconds compiled by torch.compile, and the error, which is the norm of the difference
from ours in float64, over the norm. The last lines compare gradients in float32 with those in float64.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import converter
from converter.encoders import ClipConfig, DeepEncoder, SamConfig, SamEncoder
from converter.encoders import sam as sam_module

SIZE = 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--repeat", type=int, default=10, help="repetitions (default %(default)s)")
    parser.add_argument("--deepseek", type=Path, metavar="FOLDER", help="the folder that holds DeepSeek's deepencoder")
    args = parser.parse_args()
    if args.deepseek:
        import_deepseek(args.deepseek)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.batch} images of {SIZE} pixels, bfloat16\n"
    )
    pixels = torch.randn(args.batch, 3, SIZE, SIZE, device="cuda")
    print("| model | ms | peak GB | compiled, ms | error |\n|---|---|---|---|---|")
    for title, models in (
        ("SAM-base", sam_models(bool(args.deepseek))),
        ("DeepEncoder", deep_encoders(bool(args.deepseek))),
    ):
        exact = exact_outputs(models["ours"], pixels[:2])
        for name, model in models.items():
            print_row(f"{title}, {name}", model.bfloat16(), pixels.bfloat16(), exact, args.repeat)
    print()
    print_gradients(seeded(SamEncoder()), pixels[:1])
    return 0


# Models ---------------------------------------------------------------------------------------------------------------


def seeded(model: Any) -> Any:
    """A model with weights of about the size of trained ones, on the GPU."""
    for name, parameter in model.named_parameters():
        mean = 1.0 if parameter.dim() == 1 and "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean, 0.3 if "rel_pos" in name else 0.02)
    return model.cuda().eval()


def sam_models(deepseek: bool) -> dict[str, nn.Module]:
    """SAM-base without a compressor by whose code it is; each maps pixels to features."""
    from segment_anything import sam_model_registry
    from transformers import SamVisionConfig, SamVisionModel

    ours = seeded(SamEncoder(SamConfig(compressor=None)))
    state = ours.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sam.safetensors")
        save_file({name: tensor.cpu() for name, tensor in state.items()}, path)
        converted = converter.load(path, "sam", to="sam-hf")
    transformers = SamVisionModel(SamVisionConfig())
    transformers.load_state_dict(converted)
    meta = sam_model_registry["vit_b"]().image_encoder
    meta.load_state_dict(state)
    models = {"ours": ours, "transformers'": LastHiddenState(transformers), "segment-anything's": meta}
    if deepseek:
        theirs = importlib.import_module("deepencoder.sam_vary_sdpa").build_sam_vit_b()
        theirs.net_2 = theirs.net_3 = nn.Identity()
        theirs.load_state_dict(state)
        models["DeepSeek's"] = theirs
    return {name: model.cuda().eval() for name, model in models.items()}


def deep_encoders(deepseek: bool) -> dict[str, nn.Module]:
    """The whole encoder by whose code it is; each maps pixels to tokens."""
    ours = seeded(DeepEncoder(SamConfig(), ClipConfig()))
    if not deepseek:
        return {"ours": ours}
    theirs = DeepSeekEncoder()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return {"ours": ours, "DeepSeek's": theirs.cuda().eval()}


class LastHiddenState(nn.Module):
    """A model of transformers that returns its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        last: Tensor = self.model(pixels).last_hidden_state
        return last


class DeepSeekEncoder(nn.Module):
    """DeepSeek's two modules, put together as DeepseekOCRModel does."""

    def __init__(self) -> None:
        super().__init__()
        self.sam_model = importlib.import_module("deepencoder.sam_vary_sdpa").build_sam_vit_b()
        self.vision_model = importlib.import_module("deepencoder.clip_sdpa").build_clip_l()

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.sam_model(pixels)
        semantic = self.vision_model(pixels, features)
        return torch.cat((semantic[:, 1:], features.flatten(2).permute(0, 2, 1)), dim=-1)


def import_deepseek(folder: Path) -> None:
    """Import DeepSeek's package without flash_attn and easydict, of which these encoders need nothing else."""
    sys.path.insert(0, str(folder))
    flash_attention = mock.Mock(spec=["flash_attn_qkvpacked_func", "flash_attn_func"])
    absent = {"flash_attn": flash_attention, "easydict": mock.Mock(EasyDict=Attributes)}
    sys.modules.update(absent)
    for name in ("sam_vary_sdpa", "clip_sdpa"):
        importlib.import_module(f"deepencoder.{name}")
    for name in absent:
        del sys.modules[name]


class Attributes(dict[str, Any]):
    """A dict whose values are attributes, as easydict's."""

    __getattr__ = dict.__getitem__


# Measurements ---------------------------------------------------------------------------------------------------------


def exact_outputs(model: nn.Module, pixels: Tensor) -> Tensor:
    """Outputs in float64, image by image to save memory. Afterwards the weights are float32 again, unchanged."""
    with torch.no_grad():
        outputs = torch.cat([model.double()(image[None].double()) for image in pixels])
    model.float()
    return outputs


def print_row(title: str, model: nn.Module, pixels: Tensor, exact: Tensor, repeat: int) -> None:
    """Print one line of the table."""
    with torch.no_grad():
        outputs = model(pixels)[: len(exact)].double()
        error = ((outputs - exact).norm() / exact.norm()).item()
        eager = milliseconds(lambda: model(pixels), repeat)
        peak = peak_memory(lambda: model(pixels))
        torch.compiler.reset()
        compiled_model = torch.compile(model)
        compiled = milliseconds(lambda: compiled_model(pixels), repeat)
    print(f"| {title} | {eager:.1f} | {peak / 1e9:.1f} | {compiled:.1f} | {error:.2e} |", flush=True)


def milliseconds(run: Callable[[], object], repeat: int) -> float:
    """The median GPU time of one call, after three calls that are not counted."""
    times = []
    for _ in range(3 + repeat):
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        events[0].record()
        run()
        events[1].record()
        events[1].synchronize()
        times.append(float(events[0].elapsed_time(events[1])))
    return statistics.median(times[3:])


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that one call allocates at most, beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def print_gradients(model: SamEncoder, pixels: Tensor) -> None:
    """Print the errors of gradients in float32 against float64, with attention as it runs on a GPU and with a mask."""
    exact = parameter_gradients(model.double(), pixels.double())
    model.float()
    masked = mock.patch.object(sam_module, "attention_without_mask", sam_module.attention_with_mask)
    without = parameter_gradients(model, pixels)
    with masked:
        with_mask = parameter_gradients(model, pixels)
    for title, computed in (("without a mask", without), ("with a mask", with_mask)):
        errors = {name: ((computed[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}
        worst = max(errors, key=errors.__getitem__)
        median = statistics.median(errors.values())
        print(f"Gradients of {len(errors)} tensors, {title}: error {median:.1e}, at most {errors[worst]:.1e} ({worst})")


def parameter_gradients(model: SamEncoder, pixels: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean square of the output for each parameter, in float64."""
    model.zero_grad(set_to_none=True)
    model(pixels).square().mean().backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    sys.exit(main())
