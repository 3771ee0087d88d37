"""Data sets that need no download (emoji, scenes, words, edits), and a CIFAR-10 converter."""
