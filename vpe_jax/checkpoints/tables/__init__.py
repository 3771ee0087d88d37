"""Key layouts of published networks: data only, one file for each family."""
