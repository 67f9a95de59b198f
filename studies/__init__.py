"""Controlled studies in miniature: arms that run one after the other, and reports of them."""
