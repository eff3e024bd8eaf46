"""The options of a whole DeepEncoder, which the command `encoder` and `converter.encoder` share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from converter.errors import UsageError
from converter.layouts.registry import MODEL_PREFIX
from converter.options import DTYPES, DtypeName, check_choices, option

# By the value of --to: the format of the output.
FORMATS = {"mlx": "safetensors", "mmproj": "gguf"}
_SOURCE = "SOURCE|random:SEED"


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """Options of a whole DeepEncoder; UsageError for wrong values and for options that contradict each other.

    Attributes:
        compressor: A checkpoint with trained net_2 [2*neck, neck, 3, 3] and net_3 [width, 2*neck, 3, 3], where width is
            that of CLIP or Qwen2 (DeepSeek-OCR, GOT-OCR2 and Vary for CLIP-L; DeepSeek-OCR-2 for Qwen2-0.5B); or
            random:SEED, initialised like a new nn.Conv2d (`converter.assembly.additions`). Not needed if `sam` has one.
        queries: A checkpoint with trained query_768 [144, width] and query_1024 [256, width] (DeepSeek-OCR-2); or
            random:SEED, initialised like a new nn.Embedding. Not needed if `qwen2` has them.
        with_projector: Also extract the projector, view_seperator and, for DeepSeek-OCR, image_newline from the source;
            from GOT-OCR2 and Vary, mm_projector_vary.
        add_prefix: The prefix of all output names; `model.`, as in DeepSeek-OCR's checkpoint, by default.
        to: "mlx" for the names and axes of mlx-vlm, "mmproj" for llama.cpp's names, types and header; by default
            DeepSeek-OCR's, or mmproj in the format gguf.
        into: A local checkpoint with encoders of known layouts (DeepSeek-OCR, Unlimited-OCR, GOT-OCR2, LLaVA), a
            folder or a file. Its shards, index, order of names, types and other files are kept.
        dtype: keep, float32, float16 or bfloat16; of an mmproj, the type of its matrices.
    """

    sam: str | Path | None = option("Without SOURCE: a SAM checkpoint of any layout.", "SOURCE")
    clip: str | Path | None = option("Without SOURCE: a CLIP checkpoint of any layout.", "SOURCE")
    qwen2: str | Path | None = option("In place of --clip: a Qwen2 checkpoint, for DeepSeek-OCR-2.", "SOURCE")
    compressor: str | Path | None = option("Checkpoint with trained net_2 and net_3 weights, or random:SEED.", _SOURCE)
    queries: str | Path | None = option("With --qwen2: checkpoint with trained queries, or random:SEED.", _SOURCE)
    with_projector: bool = option("Also take projector, view_seperator and any image_newline.", default=False)
    add_prefix: str = option("Prefix of all tensor names in the output.", "NAME.", default=MODEL_PREFIX)
    to: str = option("Write for mlx-vlm or llama.cpp. [default: DeepSeek-OCR's names]", "mlx|mmproj", default="")
    into: str | Path | None = option(
        "Write a copy of this checkpoint with the encoder in it.", "CHECKPOINT", type=Path | None
    )
    dtype: str = option("Cast the encoder; with --into, keep means CHECKPOINT's types.", default="keep", type=DtypeName)
    prefix: str | None = option(
        "Where the encoders are in a checkpoint with several, such as student. (. for no prefix).", "PREFIX"
    )
    lora: str | Path | None = option("Merge this LoRA adapter of PEFT into the weights.", "ADAPTER")
    adapter_name: str | None = option("Adapter of an --lora file with several.", "NAME")

    def __post_init__(self) -> None:
        check_choices(dtype=(self.dtype, DTYPES))
        if not re.fullmatch(r"([\w-]+\.)*", self.add_prefix):
            raise UsageError(f"--add-prefix {self.add_prefix!r}: expected names that each end in a dot, such as model.")
        changes_prefix = self.add_prefix != MODEL_PREFIX
        if self.to:
            check_choices(to=(self.to, tuple(FORMATS)))
            refuse(f"cannot be combined with --to {self.to}", add_prefix=changes_prefix)
        if self.into is not None:
            refuse("cannot be combined with --into", to=self.to, add_prefix=changes_prefix)
        if self.lora is None:
            refuse("is for --lora", "name the adapter's file or folder with --lora", adapter_name=self.adapter_name)
        if self.clip is not None:
            refuse("cannot be combined with --clip, which it replaces", qwen2=self.qwen2)
            refuse("is for Qwen2: cannot be combined with --clip", queries=self.queries)

    @property
    def families(self) -> dict[str, str | Path]:
        """The checkpoints of the encoders, by family."""
        return _given(sam=self.sam, clip=self.clip, qwen2=self.qwen2)

    @property
    def additions(self) -> dict[str, str | Path]:
        """The checkpoints or seeds of the compressor and the queries, by option."""
        return _given(compressor=self.compressor, queries=self.queries)


def _given(**options: str | Path | None) -> dict[str, str | Path]:
    return {name: value for name, value in options.items() if value is not None}


def refuse(reason: str, hint: str = "", /, **options: object) -> None:
    """Raise UsageError for the first option that is set."""
    for name, value in options.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')}: {reason}", hint)
