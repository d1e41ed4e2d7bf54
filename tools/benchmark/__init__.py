"""The parts of tools/bench.py. Only row.py and what it imports (peers, problems) need PyTorch."""
