"""Assigners: which instance each prediction stands for."""
