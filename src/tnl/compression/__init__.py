"""Compression of TNL models: large matrices become tensor networks that `tnss` finds; see docs/compression.md."""
