"""Signs of life between ranks."""
