"""Any Hugging Face decoder: found, loaded, tried, given a mask token or an adapter.

Imports `attention` and `config`. Start reading in `decoder.py`: `Decoder` is what the rest of the package runs.
"""
