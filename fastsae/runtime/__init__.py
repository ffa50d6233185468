"""What every stage stands on: errors, files, output, processes. Knows no model and no autoencoder."""
