"""`python -m videofm` is `videofm`."""

from videofm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
