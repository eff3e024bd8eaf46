"""Coverage-guided fuzzing of whatever reads untrusted bytes: targets, mutators, seeds, and the process that runs one.

`scripts/fuzz.py` runs it for as long as one likes, `tests/test_fuzz.py` for some seconds each.
"""
