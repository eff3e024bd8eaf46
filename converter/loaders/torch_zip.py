"""torch.save's format since torch 1.6: a zip archive of a pickle and one member a storage.

<root>/data.pkl      the pickled object, each storage in it a persistent id
<root>/data/<key>    the bytes of a storage, as a rule stored and aligned
<root>/byteorder     "little" or "big"; files of torch before 2.1 lack it and are little
"""

from __future__ import annotations

from converter.checkpoint import DAMAGED, Contents, Storage
from converter.errors import ContainerError
from converter.files import SourceFile
from converter.loaders import torch_pickle
from converter.loaders.torch_pickle import StorageRef
from converter.loaders.unpickler import MAX_PICKLE, unpickle
from converter.loaders.zipdir import Directory, is_zip, read_directory, read_small

CONTAINER = "torch zip"


def recognises(file: SourceFile) -> bool:
    if not is_zip(file):
        return False
    names = read_directory(file)
    # TorchScript archives have constants beside the data, and a loader of their own.
    return f"{names.root}/data.pkl" in names and f"{names.root}/constants.pkl" not in names


def load(file: SourceFile) -> Contents:
    archive = Archive(file)
    value, _ = unpickle(archive.pickle, archive.where, torch_pickle.GLOBALS, torch_pickle.StorageRefs().load)
    return torch_pickle.contents(file, value, archive.storage)


class Archive:
    """The members that saved objects and TorchScript modules have in common."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.members: Directory = read_directory(file)
        self.root = self.members.root
        self.where = f"{file.name}: data.pkl"
        self.pickle = read_small(self.members[f"{self.root}/data.pkl"], MAX_PICKLE)
        self._big_endian = self._byteorder() == b"big"

    def _byteorder(self) -> bytes:
        name = f"{self.root}/byteorder"
        order = read_small(self.members[name], 16) if name in self.members else b"little"
        if order not in (b"little", b"big"):
            raise ContainerError(
                f"{self.file.name}: byteorder: {order!r} is neither little nor big\ndownload or copy the file again"
            )
        return order

    def storage(self, ref: StorageRef) -> Storage:
        """The member that holds `ref`'s bytes, checked to be as long as the pickle says."""
        name = f"{self.root}/data/{ref.key}"
        if name not in self.members:
            raise ContainerError(f"{self.file.name}: no member {name!r}, which data.pkl refers to\ndownload it again")
        storage = self.members[name]
        if storage.size != ref.nbytes:
            raise ContainerError(
                f"{self.file.name}: {name}: {storage.size} bytes, where data.pkl says {ref.nbytes}\n{DAMAGED}"
            )
        return storage._replace(big_endian=True) if self._big_endian else storage
