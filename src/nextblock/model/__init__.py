"""Any Hugging Face decoder: found and loaded, tried on a few tokens, given a mask token, a draft adapter or LoRA.

Imports `attention` and `config`. Start reading in `decoder.py`: `Decoder` is what the rest of the package runs.
`loading` says what is refused before a weight is read, `probe` what is found out by running the model.
"""
