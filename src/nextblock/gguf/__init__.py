"""GGUF files as parents: found, refused where they would compute something else, read by transformers.

Imports `config`. Start reading in `files.py`: `find_gguf` says what is refused, `gguf_config` makes the config.
"""
