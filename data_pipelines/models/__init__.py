"""Models that score and caption clips; `contract.py` says what a score model is. Weights are local, never downloaded."""
