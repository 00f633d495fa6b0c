"""`groundkern` on the command line, which is `python -m groundkern` too."""

import sys


def main() -> int:
    """Run the program of `groundkern.trainer`, or say what it lacks; returns the exit status."""
    if sys.argv[1:2] == ["env"]:  # tells what is missing, so it may need nothing itself
        from groundkern.environment import main as environment

        return environment(sys.argv[2:])
    try:
        from groundkern.trainer.program import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "groundkern":
            raise
        needed = f"error: {error.name} is not installed; groundkern's commands but `env` need"
        print(f"{needed} `pip install 'groundkern[trainer]'`", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
