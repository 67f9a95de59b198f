"""Checkpoints: what a training resumes from, and what inference loads.

A checkpoint of parameters alone (`load.save_model`) is one directory with params, run and
tokenizer; a training's (`store.Checkpoints`) lies in its workdir and has the optimiser's state too.
The kind of a checkpoint, in its run file, is "detector"; or "towers": a contrastive model without
heads, which training can start from, or with CLIP's ResNet-50 a teacher.
"""
