"""Cards signed with the OpenSSF's model-signing library, by keys that the user keeps.

The card alone is signed: it holds the digest of every tensor, and so stands for the weights. The signature is a
Sigstore bundle, which the library's own program checks too: `model_signing verify key CARD --signature CARD.sig ...`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from converter.errors import UsageError


def sign(data: bytes, name: str, key: Path) -> bytes:
    """The signature of a file of that name and content, as the text of a Sigstore bundle."""
    # The library signs files, and the card does not stand in its place yet.
    with tempfile.TemporaryDirectory(prefix="dsocr-") as folder:
        path = Path(folder, Path(name).name)
        path.write_bytes(data)
        signature = path.with_name("signature")
        signer(key).sign(path, signature)
        return signature.read_bytes()


def problem(path: Path, signature: Path, key: Path) -> str:
    """Why `signature` is none of the file by the owner of the public key; empty if it is. UsageError for a bad key."""
    from cryptography.exceptions import InvalidSignature

    library = _library()
    try:
        verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"--public-key {key}: no public key on an elliptic curve, in PEM: {_first(error)}") from error
    try:
        verifier.verify(path, signature)
    except InvalidSignature:
        return "the signature is not this key's, or was changed"
    except Exception as error:  # whatever a file that is no bundle makes its parsers raise
        return _first(error)
    return ""


def signer(key: Path) -> Any:
    """What signs with a private key; UsageError where there is no key to sign with, or no library."""
    library = _library()
    try:
        return library.signing.Config().use_elliptic_key_signer(private_key=key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--sign {key}: no unencrypted private key on the curve P-256, P-384 or P-521, in PEM: {_first(error)}\n"
            "make one: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem"
        ) from error


def _library() -> Any:
    try:
        import model_signing
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed, and signatures are model-signing's\n"
            "install it: pip install 'dsocr-convert[sign]'"
        ) from error
    return model_signing


def _first(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
