"""`groundkern` on the command line, which is `python -m groundkern` too."""

import sys
from importlib.util import find_spec

# What the extra [trainer] brings, by the names that are imported.
NEEDED = (
    "PIL", "accelerate", "jinja2", "jiwer", "matplotlib", "peft", "pydantic", "pydantic_settings",
    "rapidfuzz", "rich", "scipy", "tqdm", "transformers", "yaml",
)  # fmt: skip


def main() -> int:
    """Run the program of `groundkern.trainer`, or say what it lacks; returns the exit status."""
    if sys.argv[1:2] == ["env"]:  # tells what is missing, so it may need nothing itself
        from groundkern.environment import main as environment

        return environment(sys.argv[2:])
    try:
        from groundkern.trainer.program import run

        return run()
    except ModuleNotFoundError as error:
        if error.name not in NEEDED or find_spec(error.name) is not None:
            raise
        needed = f"error: {error.name} is not installed; groundkern's commands but `env` need"
        print(f"{needed} `pip install 'groundkern[trainer]'`", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
