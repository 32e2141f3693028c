"""Speed and memory of lightning attention and its peers; `python -m benchmarks.operator --help`."""
