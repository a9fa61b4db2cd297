"""What is kept on disk: training checkpoints, published model folders, downloads."""
