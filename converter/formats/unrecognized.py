"""Names for files that no loader reads, so that the message says what to do about them."""

from __future__ import annotations

from converter.errors import ContainerError
from converter.storage.local_file import SourceFile

# How a file begins, what that makes it, and the next step. The first that fits wins.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` where it was cloned"),
    (b"\x1f\x8b", "a gzip archive", "unpack it: gunzip, or tar -xzf"),
    (b"BZh", "a bzip2 archive", "unpack it: bunzip2, or tar -xjf"),
    (b"\xfd7zXZ\0", "an xz archive", "unpack it: unxz, or tar -xJf"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it: unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it: 7z x"),
    (b"Rar!", "a RAR archive", "unpack it: unrar x"),
    (b"PK", "a zip archive, but not one that torch.save or torch.jit.save wrote", "unpack it: unzip"),
    (b"GGUF", "a GGUF file (llama.cpp)", "give the PyTorch or safetensors weights that it was made from"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", "give the PyTorch or safetensors weights"),
    (b"\x93NUMPY", "a numpy array", "give the PyTorch or safetensors weights"),
    (
        b"\x80",
        "a pickle, but not one that torch.save wrote",
        "torch.save its tensors where it was made",
    ),
)
_PAGE = ("a web page, not weights", "the download probably failed or needs a login: fetch it again")
_TEXTS: tuple[tuple[bytes, str, str], ...] = (
    (b"<!doctype", *_PAGE),
    (b"<html", *_PAGE),
    (b"<?xml", "an XML document, such as a storage service answers with in place of a file", "download it again"),
    (b"{", "JSON text, not weights", "of a sharded checkpoint, give the folder or the *.index.json"),
    (b"[", "JSON text, not weights", "give the file that holds the weights"),
)


def error(file: SourceFile) -> ContainerError:
    """What to tell the user of a file that no loader recognises."""
    kind, step = _identify(file)
    return ContainerError(
        f"{file.name}: {kind}", f"{step}\nread are: safetensors, and what torch.save and torch.jit.save write"
    )


def _identify(file: SourceFile) -> tuple[str, str]:
    head = file.read(0, min(file.size, 512))
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "an empty file", "the download or copy was not finished: start it again"
    if not any(head):
        return "begins with nothing but zeros", "the download or copy was not finished: start it again"
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
        return f"text, not weights: {words[:40].decode()!r}", "the download probably failed: fetch it again"
    return f"of an unknown kind: it begins with {head[:8].hex(' ')}", "check that it is the file that you meant"
