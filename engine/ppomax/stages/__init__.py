"""The stages that the command line starts, each a plain function of its configuration."""
