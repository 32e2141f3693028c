"""Serving: the layer on pooled states (`layer`), and whole models on vLLM, TNL and LLaMA of one size (`engine`)."""
