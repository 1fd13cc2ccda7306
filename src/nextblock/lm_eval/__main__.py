"""`python -m nextblock.lm_eval`: the harness's own command line, in which `--model nextblock` is known."""

from __future__ import annotations

import re
import sys

from nextblock.config.errors import UsageError, nearest


def main() -> None:
    """Run the harness; bad input ends in one line on standard error and exit status 2."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import nextblock.lm_eval  # noqa: F401  (registers the model)

        try:
            cli_evaluate()
        except ValueError as error:
            if missing := re.match(r"Tasks not found: ([^,]+)", str(error)):
                raise UsageError(_unknown_task(missing[1])) from None
            raise
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _unknown_task(name: str) -> str:
    from lm_eval.tasks import TaskManager

    close = nearest(name, TaskManager().all_tasks, 0.6)
    close = close if "did you mean" in close else "; `lm_eval ls tasks` lists them"
    return f"the harness has no task '{name}'{close}; a task of your own needs --include_path FOLDER"


if __name__ == "__main__":
    main()
