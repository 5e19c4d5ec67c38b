"""On PYTHONPATH of what a test starts: every Python process runs this first (see tests/faults.py)."""

from tests.faults import install

install()
