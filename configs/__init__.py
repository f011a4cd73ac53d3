"""The run configurations that ship with metarl, as package data: `importlib.resources.files("metarl.configs")`."""
