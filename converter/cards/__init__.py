"""The record of a conversion: as a value, as JSON, as a model card, signed."""
