"""Images <-> codes or latents: interfaces in protocol.py, one file per kind of codec."""
