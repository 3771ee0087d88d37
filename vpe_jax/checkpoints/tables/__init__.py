"""Key layouts of published networks as data, one file per family."""
