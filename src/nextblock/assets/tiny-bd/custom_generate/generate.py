"""Block-diffusion decoding of this checkpoint, where the nextblock package is installed.

    model.generate(**inputs, custom_generate="path-or-hub-id", trust_remote_code=True, mode="speculative")
"""

import nextblock


def generate(model, **arguments):
    """Hand all arguments of `model.generate` on to nextblock."""
    return model.generate(custom_generate=nextblock.block_diffusion, **arguments)
