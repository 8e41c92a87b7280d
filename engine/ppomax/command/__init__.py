"""How a command line becomes a configuration, a folder, and ranks that agree on both. Loads no torch."""
