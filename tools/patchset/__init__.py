"""Applies the patch set to a PyTorch, checks it and takes it away again; standard library only."""
