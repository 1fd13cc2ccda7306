"""The model `nextblock` of lm-evaluation-harness: an adapted checkpoint in the harness that people already use.

Importing this package registers the model, so that `lm_eval.simple_evaluate(model="nextblock", ...)` finds it; the
harness looks for no plug-ins by itself. `python -m nextblock.lm_eval` is the harness's own command with the model in
it. May import workflows and below. Start reading in `model.py`; `arguments.py` holds what `--model_args` takes.
"""

import importlib.util
import sys

from nextblock.config.errors import require

if sys.argv[:1] != ["-m"]:  # Python sets this while it looks for `__main__`, which says the same in one line
    require("lm_eval", "eval", "nextblock.lm_eval")

if importlib.util.find_spec("lm_eval") is not None:
    import lm_eval.models  # noqa: F401  (the harness fills an empty registry only)
    from lm_eval.api.registry import model_registry

    model_registry.register("nextblock", target="nextblock.lm_eval.model:NextblockLM")
