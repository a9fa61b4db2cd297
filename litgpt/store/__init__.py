"""Training checkpoints, model folders, adapters and downloads on disk."""
