"""What every stage stands on: errors, files, output, processes; no model and no autoencoder."""
