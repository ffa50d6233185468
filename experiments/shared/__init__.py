"""What benchmarks and studies share: provenance, sweeps, subjects, held-out figures, statistics."""
