"""Layouts of processes: the mesh and its groups, DeepSpeed's view of it, and random draws that do not depend on it."""
