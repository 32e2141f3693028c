"""Compression of a trained TNL by structure search against its rivals, before and after healing."""
