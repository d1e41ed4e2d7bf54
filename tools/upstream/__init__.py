"""PyTorch's own tests on a patched and an unpatched PyTorch; standard library only."""
