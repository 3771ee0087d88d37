"""Images <-> codes or latents: one protocol, one file per codec."""
