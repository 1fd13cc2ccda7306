"""The model `nextblock` of lm-evaluation-harness: an adapted checkpoint in the harness that people already use.

Importing this package registers the model, so that `lm_eval.simple_evaluate(model="nextblock", ...)` finds it; the
harness looks for no plug-ins by itself. `python -m nextblock.lm_eval` is the harness's own command with the model in
it. May import workflows and below. Start reading in `model.py`; `arguments.py` holds what `--model_args` takes.
"""

from nextblock.config.errors import require

require("lm_eval", "eval", "nextblock.lm_eval")

import lm_eval.models  # noqa: E402, F401  (the harness fills an empty registry only)
from lm_eval.api.registry import model_registry  # noqa: E402

model_registry.register("nextblock", target="nextblock.lm_eval.model:NextblockLM")
