"""Predicting: queries, ranking, embeddings, exports; free of training."""
