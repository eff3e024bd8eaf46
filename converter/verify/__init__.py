"""Proofs that a conversion is right: structure, bytes, and outputs against the source's own implementation."""

from converter.verify.result import Check, Trace, Verification
from converter.verify.run import verify

__all__ = ["Check", "Trace", "Verification", "verify"]
