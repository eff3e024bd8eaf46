"""Mapping files: YAML to frozen rules to a plan. Nothing here reads a file, computes with weights or imports torch."""
