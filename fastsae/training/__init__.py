"""Training an autoencoder: data in order, a run's state, figures."""
