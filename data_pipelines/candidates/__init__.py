"""Candidate videos of prompts, made on Ray actors: the stage `dpo_generate`."""
