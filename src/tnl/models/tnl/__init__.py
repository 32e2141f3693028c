"""TNL: configuration, model, cache and the reader of released TransNormerLLM folders."""
