#!/usr/bin/env python3
"""Runs an mmproj in llama.cpp, and writes its activations under the names of docs/activations.md.

    pip install xllamacpp==2026.10.11549
    dsocr-verify mmproj.gguf --save-activations ref.safetensors --sizes 1024
    python scripts/llama_cpp_activations.py mmproj.gguf ref.safetensors theirs.safetensors
    dsocr-verify mmproj.gguf --activations theirs.safetensors

That wheel (Linux, x86-64) contains llama.cpp's library of vision encoders. Its functions are called with the structures
of this one build; another build may have others. The pixels are those in ref.safetensors, which has one size.
"""

from __future__ import annotations

import argparse
import ctypes as c
import importlib.util
import os
import warnings
from pathlib import Path

# The project runs without NumPy; torch complains about that once.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

# The names of tensors in llama.cpp's graph, and of the stages. `{}` is the number of a layer.
_STAGES = {
    "sam_output": "sam_model.net_3",
    "pre_ln": "vision_model.pre_layrnorm",
    "layer_out-{}": "vision_model.transformer.layers.{}",
}
_STAGES_V2 = {"sam_output": "sam_model.net_3", "layer_out-{}": "qwen2_model.model.model.layers.{}"}
_NUM_LAYERS = 24
_GGML_TYPE_F32 = 0
_WANTS_TENSOR = c.CFUNCTYPE(c.c_bool, c.c_void_p, c.c_bool, c.c_void_p)


class _Params(c.Structure):
    """clip_context_params."""

    _fields_ = (
        ("use_gpu", c.c_bool),
        ("device", c.c_void_p),
        ("flash_attn_type", c.c_int),
        ("image_min_tokens", c.c_int),
        ("image_max_tokens", c.c_int),
        ("warmup", c.c_bool),
        ("cb_eval", _WANTS_TENSOR),
        ("cb_eval_user_data", c.c_void_p),
        ("no_alloc", c.c_bool),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
    )


class _Encoders(c.Structure):
    """clip_init_result."""

    _fields_ = (("vision", c.c_void_p), ("audio", c.c_void_p), ("generated_audio", c.c_void_p))


class _Vector(c.Structure):
    """std::vector<float>."""

    _fields_ = (("begin", c.c_void_p), ("end", c.c_void_p), ("capacity", c.c_void_p))

    @classmethod
    def over(cls, tensor: torch.Tensor) -> _Vector:
        end = tensor.data_ptr() + tensor.nbytes
        return cls(tensor.data_ptr(), end, end)


class _Image(c.Structure):
    """clip_image_f32."""

    _fields_ = (
        ("add_viewsep", c.c_bool),
        ("add_newline", c.c_bool),
        ("lead_pad", c.c_int),
        ("anyres", c.c_int * 4),
        ("pixels", _Vector),
        ("width", c.c_int),
        ("height", c.c_int),
    )


