"""The mapping files, one flat YAML a layout; read through `importlib.resources`."""
