"""Pictures <-> tokens or latents: one protocol, one file per codec."""
