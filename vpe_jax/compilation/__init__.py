"""Memory, traffic and time bounds of programs, compiled for devices that need not exist here."""
