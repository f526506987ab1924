"""Does each capability of the systems that Isthmus descends from hold here? `python -m benchmarks.family`."""
