"""Encoding shards ahead of training (`videofm encode`), and beside it (`data.online`)."""
