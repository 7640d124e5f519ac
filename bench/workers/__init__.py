"""What torchrun starts for a benchmark: one rank each."""
