"""Questions about autoencoders, each answered by one module with settings of its own."""
