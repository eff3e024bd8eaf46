"""SHA-256 of every output tensor."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping

from converter.tensors.lazy_tensor import LazyTensor, nbytes


class TensorDigests:
    """SHA-256 of every output tensor, computed while the tensors are written.

    Call it with each chunk of tensor data, in the order of `outputs`.
    """

    def __init__(self, outputs: Mapping[str, LazyTensor]) -> None:
        self._hashes = {name: hashlib.sha256() for name in outputs}
        # The tensors that are not complete, each with the number of bytes that follow.
        self._pending = deque((self._hashes[name], nbytes(value)) for name, value in outputs.items() if nbytes(value))

    def __call__(self, data: memoryview) -> None:
        while data:
            digest, expected = self._pending.popleft()
            digest.update(data[:expected])
            if expected > len(data):
                self._pending.appendleft((digest, expected - len(data)))
            data = data[expected:]

    def hex(self, name: str) -> str:
        """The digest of a tensor, in hexadecimal."""
        return self._hashes[name].hexdigest()
