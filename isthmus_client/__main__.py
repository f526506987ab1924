"""`isthmus`, or `python -m isthmus_client`: the command; where click is not installed, a line that says so."""

import sys


def main() -> None:
    try:
        from isthmus_client.command import main as run
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.exit(
            "error: the command needs click and others: pip install click pillow rich watchfiles (the extra `cli` of "
            "isthmus-client)"
        )
    run()


if __name__ == "__main__":
    main()
