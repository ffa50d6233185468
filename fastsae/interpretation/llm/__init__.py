"""Labels and scores by a language model."""
