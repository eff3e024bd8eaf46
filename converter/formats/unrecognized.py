"""Identifies files that no loader reads, for an error message with the next step."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import NamedTuple

from converter.errors import ContainerError
from converter.formats.pickle_opcodes import ARRAYS, UNPICKLE_ARRAYS
from converter.formats.zip_directory import is_zip, read_directory
from converter.storage.local_file import SourceFile

_RETRY = "download or copy it again"
_TEXT = rb"(?:\xef\xbb\xbf)?\s*"
_ORIGINAL = "use the PyTorch or safetensors weights that it was made from"
_FROM_NUMPY = "torch.save({{name: torch.from_numpy(array) for name, array in {}.items()}}, 'weights.pth')"
_TRUSTED = "where you trust the file, as loading it may run code in it:"
# An archive that `zip` makes is read if data.pkl is in a folder at its top level.
REPACK = "pack it again, from outside the folder that holds data.pkl: zip -0 -r weights.pth FOLDER"
# Names in a zip archive that may be checkpoints, without characters that `unzip` reads as patterns.
_WEIGHTS = r"(?!__MACOSX/|-)(?:[\w .,+=@~-]+/)*[\w.,+=@~][\w .,+=@~-]*\.(?:safetensors|pth|pth\.tar|pt|bin|ckpt)"
_TRANSFORMERS_4 = "transformers 4 converts it: CLIPModel.from_pretrained(FOLDER, {}=True).save_pretrained(NEW_FOLDER)"


class Format(NamedTuple):
    """A file format that no loader reads."""

    kind: str  # the description in messages
    step: str  # the next step
    begins: bytes = b""  # a regular expression that matches the first bytes
    member: str = ""  # a regular expression that matches the name of a member, for a zip archive
    suffixes: tuple[str, ...] = ()  # of file names, to name such files in a folder without a checkpoint


_ZIP = "a zip archive, but not one that torch.save or torch.jit.save wrote"

# The first match is used.
FORMATS = (
    Format("a Git LFS pointer, not the weights", "run `git lfs pull` in the clone", rb"version https://git-lfs"),
    # Archives of files. The blocks of tar have 512 bytes, and a header begins with the name of the member.
    Format(
        "a tar archive of torch before 0.1.10 (2017)",
        f"{_TRUSTED} torch.save(torch.load(FILE, weights_only=False), 'weights.pth')",
        rb"(?:\./\./@PaxHeader\0.{497}(?:.{512})*?)?(?:sys_info|pickle|tensors|storages)\0",
    ),
    Format("a tar archive", "unpack it: tar -xf", rb".{257}ustar"),
    Format("a gzip archive", "unpack it: gunzip, or tar -xzf", rb"\x1f\x8b", suffixes=(".gz", ".tgz")),
    Format("a bzip2 archive", "unpack it: bunzip2, or tar -xjf", rb"BZh", suffixes=(".bz2",)),
    Format("an xz archive", "unpack it: unxz, or tar -xJf", rb"\xfd7zXZ\0", suffixes=(".xz",)),
    Format("a Zstandard archive", "unpack it: unzstd", rb"\x28\xb5\x2f\xfd", suffixes=(".zst",)),
    Format("a 7z archive", "unpack it: 7z x", rb"7z\xbc\xaf\x27\x1c", suffixes=(".7z",)),
    Format("a RAR archive", "unpack it: unrar x", rb"Rar!", suffixes=(".rar",)),
    # Zip archives of other programs.
    Format(
        "a file of torch.package",
        "save its weights, where you trust the file: torch.package.PackageImporter(FILE).load_pickle(...) gives the "
        "model, then torch.save(model.state_dict(), 'weights.pth')",
        member=r"[^/]+/\.data/(extern_modules|python_version)",
    ),
    Format(
        "an .npz archive of numpy arrays",
        f"convert it: {_FROM_NUMPY.format('numpy.load(FILE)')}",
        member=r".*\.npy",
        suffixes=(".npz",),
    ),
    Format(
        "a program of torch.export (.pt2)",
        "save its weights: torch.save(torch.export.load(FILE).state_dict, 'weights.pth')",
        member=r"serialized_exported_program\.json|[^/]+/archive_format",
        suffixes=(".pt2",),
    ),
    Format(
        "TorchScript of torch 1.0 to 1.3, which today's torch does not read either",
        "with torch 1.4: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')",
        member=r"[^/]+/model\.json",
    ),
    Format("a Keras model", _ORIGINAL, member=r"model\.weights\.h5", suffixes=(".keras",)),
    Format(
        "a CoreML model",
        _ORIGINAL,
        member=r"(.*/)?[^/]+\.mlpackage/Manifest\.json",
        suffixes=(".mlpackage", ".mlmodel"),
    ),
    Format(
        "a file of torch.save that was unpacked and zipped again in another way, which torch.load does not read either",
        f"unpack it, and {REPACK}",
        member=r"(.*/)?data\.pkl",
    ),
    Format(_ZIP, "unpack it: unzip FILE", rb"PK"),
    # Weights for other programs.
    Format(
        "an HDF5 file (Keras)",
        f"{_ORIGINAL}; if it is a tf_model.h5, {_TRANSFORMERS_4.format('from_tf')}",
        rb"\x89HDF\r\n\x1a\n",
        suffixes=(".h5", ".hdf5"),
    ),
    Format(
        "Flax weights (MessagePack)",
        f"if it is a flax_model.msgpack, {_TRANSFORMERS_4.format('from_flax')}; else {_ORIGINAL}",
        rb"(?:[\x81-\x8f]|\xde..|\xdf....)(?:[\xa0-\xbf]|\xd9.)[\x20-\x7e]",
        suffixes=(".msgpack",),
    ),
    Format("a TensorFlow Lite model", _ORIGINAL, rb"....TFL\d", suffixes=(".tflite",)),
    Format("an ExecuTorch program", _ORIGINAL, rb"....ET\d\d", suffixes=(".pte",)),
    Format("a TensorFlow SavedModel", _ORIGINAL, rb"\x08\x01\x12", suffixes=(".pb",)),
    # The field ir_version, then producer_name or a later field.
    Format(
        "an ONNX or CoreML model", _ORIGINAL, rb"\x08[\x02-\x20][\x12\x1a\x22\x28\x32\x3a\x42]", suffixes=(".onnx",)
    ),
    Format("a TensorRT engine", _ORIGINAL, rb"ftrt|ptrt", suffixes=(".engine", ".plan", ".trt")),
    Format("an RKNN model", _ORIGINAL, rb"RKNN", suffixes=(".rknn",)),
    Format("an ncnn model", _ORIGINAL, rb"7767517\s", suffixes=(".param",)),
    Format(
        "an OpenVINO model",
        _ORIGINAL,
        rb"(?s:<\?xml.{1,100})?<net ",
        suffixes=("openvino_model.xml", "openvino_model.bin"),
    ),
    Format("a TensorFlow checkpoint", _ORIGINAL, suffixes=(".ckpt.index", ".ckpt.meta", ".data-00000-of-00001")),
    Format(
        "an Orbax checkpoint (JAX, Flax)", _ORIGINAL, suffixes=("manifest.ocdbt", "_checkpoint_metadata", "_sharding")
    ),
    Format("a ggml file (before GGUF)", _ORIGINAL, rb"lmgg|fmgg|tjgg", suffixes=(".ggml",)),
    Format(
        "a numpy array (.npy)",
        f"if it holds a dict: {_TRUSTED} {_FROM_NUMPY.format('numpy.load(FILE, allow_pickle=True).item()')}",
        rb"\x93NUMPY",
        suffixes=(".npy",),
    ),
    Format("a pickle of numpy arrays, as detectron2 writes", UNPICKLE_ARRAYS, rb"[\x80(}\]c].*?" + ARRAYS),
    # Protocols from 2 on, 0, and 1.
    Format(
        "a pickle, but not one that torch.save wrote",
        f"{_TRUSTED} torch.save(pickle.load(open(FILE, 'rb'), encoding='latin1'), 'weights.pth')",
        rb"\x80|\([dl]p\d+\n|\(?c[\w.]+\n\w+\n|[}\]]q.",
        suffixes=(".pkl", ".pickle", ".pdparams"),
    ),
    Format("an image", "give a file with weights", rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP"),
    Format("a data set (Parquet, Arrow)", "give a file with weights", rb"PAR1|ARROW1", suffixes=(".parquet", ".arrow")),
    # Pages and documents, which may begin with a byte order mark or spaces.
    Format(
        "a web page, not weights",
        f"the download probably failed or needs a login: {_RETRY}",
        _TEXT + rb"(?i:<!doctype|<html)",
    ),
    Format("an XML document, such as the error response of a storage service", _RETRY, _TEXT + rb"(?i:<\?xml)"),
    Format("JSON text, not weights", "for a sharded checkpoint, use the folder or the *.index.json", _TEXT + rb"\{"),
    Format("JSON text, not weights", "use the file with the weights", _TEXT + rb"\["),
)


def error(file: SourceFile) -> ContainerError:
    """Return the error for a file that no loader reads, with its kind and the next step."""
    kind, step = _identify(file)
    return ContainerError(f"{file.name}: {kind}", f"{step}\nsupported formats: safetensors, torch.save, torch.jit.save")


def format_of_name(name: str) -> Format | None:
    """Return the format that has a suffix of a file name, or None."""
    return next((known for known in FORMATS if name.lower().endswith(known.suffixes)), None)


def _identify(file: SourceFile) -> tuple[str, str]:
    head = file.read(0, min(file.size, 8192))
    if not any(head):
        unfinished = f"the download or copy was not finished: {_RETRY}"
        return ("begins with zeros only" if head else "an empty file"), unfinished
    members = list(read_directory(file)) if is_zip(file) else []
    known = _match_format(head, members)
    if known is not None:
        return known.kind, (_unzip_step(members) if known.kind == _ZIP else "") or known.step
    text = b" ".join(head[:256].split())
    if text.isascii() and text.decode().isprintable():
        return f"text, not weights: {text[:40].decode()!r}", f"the download probably failed: {_RETRY}"
    if named := format_of_name(file.name):
        return named.kind, named.step
    return f"unknown format: it begins with {head[:8].hex(' ')}", "check that this is the right file"


def _unzip_step(members: Iterable[str]) -> str:
    """Return the next step to get a checkpoint out of a zip archive; empty if there is none in it."""
    checkpoints = [name for name in members if re.fullmatch(_WEIGHTS, name)]
    if len(checkpoints) == 1:
        member, file_name = checkpoints[0], checkpoints[0].rpartition("/")[2]
        return f"take the checkpoint out: unzip -p FILE {shlex.quote(member)} > {shlex.quote(file_name)}"
    return f"unpack it with unzip FILE, and give one of {', '.join(checkpoints[:5])}" if checkpoints else ""


def _match_format(head: bytes, members: Iterable[str]) -> Format | None:
    for known in FORMATS:
        if known.begins and re.match(known.begins, head, re.DOTALL):
            return known
        if known.member and any(re.fullmatch(known.member, name) for name in members):
            return known
    return None
