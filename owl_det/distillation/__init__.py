"""Distillation: frozen teachers, and branches: a paper is a file, a loss beside the detector's."""
