"""Identifies files that no loader reads, for an error message with the next step."""

from __future__ import annotations

from converter.errors import ContainerError
from converter.storage.local_file import SourceFile

# First bytes of a file, its kind, and the next step. The first match is used.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` in the clone"),
    (b"\x1f\x8b", "a gzip archive", "unpack it: gunzip, or tar -xzf"),
    (b"BZh", "a bzip2 archive", "unpack it: bunzip2, or tar -xjf"),
    (b"\xfd7zXZ\0", "an xz archive", "unpack it: unxz, or tar -xJf"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it: unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it: 7z x"),
    (b"Rar!", "a RAR archive", "unpack it: unrar x"),
    (b"PK", "a zip archive, but not one that torch.save or torch.jit.save wrote", "unpack it: unzip"),
    (b"GGUF", "a GGUF file (llama.cpp)", "use the PyTorch or safetensors weights that it was converted from"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", "use the PyTorch or safetensors weights"),
    (b"\x93NUMPY", "a numpy array", "use the PyTorch or safetensors weights"),
    (b"\x80", "a pickle, but not one that torch.save wrote", "save its tensors with torch.save"),
)
_PAGE = ("a web page, not weights", "the download probably failed or needs a login: download it again")
_TEXTS: tuple[tuple[bytes, str, str], ...] = (
    (b"<!doctype", *_PAGE),
    (b"<html", *_PAGE),
    (b"<?xml", "an XML document, such as the error response of a storage service", "download it again"),
    (b"{", "JSON text, not weights", "for a sharded checkpoint, use the folder or the *.index.json"),
    (b"[", "JSON text, not weights", "use the file with the weights"),
)


def error(file: SourceFile) -> ContainerError:
    """The error for a file that no loader reads: its kind and the next step."""
    kind, step = _identify(file)
    return ContainerError(f"{file.name}: {kind}", f"{step}\nsupported formats: safetensors, torch.save, torch.jit.save")


def _identify(file: SourceFile) -> tuple[str, str]:
    head = file.read(0, min(file.size, 512))
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "an empty file", "the download or copy was not finished: download or copy it again"
    if not any(head):
        return "begins with zeros only", "the download or copy was not finished: download or copy it again"
    for start, kind, step in _SIGNATURES:
        if head.startswith(start):
            return kind, step
    for start, kind, step in _TEXTS:
        if text.startswith(start):
            return kind, step
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it: tar -xf"
    words = b" ".join(head[:256].split())
    if words.isascii() and words.decode().isprintable():
        return f"text, not weights: {words[:40].decode()!r}", "the download probably failed: download it again"
    return f"unknown format: it begins with {head[:8].hex(' ')}", "check that this is the right file"
