"""On PYTHONPATH of what a test starts: every Python process runs this first (see tests/hold.py)."""

from tests.hold import install

install()
