"""One self-contained HTML page about a run: `build(path)` in page.py."""
