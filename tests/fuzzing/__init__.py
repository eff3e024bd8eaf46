"""Coverage-guided fuzzing of the readers of untrusted bytes: targets, mutators, seeds, and the harness.

`scripts/fuzz.py` runs it for as long as one likes, `tests/test_fuzz.py` for some seconds each.
"""
