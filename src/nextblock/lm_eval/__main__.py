"""`python -m nextblock.lm_eval`: the harness's own command line, in which `--model nextblock` is known."""

from __future__ import annotations

import sys
import traceback

from nextblock.config.errors import UsageError, require


def main() -> None:
    """Run the harness; bad input ends in one line on standard error and exit status 2."""
    try:
        require("lm_eval", "eval", "nextblock.lm_eval")
        from lm_eval.__main__ import cli_evaluate

        try:
            cli_evaluate()
        except ValueError as error:
            if (said := str(error)).startswith("Tasks not found"):
                cure = "`lm_eval ls tasks` lists the harness's own, --include_path FOLDER adds yours"
                raise UsageError(f"{said}; {cure}") from None
            where = traceback.extract_tb(error.__traceback__)[-1].filename
            if any(f"/{package}/" in where for package in ("lm_eval", "transformers")):  # what they refuse
                raise UsageError(said) from None
            raise
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
