"""What features mean: statistics, evidence, tables."""
