"""Bad and odd inputs, each built on the spot from a tiny checkpoint; `test_hostile` runs every one of them."""