class Library:
    """llama.cpp's library of vision encoders."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("xllamacpp")
        if spec is None or spec.origin is None:
            raise SystemExit("xllamacpp is not installed: pip install xllamacpp==2026.10.11549")
        path = next(Path(spec.origin).parent.glob("*.so"))
        self._library = c.PyDLL(str(path))
        self._found: dict[str, torch.Tensor] = {}

    def run(self, mmproj: Path, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the named tensors of a run, flat, and the embeddings [tokens, width].

        Args:
            mmproj: The file.
            pixels: [3, size, size].
        """
        on_tensor = _WANTS_TENSOR(self._keep)
        parameters = _Params(image_min_tokens=-1, image_max_tokens=-1, cb_eval=on_tensor)
        init = self._function("_Z9clip_initPKc19clip_context_params", _Encoders, c.c_char_p, _Params)
        vision = init(str(mmproj).encode(), parameters).vision
        if not vision:
            raise SystemExit(f"{mmproj}: llama.cpp does not load it")
        interleaved = pixels.permute(1, 2, 0).contiguous()
        height, width, _ = interleaved.shape
        image = _Image(pixels=_Vector.over(interleaved), width=width, height=height)
        count = self._function("_Z20clip_n_output_tokensPK8clip_ctxPK14clip_image_f32", c.c_int, c.c_void_p, c.c_void_p)
        channels = self._function("_Z18clip_n_mmproj_embdPK8clip_ctx", c.c_int, c.c_void_p)
        embeddings = torch.zeros(count(vision, c.addressof(image)), channels(vision))
        output = _Vector.over(embeddings)
        encode = self._function(
            "_Z17clip_image_encodeP8clip_ctxiPK14clip_image_f32RSt6vectorIfSaIfEE",
            c.c_bool, c.c_void_p, c.c_int, c.c_void_p, c.c_void_p,
        )  # fmt: skip
        if not encode(vision, os.cpu_count() or 1, c.addressof(image), c.addressof(output)):
            raise SystemExit(f"{mmproj}: llama.cpp does not encode the image")
        if output.begin != embeddings.data_ptr():
            raise SystemExit("llama.cpp wrote another number of tokens than clip_n_output_tokens said")
        return self._found, embeddings

    def _keep(self, tensor: int, asks: bool, data: object) -> bool:
        """Keep the values of a named tensor of float32; called before (`asks`) and after each tensor is computed."""
        name = self._function("ggml_get_name", c.c_char_p, c.c_void_p)(tensor).decode(errors="replace")
        if not name or name.startswith("node_"):
            return False
        if not asks and c.c_int.from_address(tensor).value == _GGML_TYPE_F32:
            contiguous = self._function("ggml_is_contiguous", c.c_bool, c.c_void_p)
            if contiguous(tensor):
                values = torch.empty(self._function("ggml_nelements", c.c_int64, c.c_void_p)(tensor))
                get = self._function("ggml_backend_tensor_get", None, c.c_void_p, c.c_void_p, c.c_size_t, c.c_size_t)
                get(tensor, values.data_ptr(), 0, values.nbytes)
                self._found[name] = values
        return True

    def _function(self, name: str, result: type | None, *arguments: type) -> c._NamedFuncPointer:
        function = self._library[name]
        function.restype, function.argtypes = result, arguments
        return function


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mmproj", type=Path)
    parser.add_argument("reference", type=Path, help="what dsocr-verify --save-activations wrote, of one size")
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--dtype", default="float16", help="type to save (default float16, as llama.cpp's convolutions)"
    )
    options = parser.parse_args()
    reference = load_file(options.reference)
    size = next(iter(reference)).partition(".")[0]
    found, embeddings = Library().run(options.mmproj, reference[f"{size}.pixels"][0])
    names = _STAGES_V2 if f"{size}.qwen2_model.queries" in reference else _STAGES
    stages = {their.format(i): f"{size}.{our.format(i)}" for their, our in names.items() for i in range(_NUM_LAYERS)}
    activations = {our: found[their].reshape(reference[our].shape) for their, our in stages.items() if their in found}
    projector = f"{size}.projector"
    rows, width = reference[projector].shape[1:]
    side = round(rows**0.5)
    if len(embeddings) == rows + side:  # version 1 ends each row of patches with image_newline
        embeddings = embeddings.view(side, side + 1, width)[:, :-1].reshape(rows, width)
    activations[projector] = embeddings.reshape(reference[projector].shape)
    dtype = getattr(torch, options.dtype)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in activations.items()}, options.output)
    print(f"wrote {options.output}: {len(activations)} stages")
    for name, tensor in activations.items():
        expected = reference[name]
        print(f"  {name}: relative error {float((tensor - expected).norm() / expected.norm()):.2e}")
    # The library's destructors, which run at the end of the process, fail outside its own module.
    os._exit(0)


if __name__ == "__main__":
    main()
