"""Training: from a configuration to a trained model in its working directory."""
