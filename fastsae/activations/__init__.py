"""The residual stream of tokens: extracted in batches, kept in files."""
