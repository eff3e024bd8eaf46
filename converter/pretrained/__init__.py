"""Folders that transformers' from_pretrained loads: weights, and the JSON documents beside them."""
