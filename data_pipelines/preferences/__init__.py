"""Preferences of others: readers of their lists, the stage `dpo_import` that makes them ours, and the writer for others."""
