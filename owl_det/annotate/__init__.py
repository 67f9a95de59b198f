"""Pseudo-annotation: label spaces, the frozen annotator, the sharded job and its report."""
