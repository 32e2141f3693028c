"""Training, evaluation and generation: what the commands of `tnl` call.

Light to import: torch, transformers and datasets load with the module that uses them.
"""
