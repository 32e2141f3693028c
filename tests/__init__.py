"""Tests; one file for each source file."""
