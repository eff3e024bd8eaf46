"""Hostile and unusual inputs, each derived from a tiny checkpoint; `test_hostile` runs the program on each."""
